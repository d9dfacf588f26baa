"""What a training leaves in its folder: checkpoint, weights, metrics and the plot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file."""


class Epoch(TypedDict):
    """What is recorded of an epoch."""

    epoch: int
    loss: float
    test_accuracy: float  # 0 to 1
    seconds: float  # of training, without the test


class Checkpoint(TypedDict):
    """A training at the end of an epoch: all that is needed to go on."""

    settings: dict[str, Any]
    data_sum: int
    epochs: list[Epoch]
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


def save_run(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint.pt``, ``weights.pt`` and ``metrics.json``.

    Each file is replaced as a whole: what is there is never half written.

    Args:
        folder: where to; it must exist.
        checkpoint: what to write.
    """
    metrics = {"settings": checkpoint["settings"], "epochs": checkpoint["epochs"]}
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    replace_file(folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
    replace_file(folder / "weights.pt", lambda file: torch.save(checkpoint["weights"], file))
    replace_file(folder / "metrics.json", lambda file: file.write(text.encode()))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that ``save_run`` wrote.

    Args:
        path: the file.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        CheckpointError: the file is damaged, or something else.
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        raise CheckpointError(f"{path}: damaged, or not a checkpoint") from error
    if not _is_checkpoint(loaded):
        what = sorted(map(str, loaded)) if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(
            f"{path}: not a checkpoint of torchext train: "
            f"expected {sorted(Checkpoint.__annotations__)}, got {what}"
        )
    checkpoint: Checkpoint = loaded
    return checkpoint


def _is_checkpoint(loaded: Any) -> bool:
    return (
        isinstance(loaded, dict)
        and loaded.keys() == Checkpoint.__annotations__.keys()
        and isinstance(loaded["settings"], dict)
        and isinstance(loaded["epochs"], list)
        and all(
            isinstance(row, dict) and row.keys() == Epoch.__annotations__.keys()
            for row in loaded["epochs"]
        )
    )


def save_plot(folder: Path, epochs: list[Epoch]) -> bool:
    """Draw ``loss.png``: the loss and the test accuracy by epoch.

    Args:
        folder: where to; it must exist.
        epochs: what to draw; at least one.

    Returns:
        False if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    numbers = [row["epoch"] for row in epochs]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, title, values, colour in zip(
        figure.subplots(1, 2),
        ("training loss", "test accuracy, %"),
        ([row["loss"] for row in epochs], [100 * row["test_accuracy"] for row in epochs]),
        ("tab:blue", "tab:orange"),
        strict=True,
    ):
        axes.plot(numbers, values, color=colour, marker="o", markersize=3)
        axes.set_title(title, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yscale("log")
    replace_file(folder / "loss.png", lambda file: figure.savefig(file, format="png", dpi=150))
    return True


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside ``path``, then put it in its place in one step.

    Args:
        path: the file to replace or make.
        write: writes the contents.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            write(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
