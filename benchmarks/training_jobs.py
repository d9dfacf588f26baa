"""The ways to train 784-64-10 that `bench_training.py` compares, each from the same start."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock  # which torch depends on
from torch import Tensor, nn

import torchext
from benchmarks.machine import ROOT
from benchmarks.providers import own_code
from torchext.data import Batches, write_idx

PIXELS, HIDDEN, CLASSES = 784, 64, 10
BATCH, LR, SEED = 100, 0.01, 0
_TRAINERS = ("build/cpp*/train", "examples/cpp/build*/train")

Batch = tuple[Tensor, Tensor]


@dataclass
class Data:
    """Generated images of MNIST's size and number."""

    samples: int
    images: Tensor = field(init=False)  # uint8 (N, 28, 28)
    labels: Tensor = field(init=False)  # uint8 (N,)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.images = torch.randint(
            256, (self.samples, 28, 28), dtype=torch.uint8, generator=generator
        )
        self.labels = torch.randint(
            CLASSES, (self.samples,), dtype=torch.uint8, generator=generator
        )

    @cached_property
    def batches(self) -> Batches:
        return Batches(self.images, self.labels, batch_size=BATCH, seed=SEED)

    def first(self, count: int) -> list[Batch]:
        """Copies of the first batches, which no later epoch overwrites."""
        found = itertools.islice(self.batches.epoch(1), count)
        return [(images.clone(), labels.clone()) for images, labels in found]


class Job(ABC):
    """A way to train."""

    @abstractmethod
    def epoch(self) -> tuple[float, dict[str, float]]:
        """Trains an epoch; returns its milliseconds, and those of its parts where it knows them."""

    def losses(self, batches: Iterable[Batch]) -> list[float]:
        """Trains on some batches from the start; returns their losses. Empty if it cannot."""
        return []

    def warm_up(self) -> None:
        """Compiles, and starts libraries."""
        self.epoch()


def stock_model() -> nn.Sequential:
    """The network in stock layers."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def our_model() -> nn.ModuleList:
    """The network in this package's layers, the last with the loss in it: the same parameters."""
    torch.manual_seed(SEED)
    layers = (
        torchext.nn.LinearReLU(PIXELS, HIDDEN),
        torchext.nn.LinearCrossEntropyLoss(HIDDEN, CLASSES, bias=True),
    )
    return nn.ModuleList(layers)


