"""A tiny causal language model, its head stock or ours: loss, time of a step and peak memory.

    python examples/gpt/train.py [--vocabulary 32000] [--steps 20] [--device cpu|cuda]

The head is where a small model with a large vocabulary spends its memory: stock, the logits of
every token, their log-softmax and their gradient. `torchext.nn.LinearCrossEntropyLoss` is
`nn.Linear` and `nn.CrossEntropyLoss` in one, without them. All heads start from the same weights
and see the same batches of a made-up language (each of the 512 words in use has a favourite
successor), so the losses agree. Each head trains in a process of its own, so that its peak memory
is its own.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchext

WORDS = 512  # of the vocabulary, in use
HEADS_OF_ATTENTION = 4


class Block(nn.Module):
    """Attention to what came before, then a network for each token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up = torchext.nn.LinearReLU(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(self.up(self.network_norm(x)))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a norm; the head is not part of it."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, HEADS_OF_ATTENTION) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) to features (B, T, width)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        features: Tensor = self.norm(self.blocks(self.tokens(tokens) + self.places(places)))
        return features


class StockHead(nn.Module):
    """All logits, then their loss."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocabulary, bias=False)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """The mean loss of features (N, width) against tokens (N)."""
        return F.cross_entropy(self.linear(features), target)


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "stock": StockHead,
    "torchext": torchext.nn.LinearCrossEntropyLoss,
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # since 2.13; as it comes, without its chunking options
    HEADS["torch's own"] = nn.LinearCrossEntropyLoss


def sentences(rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Random sentences: a word's favourite successor follows in nine of ten cases."""
    favourite = torch.randperm(WORDS, generator=torch.Generator().manual_seed(1))
    words = torch.randint(WORDS, (rows, tokens), generator=generator)
    follows = torch.rand(rows, tokens, generator=generator) < 0.9
    for t in range(1, tokens):
        words[:, t] = torch.where(follows[:, t], favourite[words[:, t - 1]], words[:, t])
    return words


def peak_mebibytes(device: str) -> float:
    """The most memory so far: the allocator's on a GPU, the process's on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def train(name: str, options: argparse.Namespace) -> str:
    """Trains with one head; returns its row of the table."""
    torch.manual_seed(0)
    model = GPT(options.vocabulary, options.context, options.width, options.layers)
    head = HEADS[name](options.width, options.vocabulary)
    model.to(options.device), head.to(options.device)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.5)
    generator = torch.Generator().manual_seed(2)
    start = peak_mebibytes(options.device)
    times, loss = [], torch.empty(())
    for _ in range(options.steps):
        words = sentences(options.batch, options.context + 1, generator).to(options.device)
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = head(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        value = loss.item()  # waits for a GPU
        times.append(time.perf_counter() - begin)
    step = 1e3 * statistics.median(times[1:] or times)
    grown = peak_mebibytes(options.device) - start
    return f"{name:<16}{value:>10.5f}{step:>12.1f}{grown:>15.0f}"


def main() -> None:
    """Trains with each head in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--head", choices=HEADS, help="train with this head alone")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    options = parser.parse_args()
    if options.vocabulary < WORDS:
        parser.error(f"expected --vocabulary of {WORDS} or more")
    for name in ("context", "layers", "batch", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"expected --{name} of 1 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    if options.width < HEADS_OF_ATTENTION or options.width % HEADS_OF_ATTENTION != 0:
        parser.error(f"expected --width to be a multiple of {HEADS_OF_ATTENTION}")
    if options.head:
        print(train(options.head, options))
        return
    print(
        f"{options.layers} layers of {options.width}, {options.vocabulary:,} words, "
        f"{options.batch} x {options.context} tokens a step, {options.steps} steps, "
        f"{options.device}"
    )
    # Of the memory, what the steps add to the model and its head.
    print(f"{'head':<16}{'loss':>10}{'ms a step':>12}{'peak MiB above':>15}", flush=True)
    for name in HEADS:
        command = [sys.executable, __file__, *sys.argv[1:], "--head", name]
        if (code := subprocess.run(command).returncode) != 0:
            sys.exit(code)


if __name__ == "__main__":
    main()
