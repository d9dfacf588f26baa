"""Handwritten digits: IDX files in and out, the embedded set, and batches to train with."""

from torchext.data.batches import Batches, as_input
from torchext.data.dataset import Digits, load_digits
from torchext.data.idx import IdxError, read_idx, write_idx

__all__ = ["Batches", "Digits", "IdxError", "as_input", "load_digits", "read_idx", "write_idx"]
