"""What ``torchext train`` trains: the network, its loss and optimiser, and the data."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchext
from torchext.data import Batches, Digits, as_input

Loss = Callable[[Tensor, Tensor], Tensor]

PIXELS, HIDDEN, CLASSES = 784, 64, 10
_TEST_BATCH = 10_000


class Trainer:
    """784-64-10 and its data on a device, ready to train.

    The fused and the stock model have the same parameters under the same names and start from the
    same values; see ``torchext.data.Batches`` for what a trainer must do to print the same loss.

    Args:
        digits: the data; images of 784 pixels.
        model: ``"fused"`` for torchext's layers, ``"stock"`` for PyTorch's.
        batch_size: samples in a step.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        seed: of the weights and batches.
        device: where to train.
    """

    def __init__(
        self,
        digits: Digits,
        *,
        model: str,
        batch_size: int,
        lr: float,
        momentum: float,
        seed: int,
        device: str,
    ) -> None:
        torch.manual_seed(seed)
        self.model = make_model(model).to(device)
        self.loss = _fused_loss(self.model) if model == "fused" else _stock_loss(self.model)
        sgd = torchext.optim.SGD if model == "fused" else torch.optim.SGD
        self.optimizer = sgd(self.model.parameters(), lr=lr, momentum=momentum)
        self.batches = Batches(
            digits.train_images,
            digits.train_labels,
            batch_size=batch_size,
            seed=seed,
            device=device,
        )
        self._test_images = as_input(digits.test_images.to(device))
        self._test_labels = digits.test_labels.to(device, torch.int64)

    def train_epoch(self, number: int, after_step: Callable[[], object]) -> float:
        """Train for an epoch.

        Args:
            number: the epoch, counted from 1.
            after_step: called after each step.

        Returns:
            The mean loss of a sample.
        """
        loss_of, optimizer = self.loss, self.optimizer
        losses: list[Tensor] = []
        for images, labels in self.batches.epoch(number):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(images, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())  # .item() would wait for a GPU in every step
            after_step()
        return self.batches.epoch_loss(losses)

    @torch.no_grad()
    def test_accuracy(self) -> float:
        """Return the share of held-out images that get their label, 0 to 1."""
        right = 0
        for images, labels in zip(
            torch.split(self._test_images, _TEST_BATCH),
            torch.split(self._test_labels, _TEST_BATCH),
            strict=True,
        ):
            right += int((self.model(images).argmax(1) == labels).sum())
        return right / len(self._test_labels)

    def weights(self) -> dict[str, Tensor]:
        """Copy the network's ``state_dict`` to the CPU, as a plain dict."""
        state = self.model.state_dict()
        return {name: value.to("cpu", copy=True) for name, value in state.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """Copy the optimiser's ``state_dict``."""
        return copy.deepcopy(self.optimizer.state_dict())

    def restore(self, weights: dict[str, Tensor], optimizer_state: dict[str, Any]) -> None:
        """Go back to an earlier state.

        Args:
            weights: from ``weights``.
            optimizer_state: from ``optimizer_state``.
        """
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer_state)


def make_model(model: str) -> nn.Sequential:
    """Make 784-64-10.

    Args:
        model: ``"fused"`` for torchext's layers, ``"stock"`` for PyTorch's.

    Returns:
        The network; its parameters' names and start do not depend on ``model``.
    """
    if model == "stock":
        layers = [
            ("hidden", nn.Linear(PIXELS, HIDDEN)),
            ("relu", nn.ReLU()),
            ("output", nn.Linear(HIDDEN, CLASSES)),
        ]
    else:
        layers = [
            ("hidden", torchext.nn.LinearReLU(PIXELS, HIDDEN)),
            ("output", nn.Linear(HIDDEN, CLASSES)),
        ]
    return nn.Sequential(OrderedDict(layers))


def _stock_loss(model: nn.Sequential) -> Loss:
    loss_function = nn.CrossEntropyLoss()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = loss_function(model(images), labels)
        return result

    return loss


def _fused_loss(model: nn.Sequential) -> Loss:
    """The last layer and the loss in one op: two autograd nodes for the whole network."""
    hidden, output = model
    assert isinstance(output, nn.Linear)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = torchext.linear_cross_entropy(
            hidden(images), output.weight, labels, linear_bias=output.bias
        )
        return result

    return loss
