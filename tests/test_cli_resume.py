"""``torchext train``: Ctrl-C, ``--resume``, and the files that make it possible."""

import functools
import re
import shlex
import signal

import pytest
import torch
from training import (
    assert_error,
    assert_same,
    before_step,
    load,
    losses,
    metrics,
    run_train,
    write_small_data,
)

from torchext.cli import main, run_folder
from torchext.cli import train as train_command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(data, monkeypatch):
    # Matplotlib takes more time than these trainings.
    monkeypatch.setattr(train_command, "save_plot", lambda folder, epochs: False)
    return functools.partial(run_train, data)


@pytest.mark.parametrize("model", ["fused", "stock"])
def test_resume_is_bitwise_the_uninterrupted_training(model, train, tmp_path, capsys):
    assert train(tmp_path / "whole", "--epochs 4", model) == 0
    assert train(tmp_path / "part", "--epochs 2", model) == 0
    resumed = tmp_path / "resumed"
    assert train(resumed, f"--epochs 4 --resume {tmp_path / 'part'}", model) == 0
    assert "2 epochs done" in capsys.readouterr().out
    assert losses(resumed) == losses(tmp_path / "whole")
    assert_same(load(resumed / "weights.pt"), load(tmp_path / "whole" / "weights.pt"))
    states = [load(path / "checkpoint.pt")["optimizer"] for path in (resumed, tmp_path / "whole")]
    assert_same(*states)
    assert len(losses(tmp_path / "part")) == 2


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where what started the tests (nohup, a shell's &) has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step", [7, 10, 11])  # 5 steps an epoch: inside, last of, first of one
def test_ctrl_c_then_resume(step, train, tmp_path, capsys, interruptible):
    assert train(tmp_path / "whole", "--epochs 4 --seed 9") == 0
    out = tmp_path / "stopped here"
    with before_step(step, lambda: signal.raise_signal(signal.SIGINT)):
        assert train(out, "--epochs 4 --seed 9") == 130
    done = 2 if step > 10 else 1
    assert losses(out) == losses(tmp_path / "whole")[:done]
    error = capsys.readouterr().err
    assert f"interrupted, saved after epoch {done}; go on: torchext train --resume" in error

    # The command that it named is all that is needed.
    command = shlex.split(error.strip().partition("go on: ")[2])
    assert main(command[1:]) == 0
    assert metrics(out)["settings"] == metrics(tmp_path / "whole")["settings"] | {"out": str(out)}
    assert losses(out) == losses(tmp_path / "whole")
    assert_same(load(out / "weights.pt"), load(tmp_path / "whole" / "weights.pt"))


def test_ctrl_c_in_the_first_epoch_leaves_earlier_results_alone(train, tmp_path, capsys):
    assert train(tmp_path, "--epochs 1") == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt():
        raise KeyboardInterrupt

    with before_step(3, interrupt):
        assert train(tmp_path, "--epochs 2") == 130
    assert "nothing is saved" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_ctrl_c_while_loading(train, tmp_path, monkeypatch, capsys):
    def interrupt(data):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "load_digits", interrupt)
    assert train(tmp_path / "out") == 130
    assert capsys.readouterr().err == "torchext train: interrupted\n"


def test_long_training_is_saved_on_the_way(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, "_SAVE_EVERY", 0.0)
    seen = []
    with before_step(11, lambda: seen.extend(losses(tmp_path))):
        assert train(tmp_path, "--epochs 3") == 0
    assert seen == losses(tmp_path)[:2]


def test_resume_with_nothing_left(train, tmp_path, capsys):
    assert train(tmp_path / "a", "--epochs 2") == 0
    assert main(["train", "--resume", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 0
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    printed = capsys.readouterr().out.split("nothing is left of 2 epochs")[1]
    assert "images/s" not in printed


def test_an_older_export_is_named(train, tmp_path, capsys):
    assert train(tmp_path, "--epochs 1 --export torchscript") == 0
    assert "earlier weights" not in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert "earlier weights" not in capsys.readouterr().err  # they are the same
    assert main(["train", "--resume", str(tmp_path), "--epochs", "2"]) == 0
    message = "network.ts has earlier weights; --export torchscript writes it again"
    assert message in capsys.readouterr().err
    assert (
        main(["train", "--resume", str(tmp_path), "--epochs", "3", "--export", "torchscript"]) == 0
    )
    assert "earlier weights" not in capsys.readouterr().err


def test_a_large_loss_keeps_its_column(train, tmp_path, capsys):
    assert train(tmp_path, "--epochs 1 --lr 1e3") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    1")]
    assert len(rows) == 1 and re.fullmatch(r" {4}1 {2}\d\.\d{4}e\+\d\d +\d+\.\d+%.*", rows[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch-size 16", r"--batch-size 16: .* was trained with 32, and only --epochs"),
        ("--lr 0.2", r"--lr 0.2: .* was trained with 0.02"),
        ("--momentum 0", r"--momentum 0.0: .* was trained with 0.9"),
        ("--seed 1", r"--seed 1: .* was trained with 0"),
        ("--model fused", r"--model fused: .* was trained with stock"),
        ("--data digits", r"was trained with other data: their checksum is \d+, .* is \d+"),
        ("--epochs 1", r"--epochs 1: .* has 2 epochs behind it"),
    ],
)
def test_resume_with_other_settings(options, message, train, tmp_path, capsys):
    assert train(tmp_path, "--epochs 2") == 0
    capsys.readouterr()
    code = main(["train", "--resume", str(tmp_path), "--epochs", "4", *options.split()])
    assert_error(capsys, code, message)
    assert len(losses(tmp_path)) == 2


def test_resume_from_what_is_no_checkpoint(train, tmp_path, capsys):
    assert train(tmp_path, "--epochs 1") == 0
    capsys.readouterr()
    path = tmp_path / "checkpoint.pt"
    good = path.read_bytes()

    def resume(where):
        return main(["train", "--resume", str(where)])

    assert_error(capsys, resume(tmp_path / "no"), r"no: no such checkpoint")
    assert_error(capsys, resume(tmp_path / "weights.pt"), r"expected \['data_sum'.*'hidden.bias'")
    path.write_bytes(good[: len(good) // 2])
    assert_error(capsys, resume(path), r"checkpoint\.pt: damaged, or not a checkpoint")
    path.write_bytes(b"")
    assert_error(capsys, resume(path), r"checkpoint\.pt: damaged, or not a checkpoint")
    path.write_bytes(good)
    for change, message in (
        ({"settings": {"lr": 0.1}}, r"expected the settings \['batch_size'.*got \{'lr': 0.1\}"),
        ({"epochs": [{"loss": 1}]}, r"not a checkpoint of torchext train"),
        ({"weights": {}}, r"changed\.pt does not fit the network: .*Missing key"),
        ({"optimizer": {}}, r"changed\.pt does not fit the network"),
    ):
        torch.save(load(path) | change, tmp_path / "changed.pt")
        assert_error(capsys, resume(tmp_path / "changed.pt"), message)


def test_a_file_is_never_half_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        run_folder.replace_file(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
