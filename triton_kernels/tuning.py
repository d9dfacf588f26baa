"""Which block sizes a matrix product takes: measured once for each shape, and remembered.

Triton's autotuner measures the configurations below at the first call of a shape (rows count by
their power of two, so that the last batch of an epoch is not measured again), and keeps the result
in memory and in Triton's cache on disk. That first call waits for the device. While a CUDA graph is
captured nothing can be measured: a shape that is not known yet takes the first configuration (so do
all with TORCHEXT_TRITON_AUTOTUNE=0: results are the same, time is not).

Within a dtype all configurations add up in the same steps: `Family.fixed`.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torchext.triton_kernels.common import INTERPRETED

_MEASURES = os.environ.get("TORCHEXT_TRITON_AUTOTUNE", "1") != "0"


class Family(NamedTuple):
    """The configurations of kernels of one build, by the bytes of an element, and their key."""

    key: tuple[str, ...]
    """The arguments whose values tell shapes apart."""
    fixed: dict[int, dict[str, int]]
    """What all configurations of a dtype share: what the order of a sum depends on."""
    varied: dict[int, tuple[tuple[dict[str, int], int, int], ...]]
    """The others, warps and stages; the first is the default."""
    interpreted: dict[str, int]
    """One small block: the interpreter's time goes by the number of programs and elements."""


def _blocks(m: int, n: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n}


# What scripts/compile_triton.py shows to spill is not here.
GEMM = Family(
    ("m_key", "n_size", "k_size", "left_k", "right_n"),
    {size: {"BLOCK_K": k, "GROUP_M": 8} for size, k in ((2, 64), (4, 16), (8, 16))},
    {
        2: (
            (_blocks(128, 128), 8, 3), (_blocks(64, 64), 4, 4), (_blocks(128, 64), 8, 3),
            (_blocks(64, 128), 4, 3), (_blocks(128, 256), 8, 3),
        ),
        4: ((_blocks(64, 64), 8, 3), (_blocks(128, 64), 8, 3), (_blocks(64, 128), 8, 3)),
        8: ((_blocks(32, 32), 4, 2), (_blocks(64, 32), 4, 2)),
    },
    {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2},
)  # fmt: skip
"""A product of two matrices."""
TILES = Family(
    ("tuned_size", "features", "classes", "input_k", "weight_k"),
    {
        2: {"BLOCK_STEP": 64, "BLOCK_K": 64},
        4: {"BLOCK_STEP": 32, "BLOCK_K": 16},
        8: {"BLOCK_STEP": 16, "BLOCK_K": 16},
    },
    {
        2: (({"BLOCK_OWN": 64}, 8, 3), ({"BLOCK_OWN": 128}, 8, 3), ({"BLOCK_OWN": 64}, 8, 2)),
        4: (({"BLOCK_OWN": 64}, 8, 3), ({"BLOCK_OWN": 32}, 4, 3)),
        8: (({"BLOCK_OWN": 32}, 4, 2),),
    },
    {"BLOCK_OWN": 16, "BLOCK_STEP": 32, "BLOCK_K": 16},
)
"""A product of a matrix and a tile that is itself a product."""


def configurations(family: Family, element_size: int) -> list[triton.Config]:
    """The configurations for a dtype of that many bytes."""
    return [
        triton.Config({**blocks, **family.fixed[element_size]}, num_warps=warps, num_stages=stages)
        for blocks, warps, stages in family.varied[element_size]
    ]


def _fitting(
    configs: list[triton.Config], named: dict[str, Any], **constants: Any
) -> list[triton.Config]:
    """The configurations that do not spill on the GPU that is here.

    The largest blocks of a product need Hopper's, whose operands take no registers; on Blackwell,
    whose sums come out of a memory of their own, those of a product of a product spill.
    """
    arch = triton.runtime.driver.active.get_current_target().arch
    most = {"BLOCK_N": 256 if arch >= 90 else 128, "BLOCK_OWN": 128 if arch < 100 else 64}
    return [c for c in configs if all(c.kwargs.get(name, 0) <= most[name] for name in most)]


_tuners: dict[tuple[Any, ...], Any] = {}


def tuned(kernel: Any, family: Family, element_size: int) -> Any:
    """The kernel with its autotuner for a dtype of that many bytes."""
    key = (kernel, element_size)
    if key not in _tuners:
        _tuners[key] = triton.autotune(
            configurations(family, element_size),
            key=list(family.key),
            prune_configs_by={"early_config_prune": _fitting},
            cache_results=True,
        )(kernel)
    return _tuners[key]


_measured: set[tuple[Any, ...]] = set()


def choose(
    kernel: Any, like: Tensor, arguments: tuple[Any, ...], family: Family = GEMM
) -> tuple[Any, dict[str, Any]]:
    """Returns what to launch for these arguments, and the constants to give it beside them."""
    if INTERPRETED:
        return kernel, dict(family.interpreted)
    tuner = tuned(kernel, family, like.element_size())
    names = tuner.arg_names
    key = (
        kernel,
        like.dtype,
        *(value for name, value in zip(names, arguments, strict=False) if name in family.key),
        *(argument is None for argument in arguments),
    )
    if key not in _measured and (
        not _MEASURES or (like.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        first = tuner.configs[0]
        return kernel, first.all_kwargs()
    _measured.add(key)
    return tuner, {}
