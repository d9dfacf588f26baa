"""The four files that make a data set in MNIST's layout, found, read and checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from torchext.data.idx import IdxError, read_idx

EMBEDDED = Path(__file__).parent / "digits"
CLASSES = 10


class Digits(NamedTuple):
    """Images and labels to train on, and held-out ones to test on; all uint8."""

    train_images: Tensor  # (N, height, width)
    train_labels: Tensor  # (N,)
    test_images: Tensor  # (M, height, width)
    test_labels: Tensor  # (M,)


def load_digits(data: str | os.PathLike[str] = "digits") -> Digits:
    """Read a data set of digits.

    Args:
        data: ``"digits"``, the 1,797 handwritten digits that come with the package (a folder of
            that name is ``"./digits"``), or a folder with MNIST's four files. Each may be spelled
            ``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte``, plain or ``.gz``.

    Returns:
        The images and labels.

    Raises:
        IdxError: a file is damaged, or the files do not fit together.
        FileNotFoundError: the folder or a file in it is missing.
        NotADirectoryError: ``data`` is a file.
    """
    folder = EMBEDDED if data == "digits" else Path(data)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder")
    paths = [
        _find(folder, part, kind, dims)
        for part in ("train", "t10k")
        for kind, dims in (("images", "idx3"), ("labels", "idx1"))
    ]
    digits = Digits(*(read_idx(path, dims) for path, dims in zip(paths, (3, 1, 3, 1), strict=True)))
    _check_pair(digits.train_images, digits.train_labels, *paths[:2])
    _check_pair(digits.test_images, digits.test_labels, *paths[2:])
    if digits.train_images.shape[1:] != digits.test_images.shape[1:]:
        raise IdxError(
            f"{paths[2]}: its images are {_size(digits.test_images)}, "
            f"those of {paths[0]} are {_size(digits.train_images)}"
        )
    return digits


def _find(folder: Path, part: str, kind: str, dims: str) -> Path:
    names = [f"{part}-{kind}{mark}{dims}-ubyte{end}" for end in ("", ".gz") for mark in "-."]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: none of {', '.join(names)} is there")


def _check_pair(images: Tensor, labels: Tensor, images_path: Path, labels_path: Path) -> None:
    if len(images) != len(labels):
        raise IdxError(
            f"{labels_path}: it has {len(labels)} labels, {images_path} has {len(images)} images"
        )
    wrong = (labels >= CLASSES).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise IdxError(
            f"{labels_path}: labels must be 0 to {CLASSES - 1}, got {int(labels[at])} at index {at}"
        )


def _size(images: Tensor) -> str:
    return " x ".join(str(size) for size in images.shape[1:])
