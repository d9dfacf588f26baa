"""What the tests of ``torchext train`` share."""

import json
import re
from contextlib import contextmanager

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torchext.cli import main
from torchext.data import load_digits, write_idx


def write_small_data(folder):
    """A data set in MNIST's layout: 130 images to train on, 50 to test on."""
    digits = load_digits()
    for part, count, images, labels in (("train", 130, *digits[:2]), ("t10k", 50, *digits[2:])):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images[:count])
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels[:count])
    return folder


def run_train(data, out, options="", model="stock"):
    """Runs `torchext train` in process, 5 steps an epoch on the small data; returns the exit code.

    Later options override earlier ones.
    """
    given = ["--data", str(data), "--batch-size", "32", "--model", model, "--out", str(out)]
    return main(["train", *given, *options.split()])


@contextmanager
def before_step(number, function):
    """Calls a function before that step of any optimiser, counted from 1."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count == number:
            function()

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def losses(folder):
    return [row["loss"] for row in metrics(folder)["epochs"]]


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(one, other):
    """Bitwise equality of nested dicts, lists and tensors."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_error(capsys, code, message, prefix="torchext train: error: "):
    """Exit code 2 and one line on stderr, which matches."""
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith(prefix)
    assert re.search(message, error), error
