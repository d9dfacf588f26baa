"""``torchext train``: 784-64-10 on handwritten digits, with the fused layers or the stock ones."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import torchext
from torchext.cli.export import KINDS, ExportError, export_network, exported
from torchext.cli.loop import PIXELS, Trainer
from torchext.cli.run_folder import (
    Checkpoint,
    CheckpointError,
    Epoch,
    load_checkpoint,
    save_plot,
    save_run,
)
from torchext.data import Digits, IdxError, load_digits

_SAVE_EVERY = 5.0  # seconds: an epoch of the digits is shorter than a write


class TrainError(Exception):
    """The options do not go together, or cannot be met here."""


@dataclass(frozen=True)
class Settings:
    """The options of a training, and their defaults."""

    data: str = "digits"
    epochs: int = 30
    batch_size: int = 100
    lr: float = 0.02
    momentum: float = 0.9
    seed: int = 0
    out: str = "runs/train"
    model: str = "fused"
    device: str = "auto"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options.

    Args:
        parser: the command's parser.
    """

    def add(name: str, text: str, default: object = None, **options: Any) -> None:
        # Nothing is stored for an option that is not given: --resume needs to know.
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=shown, **options)

    add(
        "data",
        "digits, the 1,797 handwritten digits in this package, or a folder with MNIST's four files",
        Settings.data,
        metavar="digits|DIR",
    )
    add("epochs", "passes over the data", Settings.epochs, type=_whole(1), metavar="N")
    add("batch-size", "images in a step", Settings.batch_size, type=_whole(1), metavar="N")
    add("lr", "learning rate of SGD", Settings.lr, type=_positive, metavar="X")
    add("momentum", "momentum of SGD", Settings.momentum, type=_momentum, metavar="X")
    # PyTorch's generator uses 32 bits of a seed.
    add("seed", "of the weights and batches", Settings.seed, type=_whole(0, 2**32 - 1), metavar="N")
    add("out", "folder for the results", Settings.out, metavar="DIR")
    add("model", "torchext's layers or PyTorch's", Settings.model, choices=("fused", "stock"))
    add("device", "where to train", Settings.device, choices=("auto", "cpu", "cuda"))
    add(
        "resume",
        "go on with the training in this folder or checkpoint.pt, with its settings; "
        "--epochs counts from its start",
        metavar="DIR|FILE",
    )
    add("export", "write the trained network for use without Python as well", choices=KINDS)


