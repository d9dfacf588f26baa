"""``torchext train --export``: the trained network as a file that runs without its Python code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from torchext.cli.loop import PIXELS, make_model


class ExportError(Exception):
    """The network cannot be exported here."""


def export_network(kind: str, model: str, weights: dict[str, Tensor], folder: Path) -> str:
    """Write the network for the CPU, for any number of images at a time.

    Both files need torchext's native library where they run, and no Python:
    examples/cpp/predict.cpp loads either. The fused layer is in them as
    ``torchext::linear_relu_forward``.

    Args:
        kind: ``"torchscript"`` (`torch.jit`) or ``"aoti"`` (`torch.export` and AOTInductor, which
            takes a C++ compiler).
        model: ``"fused"`` or ``"stock"``.
        weights: the network's ``state_dict``.
        folder: where to; it must exist.

    Returns:
        The name of the file.

    Raises:
        ExportError: there is no compiler, or it failed.
    """
    network = make_model(model)
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)
    name, write = _KINDS[kind]
    # AOTInductor looks at the ending.
    beside = folder / f".{os.getpid()}.{name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what is deployed
            write(network, beside)
        os.replace(beside, folder / name)
    except OSError:
        raise
    except Exception as error:  # a compiler can raise almost anything
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"--export {kind}: {type(error).__name__}: {reason[0] if reason else ''}"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return name


def exported(folder: Path) -> list[tuple[str, str]]:
    """List the kinds and names of the exported networks in a folder.

    Args:
        folder: where they were written to.
    """
    found = [(kind, name) for kind, (name, _) in _KINDS.items()]
    return [(kind, name) for kind, name in found if (folder / name).exists()]


def _write_torchscript(network: nn.Module, path: Path) -> None:
    torch.jit.script(network).save(str(path))  # type: ignore[no-untyped-call]


def _write_aoti(network: nn.Module, path: Path) -> None:
    # Not one image: torch.export would take that for a constant.
    images = torch.zeros(2, PIXELS)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


_KINDS: dict[str, tuple[str, Callable[[nn.Module, Path], None]]] = {
    "torchscript": ("network.ts", _write_torchscript),
    "aoti": ("network.pt2", _write_aoti),
}
KINDS = tuple(_KINDS)
