"""Which block sizes a matrix product takes: measured once for each shape, and remembered.

Triton's autotuner measures the configurations below at the first call of a shape (rows count by
their power of two, so that the last batch of an epoch is not measured again), and keeps the result
in memory and in Triton's cache on disk. That first call waits for the device. While a CUDA graph is
captured nothing can be measured: a shape that is not known yet takes the first configuration.

Within a dtype all configurations have one BLOCK_K: they add up in the same steps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torchext.triton_kernels.common import INTERPRETED

# BLOCK_M, BLOCK_N, warps, stages; the first is the default. What scripts/compile_triton.py shows to
# spill is not here.
_BLOCKS = {
    2: ((128, 128, 8, 3), (64, 64, 4, 4), (128, 64, 8, 3), (64, 128, 4, 3), (128, 256, 8, 3)),
    4: ((64, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    8: ((32, 32, 4, 2), (64, 32, 4, 2)),
}
_BLOCK_K = {2: 64, 4: 16, 8: 16}
_KEY = ["m_key", "n_size", "k_size", "left_k", "right_n"]


def configurations(element_size: int) -> list[triton.Config]:
    """The configurations for a dtype of that many bytes."""
    k = _BLOCK_K[element_size]
    return [
        triton.Config(
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8},
            num_warps=warps,
            num_stages=stages,
        )
        for m, n, warps, stages in _BLOCKS[element_size]
    ]


def _fitting(
    configs: list[triton.Config], named: dict[str, Any], **constants: Any
) -> list[triton.Config]:
    """The largest blocks need Hopper's products, whose operands take no registers."""
    arch = triton.runtime.driver.active.get_current_target().arch
    return [c for c in configs if arch >= 90 or c.kwargs["BLOCK_N"] < 256]


@cache
def tuned(kernel: Any, element_size: int) -> Any:
    """The kernel with its autotuner for a dtype of that many bytes."""
    return triton.autotune(
        configurations(element_size),
        key=_KEY,
        prune_configs_by={"early_config_prune": _fitting},
        cache_results=True,
    )(kernel)


_measured: set[tuple[Any, ...]] = set()


def choose(kernel: Any, like: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """Returns what to launch for these arguments, and the constants to give it beside them."""
    if INTERPRETED:  # one small block: its time goes by the number of programs and elements
        sizes = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2}
        return kernel, sizes
    tuner = tuned(kernel, like.element_size())
    names = tuner.arg_names
    key = (
        like.dtype,
        *(value for name, value in zip(names, arguments, strict=False) if name in _KEY),
        arguments[1] is None,
    )
    if like.is_cuda and key not in _measured and torch.cuda.is_current_stream_capturing():
        first = tuner.configs[0]
        return kernel, first.all_kwargs()
    _measured.add(key)
    return tuner, {}
