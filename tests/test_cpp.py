"""The C++ side: the frontend, the trainer beside Python's, the exported network.

What the tests run is built once, into `build/`, and again only where a source has changed.
"""

import gzip
import os
import re
import shutil
import subprocess
import zipfile

import pytest
import torch
from cpp_tools import PREFIXES, ROOT, need_tools, run
from test_data import header
from training import assert_same, load, losses, metrics, run_train, write_small_data

from torchext.cli import train as train_command
from torchext.cli.loop import make_model
from torchext.data import IdxError, as_input, load_digits, read_idx, write_idx


def build(source, name):
    need_tools()
    folder = ROOT / "build" / name
    run("cmake", "-G", "Ninja", "-S", source, "-B", folder, f"-DCMAKE_PREFIX_PATH={PREFIXES}")
    run("cmake", "--build", folder, "-j", "2")
    return folder


@pytest.fixture(scope="module")
def unit():
    """The unit tests, built. In the source tree, which `find_package` finds."""
    return build(ROOT / "tests" / "cpp", "cpp-tests")


@pytest.fixture(scope="module")
def programs():
    """The examples, built as `make train-cpp` does."""
    return build(ROOT / "examples" / "cpp", "cpp")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(programs, data, tmp_path, monkeypatch):
    """Runs a trainer with the same options, in either language; returns its folder."""
    monkeypatch.setattr(train_command, "save_plot", lambda folder, epochs: False)

    def train(language, options="", model="fused", out=None):
        out = tmp_path / (out or f"{language}-{model}")
        if language == "python":
            assert run_train(data, out, options, model) == 0
        else:
            given = ["--data", data, "--batch-size", 32, "--model", model, "--out", out]
            run(programs / "train", *given, *options.split())
        return out

    return train


# ---- the frontend ----


def test_frontend(unit):
    assert re.search(r"^(\d+) of \1 tests passed$", run(unit / "test_frontend"), re.MULTILINE)


def test_no_python_in_the_process(unit, programs):
    for program in (unit / "test_frontend", programs / "train", programs / "predict"):
        assert "python" not in " ".join(re.findall(r"^\s*(\S+)", run("ldd", program), re.MULTILINE))


# ---- the trainer beside Python's ----


@pytest.mark.parametrize(
    "options",
    [
        # Not every setting: with a large learning rate training is chaotic, and a hidden unit that
        # is 0 but for rounding goes one way or the other.
        "--data digits --batch-size 100",  # the defaults: 30 epochs
        "--seed 1 --epochs 15",
        "--data digits --batch-size 100 --epochs 30 --lr 0.01 --seed 3",
        "--epochs 8 --lr 0.1 --momentum 0",
        "--epochs 3 --batch-size 1",
        "--epochs 3 --batch-size 4096 --seed 4294967295",
    ],
)
def test_losses_are_pythons(train, options):
    """The same options, the same losses: C++ and Python, fused and stock."""
    expected = metrics(train("python", options, "stock"))
    for language, model in (("python", "fused"), ("c++", "fused"), ("c++", "stock")):
        found = metrics(train(language, options, model))
        for row, other in zip(found["epochs"], expected["epochs"], strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), (language, model)
            assert row["test_accuracy"] == other["test_accuracy"]


@pytest.mark.parametrize("options", ["--epochs 30", "--epochs 10 --seed 7 --momentum 0"])
def test_stock_is_pythons_to_the_bit(train, options):
    """The same arithmetic, so that even a chaotic training is the same."""
    options += " --data digits --batch-size 100 --device cpu"
    python, cpp = train("python", options, "stock"), train("c++", options, "stock")
    assert losses(python) == losses(cpp)
    assert_same(load(python / "weights.pt"), load(cpp / "weights.pt"))