def run(given: dict[str, Any]) -> int:
    """Train as the options say.

    Args:
        given: the options that were given, by their names in ``Settings``, ``resume`` and
            ``export``.

    Returns:
        The exit code: 0, 1 if the training diverged, 2 for a wrong option or file, 130 for Ctrl-C.
    """
    export = given.pop("export", None)
    try:
        return _train(*_settle(given), export)
    except KeyboardInterrupt:
        return _complain("interrupted", code=130)
    except (TrainError, IdxError, CheckpointError, ExportError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            return _complain(f"error: {where}{error.strerror}")
        return _complain(f"error: {' '.join(str(error).split())}")


def _settle(given: dict[str, Any]) -> tuple[Settings, tuple[Path, Checkpoint] | None]:
    """Complete the options with the defaults, or with the settings of the training to resume."""
    if given.get("data", "digits") != "digits":
        given["data"] = str(Path(given["data"]).resolve())
    previous = None
    settings = Settings()
    if "resume" in given:
        path = Path(given.pop("resume"))
        path = path / "checkpoint.pt" if path.is_dir() else path
        previous = path, load_checkpoint(path)
        settings = _settings_in(*previous)
        for name in ("batch_size", "lr", "momentum", "seed", "model"):
            before = getattr(settings, name)
            if given.get(name, before) != before:
                raise TrainError(
                    f"--{name.replace('_', '-')} {given[name]}: {path} was trained with {before}, "
                    "and only --epochs, --out and --device can change"
                )
        settings = replace(settings, device=Settings.device, out=str(path.parent))
    settings = replace(settings, **given)
    if previous is not None and settings.epochs < (done := len(previous[1]["epochs"])):
        raise TrainError(f"--epochs {settings.epochs}: {path} has {done} epochs behind it")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise TrainError(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    if settings.device == "auto":
        settings = replace(settings, device="cuda" if torch.cuda.is_available() else "cpu")
    return settings, previous


def _settings_in(path: Path, checkpoint: Checkpoint) -> Settings:
    stored = checkpoint["settings"]
    expected = {field.name: type(field.default) for field in fields(Settings)}
    if {name: type(value) for name, value in stored.items()} != expected:
        raise CheckpointError(f"{path}: expected the settings {sorted(expected)}, got {stored}")
    return Settings(**stored)


def _train(settings: Settings, previous: tuple[Path, Checkpoint] | None, export: str | None) -> int:
    digits = load_digits(settings.data)
    pixels = digits.train_images[0].numel()
    if pixels != PIXELS:
        raise TrainError(
            f"--data {settings.data}: expected images of {PIXELS} pixels, got {pixels}"
        )
    trainer = Trainer(
        digits,
        model=settings.model,
        batch_size=settings.batch_size,
        lr=settings.lr,
        momentum=settings.momentum,
        seed=settings.seed,
        device=settings.device,
    )
    data_sum = _data_sum(digits)
    if previous is not None:
        _restore(trainer, *previous, data_sum)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)

    def state(epochs: list[Epoch]) -> Checkpoint:
        return Checkpoint(
            settings=asdict(settings),
            data_sum=data_sum,
            epochs=epochs,
            weights=trainer.weights(),
            optimizer=trainer.optimizer_state(),
        )

    # What is saved is always the end of an epoch, whenever Ctrl-C comes.
    latest = state(previous[1]["epochs"] if previous else [])
    done, steps = len(latest["epochs"]), len(trainer.batches)
    _introduce(settings, digits, steps, done)
    bar = _Bar(total=settings.epochs * steps, done=done * steps)
    saved = started = time.perf_counter()
    stopped = ""
    try:
        for number in range(done + 1, settings.epochs + 1):
            begin = time.perf_counter()
            loss = trainer.train_epoch(number, bar.tick)
            seconds = time.perf_counter() - begin
            if not math.isfinite(loss):
                stopped = f"error: the loss became {loss} in epoch {number}: try a smaller --lr"
                break
            right = trainer.test_accuracy()
            row = Epoch(epoch=number, loss=loss, test_accuracy=right, seconds=seconds)
            latest = state([*latest["epochs"], row])
            speed = trainer.batches.samples / seconds
            shown = f"{loss:.6f}" if loss < 1e4 else f"{loss:.4e}"
            bar.write(f"{number:>5}{shown:>12}{right:>12.2%}{seconds:>11.3f}{speed:>12,.0f}")
            if time.perf_counter() - saved > _SAVE_EVERY:
                save_run(out, latest)
                saved = time.perf_counter()
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        bar.close()
    code = _finish(settings, latest, time.perf_counter() - started, stopped)
    name = ""
    if export is not None and code == 0:
        name = export_network(export, settings.model, latest["weights"], out)
        print(f"exported: {out / name}", flush=True)
    if len(latest["epochs"]) > done:
        for kind, other in exported(out):
            if other != name:
                _complain(f"{out / other} has earlier weights; --export {kind} writes it again")
    return code


def _restore(trainer: Trainer, path: Path, checkpoint: Checkpoint, data_sum: int) -> None:
    if checkpoint["data_sum"] != data_sum:
        raise TrainError(
            f"{path} was trained with other data: their checksum is "
            f"{checkpoint['data_sum']}, that of --data is {data_sum}"
        )
    try:
        trainer.restore(checkpoint["weights"], checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit the network: {error}") from error


def _data_sum(digits: Digits) -> int:
    """Sum all pixels and labels, weighted by their sample's place: other data, another sum."""
    total = 0
    for values in digits:
        rows = values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)
        sums = rows.sum(1, dtype=torch.int64)
        total += int((sums * torch.arange(1, len(sums) + 1)).sum())
    return total


def _introduce(settings: Settings, digits: Digits, steps: int, done: int) -> None:
    missing = [name for name in ("tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        lost = {"tqdm": "progress bar", "matplotlib": "loss.png"}
        _complain(
            f"no {' and no '.join(lost[name] for name in missing)}: {' and '.join(missing)} "
            f"not installed (pip install {' '.join(missing)})"
        )
    native = torchext.backends()["native"]
    if settings.model == "fused" and not native.available:
        _complain(f"no native kernels, so PyTorch's serve the fused layers: {native.reason}")
    threads = f" ({torch.get_num_threads()} threads)" if settings.device == "cpu" else ""
    print(
        f"784-64-10, {settings.model}, on {settings.device}{threads}: "
        f"{len(digits.train_labels):,} images to train on, {len(digits.test_labels):,} to test on, "
        f"{steps} steps an epoch" + (f", {done} epochs done" if done else "")
    )
    if done >= settings.epochs:
        print(f"nothing is left of {settings.epochs} epochs; --epochs N goes on to N in all")
        return
    print(f"{'epoch':>5}{'loss':>12}{'test acc.':>12}{'seconds':>11}{'images/s':>12}", flush=True)


def _finish(settings: Settings, latest: Checkpoint, seconds: float, stopped: str) -> int:
    out = Path(settings.out)
    epochs = latest["epochs"]
    if epochs:
        save_run(out, latest)
        names = ["checkpoint.pt", "metrics.json", "weights.pt"]
        if save_plot(out, epochs):
            names.append("loss.png")
        print(
            f"test accuracy {epochs[-1]['test_accuracy']:.2%} after {len(epochs)} of "
            f"{settings.epochs} epochs, {seconds:.1f} s; in {out}: {', '.join(names)}",
            flush=True,
        )
    if not stopped:
        return 0
    if stopped != "interrupted":
        return _complain(stopped, code=1)
    if not epochs:
        return _complain("interrupted before the end of an epoch: nothing is saved", code=130)
    command = f"torchext train --resume {shlex.quote(str(out))}"
    return _complain(f"interrupted, saved after epoch {len(epochs)}; go on: {command}", code=130)


def _complain(message: str, code: int = 2) -> int:
    print(f"torchext train: {message}", file=sys.stderr, flush=True)
    return code


class _Bar:
    """tqdm's progress bar on a terminal, else nothing."""

    def __init__(self, total: int, done: int) -> None:
        self._bar: Any = None
        self.tick: Callable[[], object] = _nothing
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            tqdm = importlib.import_module("tqdm").tqdm
            self._bar = tqdm(total=total, initial=done, unit="step", leave=False, file=sys.stderr)
            self.tick = self._bar.update

    def write(self, line: str) -> None:
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _nothing() -> None:
    pass


def _whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {low} to {high}, got {text!r}"
            )
        return value

    return parse


def _number(text: str, valid: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and valid(value)):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _positive(text: str) -> float:
    return _number(text, lambda value: value > 0, "a number above 0")


def _momentum(text: str) -> float:
    return _number(text, lambda value: 0 <= value < 1, "a number from 0 up to 1, without 1")
