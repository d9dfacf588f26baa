"""Batches for training, the same in every trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def as_input(images: Tensor) -> Tensor:
    """Turn images of bytes into a network's input, float32 from 0 to 1.

    Args:
        images: uint8.  # (N, height, width)

    Returns:
        One row an image.  # (N, height * width)
    """
    return images.flatten(1).to(torch.float32).div_(255)


class Batches:
    """The training set, shuffled anew in each epoch and cut into batches.

    The contract, "the same start, the same batches": a trainer that keeps these rules, in any
    language, sees the same numbers in the same order and prints the same loss.

    1. Start: ``torch.manual_seed(seed)``, then the layers are made in the order in which they are
       applied, with PyTorch's default initialisation and nothing random in between.
    2. Input: the pixels as float32, divided by 255, one row of ``height * width`` an image.
    3. Epochs count from 1. Epoch ``e`` takes the samples in the order ``torch.randperm(n)`` from
       a fresh CPU generator seeded with ``seed + e``.
    4. Batch ``b`` (from 0) is places ``b * batch_size`` up to ``(b + 1) * batch_size`` of that
       order. The last batch is shorter where ``batch_size`` does not divide ``n``; no sample is
       left out.
    5. The loss of an epoch is the sum over its batches, in order and in float64, of the batch's
       mean loss (before its step) times its size, divided by ``n``.

    Args:
        images: uint8.  # (N, height, width)
        labels: uint8.  # (N,)
        batch_size: samples in a batch.
        seed: of the shuffles.
        device: where the batches are.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"Batches: {len(images)} images, but {len(labels)} labels")
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be 1 or more, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self._images = as_input(images.to(device))
        self._labels = labels.to(device, torch.int64)
        # Filled again in each epoch: fresh memory would cost four times the copy.
        self._shuffled = torch.empty_like(self._images)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self._labels) // self.batch_size)

    @property
    def samples(self) -> int:
        """The number of samples in an epoch."""
        return len(self._labels)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffle, and go through the batches.

        The images are views of one tensor which the next call overwrites.

        Args:
            number: the epoch, counted from 1.

        Yields:
            Images and labels of a batch.  # float32 (B, height * width), int64 (B,)
        """
        generator = torch.Generator().manual_seed(self.seed + number)
        order = torch.randperm(self.samples, generator=generator).to(self._labels.device)
        torch.index_select(self._images, 0, order, out=self._shuffled)
        labels = self._labels.index_select(0, order)
        size = self.batch_size
        yield from zip(torch.split(self._shuffled, size), torch.split(labels, size), strict=True)

    def epoch_loss(self, losses: Sequence[Tensor]) -> float:
        """Combine the losses of an epoch's batches.

        Args:
            losses: the mean loss of each batch, in order.

        Returns:
            The mean loss of a sample, as rule 5 has it.
        """
        total = 0.0
        left = self.samples
        for mean in torch.stack(list(losses)).tolist():
            total += mean * min(left, self.batch_size)
            left -= self.batch_size
        return total / self.samples