def _our_forward(model: nn.ModuleList) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss, as `torchext train` has it: a list's index costs what a small kernel does."""
    hidden, head = model

    def forward(images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = head(hidden(images), labels)
        return loss

    return forward


class TorchJob(Job):
    """The usual loop.

    Args:
        data: what to train on.
        ours: this package's layers instead of the stock ones.
        compiled: forward and loss through `torch.compile`.
        fused_sgd: `SGD(fused=True)`.
        momentum: SGD's.
    """

    def __init__(
        self,
        data: Data,
        *,
        ours: bool = False,
        compiled: bool = False,
        fused_sgd: bool | None = None,
        momentum: float = 0,
    ) -> None:
        self.model: Any = our_model() if ours else stock_model()
        sgd = torchext.optim.SGD if ours else torch.optim.SGD
        self.optimizer = sgd(self.model.parameters(), lr=LR, momentum=momentum, fused=fused_sgd)
        self._data = data
        self._number = 0
        criterion = nn.CrossEntropyLoss()

        def stock_forward(images: Tensor, labels: Tensor) -> Tensor:
            loss: Tensor = criterion(self.model(images), labels)
            return loss

        forward = _our_forward(self.model) if ours else stock_forward
        self.forward: Callable[[Tensor, Tensor], Tensor] = forward
        if compiled:
            self.forward = torch.compile(own_code(forward), dynamic=False, fullgraph=True)

    def step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(*batch)
        loss.backward()
        self.optimizer.step()
        return loss

    def losses(self, batches: Iterable[Batch]) -> list[float]:
        return [float(self.step(batch).detach()) for batch in batches]

    def warm_up(self) -> None:
        self.losses(itertools.islice(self._batches(), 5))

    def _batches(self) -> Iterator[Batch]:
        self._number += 1
        return self._data.batches.epoch(self._number)

    def epoch(self) -> tuple[float, dict[str, float]]:
        data = forward = backward = optimiser = 0.0
        clock = time.perf_counter
        begin = end_step = clock()
        for batch in self._batches():
            begin_step = clock()
            data += begin_step - end_step
            self.optimizer.zero_grad(set_to_none=True)
            end_zero = clock()
            loss = self.forward(*batch)
            end_forward = clock()
            loss.backward()
            end_backward = clock()
            self.optimizer.step()
            end_step = clock()
            forward += end_forward - end_zero
            backward += end_backward - end_forward
            optimiser += end_step - end_backward + end_zero - begin_step
        total = clock() - begin
        parts = {"data": data, "forward": forward, "backward": backward, "optimiser": optimiser}
        return 1e3 * total, {name: 1e3 * seconds for name, seconds in parts.items()}


class TextbookJob(TorchJob):
    """Stock layers, and a `DataLoader` over a dataset that makes a PIL image and a tensor of each
    sample, as `torchvision.datasets.MNIST` with `ToTensor` does."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.model = nn.Sequential(nn.Flatten(), *self.model)
        self._loader: Any = torch.utils.data.DataLoader(
            _PerSample(data), batch_size=BATCH, shuffle=True
        )

    def _batches(self) -> Iterator[Batch]:
        found: Iterator[Batch] = iter(self._loader)
        return found


class _PerSample(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, data: Data) -> None:
        self._images, self._labels = data.images, data.labels.long()
        self._from_array = importlib.import_module("PIL.Image").fromarray
        self._array = importlib.import_module("numpy").array

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._from_array(self._images[index].numpy())
        pixels = torch.from_numpy(self._array(image, copy=True)).view(28, 28, 1)
        return pixels.permute(2, 0, 1).contiguous().float().div(255), int(self._labels[index])


class JaxJob(Job):
    """JAX: one jitted function for a whole step; the data stay in JAX's arrays."""

    def __init__(self, data: Data) -> None:
        self._jax = importlib.import_module("jax")
        self._data = data
        self._number = 0
        state = stock_model().state_dict()
        self._params = [self._array(value) for value in state.values()]
        self._step = self._jax.jit(self._traced_step)
        self._step_at = self._jax.jit(self._traced_step_at)

    def _array(self, tensor: Tensor) -> Any:
        return self._jax.numpy.array(tensor.numpy())

    def _loss(self, params: list[Any], images: Any, labels: Any) -> Any:
        jax = self._jax
        weight, bias, out_weight, out_bias = params
        hidden = jax.nn.relu(images @ weight.T + bias)
        log_p = jax.nn.log_softmax(hidden @ out_weight.T + out_bias)
        return -jax.numpy.take_along_axis(log_p, labels[:, None], axis=1).mean()

    def _traced_step(self, params: list[Any], images: Any, labels: Any) -> tuple[Any, list[Any]]:
        loss, gradients = self._jax.value_and_grad(self._loss)(params, images, labels)
        return loss, [p - LR * g for p, g in zip(params, gradients, strict=True)]

    def _traced_step_at(
        self, params: list[Any], images: Any, labels: Any, start: Any
    ) -> tuple[Any, list[Any]]:
        cut = self._jax.lax.dynamic_slice_in_dim
        return self._traced_step(params, cut(images, start, BATCH), cut(labels, start, BATCH))

    def items(self, batches: Iterable[Batch]) -> list[tuple[Any, Any]]:
        return [(self._array(images), self._array(labels.int())) for images, labels in batches]

    def step(self, item: tuple[Any, Any]) -> Any:
        loss, self._params = self._step(self._params, *item)
        return self._jax.block_until_ready(loss)

    def losses(self, batches: Iterable[Batch]) -> list[float]:
        return [float(self.step(item)) for item in self.items(batches)]

    @cached_property
    def _all(self) -> tuple[Any, Any]:
        images = self._data.images.flatten(1).float().div_(255)
        return self._array(images), self._array(self._data.labels.int())

    def epoch(self) -> tuple[float, dict[str, float]]:
        jnp = self._jax.numpy
        images, labels = self._all
        self._number += 1
        begin = time.perf_counter()
        order = jnp.array(torch.randperm(len(labels)).int().numpy())
        images, labels = jnp.take(images, order, axis=0), jnp.take(labels, order, axis=0)
        self._jax.block_until_ready(images)
        middle = time.perf_counter()
        for start in range(0, self._data.samples - BATCH + 1, BATCH):
            loss, self._params = self._step_at(self._params, images, labels, start)
        self._jax.block_until_ready(self._params)
        end = time.perf_counter()
        parts = {"data": 1e3 * (middle - begin), "steps": 1e3 * (end - middle)}
        return 1e3 * (end - begin), parts


class CppJob(Job):
    """The C++ trainer, on the same images as IDX files. It reports its own seconds an epoch.

    Args:
        data: what to train on.
        binary: the trainer.
    """

    def __init__(self, data: Data, binary: Path) -> None:
        self._binary = binary
        self._folder = tempfile.TemporaryDirectory(prefix="torchext-bench-")
        for part, images, labels in (
            ("train", data.images, data.labels),
            ("t10k", data.images[:BATCH], data.labels[:BATCH]),
        ):
            write_idx(Path(self._folder.name) / f"{part}-images-idx3-ubyte", images)
            write_idx(Path(self._folder.name) / f"{part}-labels-idx1-ubyte", labels)

    def train(self, epochs: int) -> list[dict[str, float]]:
        """Trains from the start; returns metrics.json's epochs."""
        out = Path(self._folder.name) / "out"
        options = {
            "data": self._folder.name, "epochs": epochs, "batch-size": BATCH, "lr": LR,
            "momentum": 0, "seed": SEED, "out": out,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        threads = str(torch.get_num_threads())
        done = subprocess.run(
            [str(self._binary), *words], capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{self._binary}: {done.stderr.strip()[-300:]}")
        rows: list[dict[str, float]] = json.loads((out / "metrics.json").read_text())["epochs"]
        return rows

    def epoch(self) -> tuple[float, dict[str, float]]:
        return 1e3 * self.train(2)[-1]["seconds"], {}  # the first has the start of libraries in it

    def first_epoch_loss(self) -> float:
        return self.train(1)[0]["loss"]


class CppStepJob(Job):
    """The C++ trainer's step, called from this process.

    Args:
        data: what to train on.
        momentum: SGD's.
    """

    def __init__(self, data: Data, *, momentum: float = 0) -> None:
        build_cpp_step()
        self._ops = torch.ops.torchext_benchmarks
        self._trainer = self._ops.make("fused", LR, momentum, SEED)
        self._data = data

    def step(self, batch: Batch) -> Tensor:
        loss: Tensor = self._ops.step(self._trainer, *batch)
        return loss

    def losses(self, batches: Iterable[Batch]) -> list[float]:
        return [float(self.step(batch)) for batch in batches]

    def warm_up(self) -> None:
        self.losses(self._data.first(5))

    def epoch(self) -> tuple[float, dict[str, float]]:
        raise NotImplementedError("an epoch of the C++ trainer is CppJob's")


@cache
def build_cpp_step() -> None:
    """Compiles `cpp_step.cpp`, once for each version of its sources, and loads it."""
    from torch.utils.cpp_extension import load

    # ninja comes from PyPI: beside this python.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    folder = ROOT / "build" / "cpp-step"
    folder.mkdir(parents=True, exist_ok=True)
    # torch's own lock outlives a process that is ended while it compiles, and the next one waits
    # for it for ever; the system frees this one.
    with FileLock(folder / "building"):
        (folder / "lock").unlink(missing_ok=True)
        load(
            "torchext_cpp_step",
            [str(ROOT / "benchmarks" / "cpp_step.cpp")],
            extra_cflags=["-O3", "-std=c++20"],
            extra_include_paths=[torchext.include_path(), str(ROOT / "examples" / "cpp")],
            build_directory=str(folder),
            is_python_module=False,
        )


def find_trainer() -> Path | None:
    """The C++ trainer, where it has been built."""
    for pattern in _TRAINERS:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and os.access(path, os.X_OK):
                return path
    return None
