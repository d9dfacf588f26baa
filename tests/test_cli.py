"""The ``torchext`` command, in process: training, wrong options and files, and ``info``."""

import functools
import io
import os
import platform
import re
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from training import assert_error, assert_same, load, losses, metrics, run_train, write_small_data

import torchext
from torchext.cli import main
from torchext.cli import train as train_command
from torchext.data import Batches, as_input, load_digits, write_idx

FILES = {"checkpoint.pt", "metrics.json", "weights.pt", "loss.png"}
SHAPES = {
    "hidden.weight": (64, 784),
    "hidden.bias": (64,),
    "output.weight": (10, 64),
    "output.bias": (10,),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def no_plot(monkeypatch):
    """Matplotlib takes more time than these trainings."""
    monkeypatch.setattr(train_command, "save_plot", lambda folder, epochs: False)


@pytest.fixture
def train(data, no_plot):
    return functools.partial(run_train, data)


# ---- a training ----


@pytest.mark.parametrize("model", ["fused", "stock"])
def test_defaults_reach_95_percent(model, tmp_path, no_plot, capsys):
    assert main(["train", "--model", model, "--out", str(tmp_path)]) == 0
    epochs = metrics(tmp_path)["epochs"]
    assert epochs[-1]["test_accuracy"] >= 0.95
    assert f"test accuracy {epochs[-1]['test_accuracy']:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["fused", "stock"])
def test_what_a_training_leaves(model, data, tmp_path, capsys):
    out = tmp_path / "not" / "there" / "yet"
    options = f"train --data {data} --epochs 2 --seed 3 --model {model} --lr 0.05 --device cpu"
    assert main([*options.split(), "--out", str(out)]) == 0

    assert {path.name for path in out.iterdir()} == FILES
    written = metrics(out)
    assert written.keys() == {"settings", "epochs"}
    assert written["settings"] == {
        "data": str(data.resolve()),
        "epochs": 2,
        "batch_size": 100,
        "lr": 0.05,
        "momentum": 0.9,
        "seed": 3,
        "out": str(out),
        "model": model,
        "device": "cpu",
    }
    assert [row["epoch"] for row in written["epochs"]] == [1, 2]
    for row in written["epochs"]:
        assert row.keys() == {"epoch", "loss", "test_accuracy", "seconds"}
        assert row["loss"] > 0
        assert 0 <= row["test_accuracy"] <= 1
        assert row["seconds"] > 0
    weights = load(out / "weights.pt")
    assert type(weights) is dict
    assert {name: tuple(value.shape) for name, value in weights.items()} == SHAPES
    assert load(out / "checkpoint.pt")["epochs"] == written["epochs"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert f"{model}, on cpu" in lines[0]
    assert lines[1].split() == ["epoch", "loss", "test", "acc.", "seconds", "images/s"]
    for line, row in zip(lines[2:4], written["epochs"], strict=True):
        epoch, loss, right, *_ = line.split()
        assert (epoch, loss) == (str(row["epoch"]), f"{row['loss']:.6f}")
        assert right == f"{row['test_accuracy']:.2%}"
    assert str(out) in lines[4]


def test_stock_model_is_the_plain_loop_of_the_contract(train, data, tmp_path):
    """The same start, the same batches: what another trainer has to do to print the same loss."""
    assert train(tmp_path, "--epochs 2 --seed 5 --lr 0.03 --momentum 0.8") == 0
    digits = load_digits(data)
    images, labels = as_input(digits.train_images), digits.train_labels.long()
    torch.manual_seed(5)
    hidden, output = nn.Linear(784, 64), nn.Linear(64, 10)
    parameters = [*hidden.parameters(), *output.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.03, momentum=0.8)
    expected = []
    for epoch in (1, 2):
        order = torch.randperm(130, generator=torch.Generator().manual_seed(5 + epoch))
        total = 0.0
        for start in range(0, 130, 32):
            batch = order[start : start + 32]
            loss = nn.functional.cross_entropy(output(hidden(images[batch]).relu()), labels[batch])
            total += loss.item() * len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        expected.append(total / 130)
    assert losses(tmp_path) == expected
    names = zip(SHAPES, parameters, strict=True)
    assert_same(load(tmp_path / "weights.pt"), {name: p.detach() for name, p in names})


def test_fused_model_prints_the_stock_loss(train, tmp_path):
    for model in ("fused", "stock"):
        assert train(tmp_path / model, "--epochs 3", model) == 0
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "stock"), rel=1e-5)


