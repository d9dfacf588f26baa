"""The ops inside a package of torch's ahead-of-time compiler (AOTInductor), for a dynamic batch.

A package holds machine code that calls our registered operators: where it runs, the library must be
loaded, as `import torchext` or `torch.ops.load_library` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchext.nn


class Network(nn.Module):
    """Every op, and what comes between them, by torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torchext.nn.LinearReLU(20, 16)
        self.out = nn.Linear(16, 40)
        self.loss = torchext.nn.CrossEntropyLoss(label_smoothing=0.1)
        self.head = torchext.nn.LinearCrossEntropyLoss(16, 40, bias=True, reduction="none")

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.hidden(x)
        logits = self.out(hidden)
        return logits, self.loss(logits, target), self.head(hidden, target)


def test_a_package_gives_what_the_network_gives(tmp_path: Path) -> None:
    network = Network().eval()
    rows = torch.export.Dim("rows", min=2, max=1000)

    def sample(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 20), torch.randint(40, (count,))

    with torch.no_grad():
        program = torch.export.export(network, sample(64), dynamic_shapes=({0: rows}, {0: rows}))
        inductor: Any = torch._inductor
        path = inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
        package = inductor.aoti_load_package(path)
        for count in (64, 33, 700):
            call = sample(count)
            for found, expected in zip(package(*call), network(*call), strict=True):
                torch.testing.assert_close(found, expected)
