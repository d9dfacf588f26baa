"""IDX, the format of the MNIST files: reading with every check, and writing.

A file is two zero bytes, a type code, the number of dimensions, each dimension as a big-endian
32-bit integer, then the values. Only bytes (type code 0x08) are taken, which is what MNIST has.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

_UINT8 = 0x08
_OTHER_CODES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_CHUNK = 1 << 20
_GZIP_LIMIT = 1032  # deflate cannot shrink by a larger factor


class IdxError(ValueError):
    """An IDX file, or a set of them, is not what it has to be. The message names the file."""


def read_idx(path: str | os.PathLike[str], dims: int | None = None) -> Tensor:
    """Read an IDX file of bytes, plain or (if its name ends in ``.gz``) compressed.

    The header is believed only as far as the file bears it out: no more memory is taken than the
    file has bytes.

    Args:
        path: the file.
        dims: how many dimensions it must have: 3 for images, 1 for labels. Any by default.

    Returns:
        The values, uint8, in the header's shape.

    Raises:
        IdxError: wrong magic number, another type than bytes, another number of dimensions, a size
            of 0, fewer or more bytes than the header promises, or damaged compression.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    compressed = path.suffix == ".gz"
    on_disk = path.stat().st_size
    with gzip.open(path) if compressed else path.open("rb") as stream:
        file = cast(BinaryIO, stream)
        try:
            shape = _read_header(file, path, dims)
            # A compressed file tells its true size only at the end: this is an upper bound.
            most = on_disk * _GZIP_LIMIT if compressed else on_disk
            values = _read_values(file, path, math.prod(shape), most - 4 - 4 * len(shape))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise IdxError(f"{path}: damaged gzip file of {on_disk} bytes: {error}") from error
    return torch.frombuffer(values, dtype=torch.uint8).view(shape)


def write_idx(path: str | os.PathLike[str], values: Tensor) -> None:
    """Write a tensor of bytes as an IDX file, compressed if its name ends in ``.gz``.

    Args:
        path: the file to write.
        values: uint8, 1 to 255 dimensions.

    Raises:
        TypeError: ``values`` is not uint8.
        ValueError: ``values`` is empty or has no dimension.
    """
    if values.dtype != torch.uint8:
        raise TypeError(f"write_idx: values must be torch.uint8, got {values.dtype}")
    if not 1 <= values.dim() <= 255:
        raise ValueError(f"write_idx: values must have 1 to 255 dimensions, got {values.dim()}")
    if not values.numel():
        raise ValueError(f"write_idx: values must not be empty, got shape {tuple(values.shape)}")
    header = bytes([0, 0, _UINT8, values.dim()])
    header += b"".join(size.to_bytes(4, "big") for size in values.shape)
    data = bytearray(values.numel())
    torch.frombuffer(data, dtype=torch.uint8).copy_(values.detach().flatten())
    path = Path(path)
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(header)
        file.write(data)


def _read_header(file: BinaryIO, path: Path, dims: int | None) -> list[int]:
    magic = file.read(4)
    if len(magic) < 4:
        raise IdxError(
            f"{path}: truncated: the magic number takes 4 bytes, the file has {len(magic)}"
        )
    number = int.from_bytes(magic, "big")
    if magic[:2] != b"\0\0":
        hint = " (a gzip file? its name must then end in .gz)" if magic[:2] == b"\x1f\x8b" else ""
        raise IdxError(
            f"{path}: not an IDX file: expected magic 0x000008NN, got {number:#010x}{hint}"
        )
    if magic[2] != _UINT8:
        what = _OTHER_CODES.get(magic[2], "unknown")
        raise IdxError(f"{path}: expected type code 0x08 (uint8), got {magic[2]:#04x} ({what})")
    if magic[3] == 0 or dims not in (None, magic[3]):
        expected = "1 or more" if dims is None else dims
        raise IdxError(
            f"{path}: expected {expected} dimensions, got {magic[3]} (magic {number:#010x})"
        )
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise IdxError(
            f"{path}: truncated: the header takes {4 + 4 * magic[3]} bytes, "
            f"the file has {4 + len(sizes)}"
        )
    shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
    if 0 in shape:
        raise IdxError(f"{path}: holds no values: its sizes are {tuple(shape)}")
    return shape


def _read_values(file: BinaryIO, path: Path, expected: int, most: int) -> bytearray:
    """Read ``expected`` bytes, which must be all that is left; ``most`` is all that can be."""
    if expected > most:
        raise IdxError(
            f"{path}: truncated: the header promises {expected} bytes of values, "
            f"the file has at most {most}"
        )
    values = bytearray()
    while chunk := file.read(min(_CHUNK, expected + 1 - len(values))):
        values += chunk
    if len(values) < expected:
        raise IdxError(
            f"{path}: truncated: the header promises {expected} bytes of values, "
            f"the file has {len(values)}"
        )
    if len(values) > expected:
        surplus = len(values) - expected
        while chunk := file.read(_CHUNK):
            surplus += len(chunk)
        raise IdxError(
            f"{path}: trailing bytes: the header promises {expected} bytes of values, "
            f"the file has {expected + surplus}"
        )
    return values