def test_what_a_training_leaves(train, data):
    python, cpp = train("python", "--epochs 2 --device cpu"), train("c++", "--epochs 2")
    assert {path.name for path in cpp.iterdir()} == {"metrics.json", "weights.pt"}
    expected, written = metrics(python), metrics(cpp)
    assert written.keys() == expected.keys()
    assert written["settings"] == {
        **expected["settings"],
        "out": str(cpp),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    for row, other in zip(written["epochs"], expected["epochs"], strict=True):
        assert {k: type(v) for k, v in row.items()} == {k: type(v) for k, v in other.items()}
        assert row["seconds"] > 0


def test_what_it_prints(programs, data, tmp_path):
    out = tmp_path / "a folder" / "of runs"
    printed = run(programs / "train", "--data", data, "--epochs=2", "--out", out).splitlines()
    assert "784-64-10, fused, on " in printed[0]
    assert "130 images to train on, 50 to test on, 2 steps an epoch" in printed[0]
    assert printed[1].split() == ["epoch", "loss", "test", "acc.", "seconds", "images/s"]
    for line, row in zip(printed[2:4], metrics(out)["epochs"], strict=True):
        number, loss, right, *_ = line.split()
        assert (number, loss) == (str(row["epoch"]), f"{row['loss']:.6f}")
        assert right == f"{row['test_accuracy']:.2%}"
    assert printed[4].startswith(f"test accuracy {metrics(out)['epochs'][-1]['test_accuracy']:.2%}")


@pytest.mark.parametrize("model", ["fused", "stock"])
def test_python_loads_the_weights(train, data, model):
    out = train("c++", "--epochs 3", model)
    weights = load(out / "weights.pt")
    network = make_model("stock")
    assert {k: v.dtype for k, v in weights.items()} == {
        k: v.dtype for k, v in network.state_dict().items()
    }
    network.load_state_dict(weights, strict=True)
    digits = load_digits(data)
    right = (network(as_input(digits.test_images)).argmax(1) == digits.test_labels).double().mean()
    assert metrics(out)["epochs"][-1]["test_accuracy"] == float(right)


@pytest.mark.parametrize("language", ["python", "c++"])
def test_it_loads_the_weights(train, language):
    """A second training goes on where the weights of the first are."""
    first = train(language, "--epochs 3 --momentum 0")
    second = train("c++", f"--momentum 0 --epochs 1 --weights {first / 'weights.pt'}", out="second")
    assert losses(second)[0] < losses(first)[-1] < losses(first)[0]
    network = make_model("stock")
    network.load_state_dict(load(first / "weights.pt"))
    still = train("c++", f"--lr 1e-30 --epochs 1 --weights {first / 'weights.pt'}", out="still")
    for name, value in load(still / "weights.pt").items():
        assert torch.equal(value, network.state_dict()[name])


# ---- wrong options and files: one line, exit code 2 ----


def assert_refused(message, *command, prefix="train: error: "):
    error = run(*command, code=2)
    assert error.count("\n") == 1
    assert error.startswith(prefix)
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 0", r"argument --epochs: expected a whole number from 1 to 2147483647, got '0'"),
        ("--epochs 1.5", r"argument --epochs: expected a whole number .* got '1.5'"),
        ("--batch-size -1", r"argument --batch-size: expected a whole number from 1 .* got '-1'"),
        ("--batch-size 99999999999999999999", r"argument --batch-size: expected a whole number"),
        ("--lr 0", r"argument --lr: expected a number above 0, got '0'"),
        ("--lr nan", r"argument --lr: expected a number above 0, got 'nan'"),
        ("--lr=", r"argument --lr: expected a number above 0, got ''"),
        ("--momentum 1", r"argument --momentum: expected a number from 0 up to 1, without 1, got"),
        ("--seed 4294967296", r"argument --seed: expected a whole number from 0 to 4294967295"),
        ("--model torch", r"argument --model: invalid choice: 'torch'"),
        ("--device tpu", r"argument --device: invalid choice: 'tpu'"),
        ("--epoch 3", r"unrecognized arguments: --epoch"),
        ("3", r"unrecognized arguments: 3"),
        ("--lr", r"argument --lr: expected one argument"),
        ("--lr --seed 3", r"argument --lr: expected one argument"),
        ("--data /nowhere", r"/nowhere: no such folder"),
        ("--data /dev/null", r"/dev/null: not a folder"),
        ("--weights /nowhere", r"/nowhere: cannot be opened"),
        ("--out /dev/null/out", r"/dev/null/out: Not a directory"),
    ],
)
def test_wrong_option(programs, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert_refused(message, programs / "train", *options.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(programs):
    assert_refused(r"--device cuda: .* finds no CUDA device", programs / "train", "--device=cuda")


def test_help(programs):
    printed = " ".join(run(programs / "train", "--help").split())
    for name in ("data", "epochs", "batch-size", "lr", "momentum", "seed", "model", "device"):
        default = getattr(train_command.Settings, name.replace("-", "_"))
        assert re.search(rf"--{name} .*\(default: {re.escape(str(default))}\)", printed)


DAMAGED = {
    "empty": b"",
    "short magic": b"\0\0\x08",
    "zip": b"PK\x03\x04" + bytes(20),
    "floats": header(2, code=0x0D) + bytes(8),
    "unknown type": header(2, code=0x07) + bytes(8),
    "no dimension": header() + b"a",
    "dimensions": header(6) + bytes(6),
    "short header": header(2, 3, 4)[:11],
    "size 0": header(0, 2**32 - 1, 2**32 - 1),
    "short": header(2, 3, 4) + bytes(23),
    "long": header(2, 3, 4) + bytes(26),
    "huge": header(2**31, 2**29, 2) + b"a",
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_reader_refuses_what_pythons_refuses(unit, tmp_path, damage, end):
    """In the same words, but for the bytes that it does not count to the end."""
    path = tmp_path / f"file{end}"
    path.write_bytes(gzip.compress(DAMAGED[damage]) if end else DAMAGED[damage])
    with pytest.raises(IdxError) as caught:
        read_idx(path, 3)
    done = subprocess.run(
        [unit / "read_idx", path, "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    same = re.compile(r"(the file has) (at most |more than )?\d+$")
    assert same.sub(r"\1", done.stdout.strip()) == same.sub(r"\1", str(caught.value))


def other_labels(folder, name, change):
    labels = read_idx(folder / name).clone()
    write_idx(folder / name, change(labels))


FOLDERS = {
    "a missing file": lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(),
    "fewer labels": lambda folder: other_labels(folder, "train-labels-idx1-ubyte", lambda x: x[1:]),
    "no digit": lambda folder: other_labels(folder, "t10k-labels-idx1-ubyte", lambda x: x + 5),
    "two sizes": lambda folder: write_idx(
        folder / "t10k-images-idx3-ubyte.gz", torch.ones(50, 8, 8, dtype=torch.uint8)
    ),
    "cut short": lambda folder: os.truncate(folder / "train-images-idx3-ubyte.gz", 5000),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_damaged_data(programs, tmp_path, damage):
    folder = write_small_data(tmp_path)
    FOLDERS[damage](folder)
    with pytest.raises((OSError, IdxError)) as caught:
        load_digits(folder)
    said = re.escape(str(caught.value)) if damage != "cut short" else "damaged gzip file of 5000"
    assert_refused(said, programs / "train", "--data", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_of_another_size(programs, tmp_path):
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", torch.ones(3, 8, 8, dtype=torch.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", torch.ones(3, dtype=torch.uint8))
    message = r"expected images of 784 pixels, got 64"
    assert_refused(message, programs / "train", "--data", tmp_path, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: [], r"not a dictionary of weights"),
        (lambda weights: {**weights, "output.bias": 3}, r"it has no tensor output.bias"),
        (lambda weights: {"hidden.weight": weights["hidden.weight"]}, r"no tensor hidden.bias"),
        (
            lambda weights: {**weights, "output.bias": torch.ones(11)},
            r"output.bias has shape \[11\], the network's has \[10\]",
        ),
        (None, r"damaged, or not a file of weights"),
    ],
)
def test_wrong_weights(programs, tmp_path, change, message):
    path, out = tmp_path / "weights.pt", tmp_path / "out"
    good = dict(make_model("stock").state_dict())
    torch.save(change(good) if change else good, path)
    if not change:
        os.truncate(path, path.stat().st_size // 2)
    assert_refused(rf"{path}: .*{message}", programs / "train", "--weights", path, "--out", out)
    assert not out.exists()


def test_diverging_training(programs, tmp_path):
    error = run(programs / "train", "--epochs=2", "--lr=1e30", "--out", tmp_path / "out", code=1)
    assert re.fullmatch(r"train: error: the loss became (nan|inf) in epoch 1: try .*--lr\n", error)


# ---- the exported network ----


@pytest.fixture(scope="module", params=["torchscript", "aoti"])
def exported(request, data, tmp_path_factory):
    """What `torchext train --export` left, and the network's file."""
    need_tools()
    out = tmp_path_factory.mktemp(request.param)
    assert run_train(data, out, f"--epochs 2 --export {request.param}", "fused") == 0
    return out, out / {"torchscript": "network.ts", "aoti": "network.pt2"}[request.param]


def test_predictions_are_pythons(programs, data, exported, tmp_path):
    out, path = exported
    network = make_model("fused")
    network.load_state_dict(load(out / "weights.pt"))
    images = load_digits(data).test_images
    expected = [str(int(digit)) for digit in network(as_input(images)).argmax(1)]
    assert run(programs / "predict", "--data", data, path).split() == expected

    # Another number of images at a time.
    shutil.copytree(data, tmp_path / "one")
    write_idx(tmp_path / "one" / "t10k-images-idx3-ubyte.gz", images[:1])
    write_idx(tmp_path / "one" / "t10k-labels-idx1-ubyte", load_digits(data).test_labels[:1])
    assert run(programs / "predict", "--data", tmp_path / "one", path).split() == expected[:1]


def test_the_fused_op_stays_in_the_graph(exported):
    _, path = exported
    with zipfile.ZipFile(path) as archive:
        members = [archive.read(name) for name in archive.namelist()]
    assert any(b"torchext.linear_relu_forward" in member for member in members) or any(
        b"torchext::linear_relu_forward" in member for member in members
    )


def test_wrong_network(programs, data, exported, tmp_path):
    predict = programs / "predict"
    assert_refused(r"usage: predict", predict, prefix="predict: error: ")
    missing = tmp_path / f"no{exported[1].suffix}"
    assert_refused(r"no\.\w+: no such file", predict, missing, prefix="predict: error: ")
    cut = tmp_path / exported[1].name
    cut.write_bytes(exported[1].read_bytes()[:-2000])
    message = rf"{cut}: damaged, or not an exported network: \S"
    assert_refused(message, predict, "--data", data, cut, prefix="predict: error: ")
    shutil.copy(exported[0] / "weights.pt", cut)
    assert_refused(message, predict, "--data", data, cut, prefix="predict: error: ")
