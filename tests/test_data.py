"""The IDX reader, the embedded digits, and the batches."""

import gzip
import hashlib
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from torchext.data import Batches, IdxError, as_input, load_digits, read_idx, write_idx
from torchext.data.dataset import EMBEDDED

MAKE_DIGITS = Path(__file__).parent.parent / "scripts" / "make_digits.py"
HASHES = {
    "train-images-idx3-ubyte": "65f03fb8ef8d4bf8936a9030142c71ff15c01d80c38079cfbcca6e66458fc070",
    "train-labels-idx1-ubyte": "3bf5f8ae35654c58c3ccb734dce9c9b267e5b90e01e769f141b43b4eb16e233c",
    "t10k-images-idx3-ubyte": "5cd798280e5f15996b2cfa361554f031ec78d53fc5ffe2cd864754be7881d91f",
    "t10k-labels-idx1-ubyte": "7c196bd7c7b0f59da35b6d5231220eea20bacb40b063125bf7e421e40c4283f2",
}


def header(*sizes, code=8, zeros=b"\0\0"):
    return zeros + bytes([code, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)


def put(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture(params=["plain", "plain.gz"])
def path(request, tmp_path):
    return tmp_path / request.param


@pytest.fixture
def folder(tmp_path):
    """A small data set: 20 images and labels to train on, 10 to test on."""
    digits = load_digits()
    for name, values in zip(HASHES, digits, strict=True):
        write_idx(tmp_path / name, values[: 20 if name.startswith("train") else 10])
    return tmp_path


# ---- IDX files ----


@pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 28, 28), (2, 3, 4, 5), (2_500_001,)])
def test_round_trip(path, shape):
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    write_idx(path, values)
    read = read_idx(path, dims=len(shape))
    assert read.dtype == torch.uint8
    assert torch.equal(read, values)


def test_layout_is_that_of_the_format(tmp_path):
    write_idx(tmp_path / "a", torch.tensor([[1, 2, 3], [4, 5, 255]], dtype=torch.uint8))
    assert (tmp_path / "a").read_bytes() == bytes.fromhex("00000802 00000002 00000003 0102030405ff")


def test_a_transposed_tensor_is_written_in_its_own_order(path):
    values = torch.arange(6, dtype=torch.uint8).view(2, 3).T
    write_idx(path, values)
    assert torch.equal(read_idx(path), values)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (torch.zeros(3), TypeError),
        (torch.tensor(3, dtype=torch.uint8), ValueError),
        (torch.zeros(0, 28, 28, dtype=torch.uint8), ValueError),
    ],
)
def test_what_cannot_be_written(path, values, error):
    with pytest.raises(error, match="write_idx"):
        write_idx(path, values)
    assert not path.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"truncated: the magic number takes 4 bytes, the file has 0"),
        (b"\0\0\x08", r"truncated: the magic number takes 4 bytes, the file has 3"),
        (b"PK\x03\x04" + bytes(20), r"expected magic 0x000008NN, got 0x504b0304"),
        (header(2, zeros=b"\0\x01") + b"ab", r"expected magic 0x000008NN, got 0x00010801"),
        (header(2, code=0x0D) + bytes(8), r"expected type code 0x08 \(uint8\), got 0x0d \(float32"),
        (header(2, code=0x07) + bytes(8), r"expected type code 0x08 \(uint8\), got 0x07 \(unknown"),
        (header() + b"a", r"expected 1 or more dimensions, got 0"),
        (header(2, 3, 4)[:11], r"truncated: the header takes 16 bytes, the file has 11"),
        (header(0, 2**32 - 1, 2**32 - 1), r"holds no values: its sizes are \(0, 4294967295, 42949"),
        (header(2, 3) + bytes(5), r"promises 6 bytes of values, the file has (at most )?5"),
        (header(2, 3) + bytes(8), r"trailing bytes: .* promises 6 bytes of values, .* has 8"),
        (header(2**31, 2**31) + b"a", rf"promises {2**62} bytes of values, the file has at most"),
    ],
)
def test_damaged_file(path, data, message):
    with pytest.raises(IdxError, match=message) as caught:
        read_idx(put(path, data))
    assert str(caught.value).startswith(f"{path}: ")