def test_same_seed_same_result_and_another_seed_another(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(tmp_path / name, f"--epochs 1 --seed {seed}") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_batch_larger_than_the_data(train, tmp_path):
    assert train(tmp_path, "--epochs 1 --batch-size 4096") == 0


def test_diverging_training_stops_and_keeps_the_last_epoch(train, tmp_path, capsys, monkeypatch):
    epoch_loss = iter([1.5, float("nan")])
    monkeypatch.setattr(Batches, "epoch_loss", lambda self, losses: next(epoch_loss))
    assert train(tmp_path, "--epochs 4") == 1
    assert "error: the loss became nan in epoch 2" in capsys.readouterr().err
    assert losses(tmp_path) == [1.5]


def test_really_diverging_training(train, tmp_path, capsys):
    assert train(tmp_path, "--epochs 3 --lr 1e30") == 1
    assert "try a smaller --lr" in capsys.readouterr().err


def test_info_into_a_pipe_that_nobody_reads():
    command = [sys.executable, "-m", "torchext", "info"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipe) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


# ---- what is optional ----


def test_without_tqdm_and_matplotlib(data, tmp_path, monkeypatch, capsys):
    for name in ("tqdm", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["train", "--data", str(data), "--epochs", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"loss.png"}
    assert "loss.png" not in printed.out
    assert (
        "torchext train: no progress bar and no loss.png: tqdm and matplotlib not installed "
        "(pip install tqdm matplotlib)\n" in printed.err
    )


def test_progress_bar_on_a_terminal_only(train, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert train(tmp_path, "--epochs 2") == 0
        assert ("/10" in stream.getvalue()) == expected


# ---- wrong options and files ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 0", r"argument --epochs: expected a whole number from 1 to 2147483647, got '0'"),
        ("--epochs 1.5", r"argument --epochs: expected a whole number .* got '1.5'"),
        ("--batch-size -1", r"argument --batch-size: expected a whole number from 1"),
        ("--batch-size 99999999999999999999", r"argument --batch-size: expected a whole number"),
        ("--lr 0", r"argument --lr: expected a number above 0, got '0'"),
        ("--lr nan", r"argument --lr: expected a number above 0, got 'nan'"),
        ("--lr inf", r"argument --lr: expected a number above 0, got 'inf'"),
        ("--momentum 1", r"argument --momentum: expected a number from 0 up to 1, without 1, got"),
        ("--seed -1", r"argument --seed: expected a whole number from 0 to 4294967295, got '-1'"),
        ("--seed 4294967296", r"argument --seed: expected a whole number from 0 to 4294967295"),
        ("--model torch", r"argument --model: invalid choice: 'torch'"),
        ("--device tpu", r"argument --device: invalid choice: 'tpu'"),
        ("--epoch 3", r"unrecognized arguments: --epoch 3"),
        ("--lr", r"argument --lr: expected one argument"),
        ("--data /nowhere", r"/nowhere: no such folder"),
        ("--resume /nowhere", r"/nowhere: no such checkpoint"),
    ],
)
def test_wrong_option(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = main(["train", *options.split()])
    prefix = "torchext: error: " if "--epoch 3" in options else "torchext train: error: "
    assert_error(capsys, code, message, prefix)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(tmp_path, capsys):
    code = main(["train", "--device", "cuda", "--out", str(tmp_path / "out")])
    assert_error(capsys, code, r"--device cuda: torch \S+ finds no CUDA device")


def test_damaged_data(train, data, tmp_path, capsys):
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.zeros(129, dtype=torch.uint8))
    for path in data.iterdir():
        if path.name != "train-labels-idx1-ubyte":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    code = train(tmp_path / "out", f"--data {tmp_path}")
    assert_error(capsys, code, r"train-labels-idx1-ubyte: it has 129 labels, .* has 130 images")


def test_images_of_another_size(train, tmp_path, capsys):
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", torch.ones(3, 8, 8, dtype=torch.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", torch.ones(3, dtype=torch.uint8))
    code = train(tmp_path / "out", f"--data {tmp_path}")
    assert_error(capsys, code, r"expected images of 784 pixels, got 64")
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(train, tmp_path, capsys):
    (tmp_path / "out").write_bytes(b"")
    assert_error(capsys, train(tmp_path / "out"), r"out: File exists")


# ---- the command itself, and info ----


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"torchext {torchext.__version__}\n"
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "train 784-64-10 on handwritten digits" in printed
    assert "show what this installation can do" in printed
    assert main(["train", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in ("data", "epochs", "batch-size", "lr", "momentum", "seed", "out", "model"):
        default = getattr(train_command.Settings, name.replace("-", "_"))
        assert re.search(rf"--{name} .*\(default: {re.escape(str(default))}\)", printed)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["info", "--fast"]])
def test_wrong_command(arguments, capsys):
    assert_error(capsys, main(arguments), "train|info|--fast", prefix="torchext")


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = {line.split()[0]: line for line in printed.out.splitlines() if line[0] != " "}
    assert rows.keys() == {
        *("torchext", "python", "torch", "library", "devices", "simd", "threads", "backends"),
    }
    assert torchext.__version__ in rows["torchext"]
    assert torch.__version__ in rows["torch"]
    assert str(torch.get_num_threads()) in rows["threads"]
    assert "torchext._C " in rows["library"]
    for name, backend in torchext.backends().items():
        state = "available" if backend.available else f"not available: {backend.reason}"
        assert re.search(rf"\b{name} +{re.escape(state)}$", printed.out, re.MULTILINE)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch reads the variable on x86 alone")
@pytest.mark.parametrize(("capability", "level"), [("default", "baseline"), ("avx2", "AVX2")])
def test_the_instruction_set_is_lowered_as_torchs_is(capability, level):
    if level == "AVX2" and torchext._native.simd_level() == "baseline":
        pytest.skip("no AVX2 here")
    done = subprocess.run(
        [sys.executable, "-m", "torchext", "info"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(rf"^simd +{level} \(torch: {capability.upper()}\)$", done.stdout, re.MULTILINE)


def test_info_says_why_a_backend_is_missing(monkeypatch, capsys):
    missing = types.SimpleNamespace(available=False, reason="it is on holiday")
    monkeypatch.setattr(torchext, "backends", lambda: {"native": missing})
    assert main(["info"]) == 0
    assert "native  not available: it is on holiday\n" in capsys.readouterr().out


def test_train_says_that_the_native_kernels_are_missing(train, tmp_path, monkeypatch, capsys):
    missing = types.SimpleNamespace(available=False, reason="it is on holiday")
    monkeypatch.setattr(torchext, "backends", lambda: {"native": missing})
    assert train(tmp_path, "--epochs 1", "fused") == 0
    assert "no native kernels" in capsys.readouterr().err
    assert train(tmp_path, "--epochs 1", "stock") == 0
    assert "no native kernels" not in capsys.readouterr().err


def test_module_is_the_command():
    command = [sys.executable, "-m", "torchext", "train", "--lr", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("torchext train: error: argument --lr: ")