def test_wrong_number_of_dimensions(path):
    put(path, header(6) + bytes(6))
    with pytest.raises(IdxError, match=r"expected 3 dimensions, got 1 \(magic 0x00000801\)"):
        read_idx(path, dims=3)


def test_a_false_header_takes_no_memory(tmp_path):
    # Within what gzip could expand to, so that only reading shows that it is false.
    data = gzip.compress(header(100_000) + bytes(1000))
    (tmp_path / "a.gz").write_bytes(data + gzip.compress(b"") * 50)
    with pytest.raises(IdxError, match="promises 100000 bytes of values, the file has 1000"):
        read_idx(tmp_path / "a.gz")


@pytest.mark.parametrize("damage", ["cut", "cut trailer", "checksum", "not gzip", "garbage"])
def test_damaged_gzip(tmp_path, damage):
    good = gzip.compress(header(2000) + bytes(range(200)) * 10)
    bad = {
        "cut": good[: len(good) // 2],
        "cut trailer": good[:-3],
        "checksum": good[:-8] + bytes(4) + good[-4:],
        "not gzip": header(2000) + bytes(2000),
        "garbage": good[:30] + b"\xff" * 20 + good[50:],
    }[damage]
    (tmp_path / "a.gz").write_bytes(bad)
    with pytest.raises(IdxError, match=rf"a\.gz: damaged gzip file of {len(bad)} bytes"):
        read_idx(tmp_path / "a.gz")


def test_gzip_without_its_ending_is_named(tmp_path):
    (tmp_path / "a").write_bytes(gzip.compress(header(3) + b"abc"))
    with pytest.raises(IdxError, match=r"got 0x1f8b\w+ \(a gzip file\? its name must then end in"):
        read_idx(tmp_path / "a")


# ---- data sets ----


def test_embedded_digits():
    digits = load_digits()
    assert [tuple(values.shape) for values in digits] == [
        (1500, 28, 28),
        (1500,),
        (297, 28, 28),
        (297,),
    ]
    for images in (digits.train_images, digits.test_images):
        assert images.min() == 0
        assert images.max() == 255
    # Each class has its share of both parts.
    in_train, in_test = digits.train_labels.bincount(), digits.test_labels.bincount()
    assert in_train.tolist() == [149, 152, 148, 153, 151, 152, 151, 149, 145, 150]
    assert in_test.tolist() == [29, 30, 29, 30, 30, 30, 30, 30, 29, 30]


@pytest.mark.parametrize("name", HASHES)
def test_embedded_files_are_the_made_ones(name):
    data = (EMBEDDED / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == HASHES[name]
    assert HASHES[name] in (EMBEDDED / "README.md").read_text()


def test_make_digits_check(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the script needs scikit-learn, the package does not")

    def check(folder):
        monkeypatch.setattr(sys, "argv", ["make_digits.py", "--check", "--out", str(folder)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(MAKE_DIGITS), run_name="__main__")
        return end.value.code

    assert check(EMBEDDED) == 0
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"other")
    assert check(tmp_path) == 1
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["same"] * 4 + ["DIFFERENT"] + ["MISSING"] * 3


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_both_spellings(folder, dotted, compressed):
    expected = load_digits(folder)
    for name in HASHES:
        new = name.replace("-idx", ".idx") if dotted else name
        values = read_idx(folder / name)
        (folder / name).unlink()
        write_idx(folder / (new + ".gz" * compressed), values)
    for values, same in zip(load_digits(folder), expected, strict=True):
        assert torch.equal(values, same)


def test_missing_file_names_every_spelling(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_digits(folder)
    for name in ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"):
        assert f"{name}," in str(caught.value)
        assert f"{name}.gz" in str(caught.value)
    assert str(caught.value).startswith(f"{folder}: ")


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_digits(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="file: not a folder"):
        load_digits(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "train-labels-idx1-ubyte",
            torch.zeros(19, dtype=torch.uint8),
            r"train-labels-idx1-ubyte: it has 19 labels, .*train-images-idx3-ubyte has 20 images",
        ),
        (
            "t10k-images-idx3-ubyte",
            torch.zeros(11, 28, 28, dtype=torch.uint8),
            r"t10k-labels-idx1-ubyte: it has 10 labels, .*t10k-images-idx3-ubyte has 11 images",
        ),
        (
            "t10k-images-idx3-ubyte",
            torch.zeros(10, 28, 20, dtype=torch.uint8),
            r"t10k-images-idx3-ubyte: its images are 28 x 20, those of .*train.* are 28 x 28",
        ),
        (
            "t10k-labels-idx1-ubyte",
            torch.tensor([0, 9, 3, 10, 255, 0, 0, 0, 0, 0], dtype=torch.uint8),
            r"t10k-labels-idx1-ubyte: labels must be 0 to 9, got 10 at index 3",
        ),
        (
            "train-images-idx3-ubyte",
            torch.zeros(20, dtype=torch.uint8),
            r"train-images-idx3-ubyte: expected 3 dimensions, got 1",
        ),
    ],
)
def test_files_that_do_not_fit_together(folder, name, values, message):
    write_idx(folder / name, values)
    with pytest.raises(IdxError, match=message):
        load_digits(folder)


def test_a_folder_called_digits_can_be_reached(folder, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    shutil.copytree(folder, tmp_path / "there" / "digits", ignore=shutil.ignore_patterns("there"))
    monkeypatch.chdir(tmp_path / "there")
    assert len(load_digits("digits").train_labels) == 1500
    assert len(load_digits("./digits").train_labels) == 20
    assert len(load_digits(Path("digits")).train_labels) == 20


# ---- batches ----


def numbered(n, **options):
    """Batches of images whose first pixel, like the label, is their number."""
    images = torch.zeros(n, 2, 2, dtype=torch.uint8)
    images[:, 0, 0] = torch.arange(n)
    return Batches(images, torch.arange(n, dtype=torch.uint8), **options)


def test_as_input_divides_by_255():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    expected = torch.tensor([[value / 255 for value in range(256)]], dtype=torch.float32)
    assert torch.equal(as_input(images), expected)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"), [(10, 5, [5, 5]), (10, 4, [4, 4, 2]), (3, 8, [3]), (2, 1, [1, 1])]
)
def test_every_sample_once(n, batch_size, sizes):
    batches = numbered(n, batch_size=batch_size, seed=0)
    seen = list(batches.epoch(1))
    assert len(batches) == len(sizes)
    assert [len(labels) for _, labels in seen] == sizes
    for images, labels in seen:
        assert images.shape == (len(labels), 4)
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        assert labels.dtype == torch.int64
        assert torch.equal((images[:, 0] * 255).round().long(), labels)
    assert sorted(torch.cat([labels for _, labels in seen]).tolist()) == list(range(n))


def test_order_is_that_of_the_contract():
    batches = numbered(200, batch_size=64, seed=7)
    for epoch in (3, 1, 2, 1):
        order = torch.cat([labels for _, labels in batches.epoch(epoch)])
        generator = torch.Generator().manual_seed(7 + epoch)
        assert torch.equal(order, torch.randperm(200, generator=generator))


def test_global_generator_has_no_part():
    batches = numbered(200, batch_size=200, seed=0)
    torch.manual_seed(1)
    (_, first), *_ = batches.epoch(1)
    state = torch.get_rng_state()
    torch.rand(5)
    (_, second), *_ = batches.epoch(1)
    assert torch.equal(first, second)
    torch.set_rng_state(state)
    list(batches.epoch(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_epoch_loss_weighs_batches_by_their_size():
    batches = numbered(10, batch_size=4, seed=0)
    losses = [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)]
    assert batches.epoch_loss(losses) == (4 * 1.0 + 4 * 2.0 + 2 * 4.0) / 10


def test_batches_reject_wrong_arguments():
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        numbered(3, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="3 images, but 2 labels"):
        Batches(torch.zeros(3, 2, 2), torch.zeros(2), batch_size=1, seed=0)
