# SPDX-License-Identifier: Apache-2.0
"""De-interleaving one fc1 weight, [14336, 4096] bf16, against torch and against a plain copy of its bytes.

    pytest benchmarks/bench_glu.py

Groups are a device and an interleave size; a group's members move the same 117 MB. The plain copy is the
limit: no permutation is faster than moving the bytes once. ``GB/s`` counts each byte once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ckpt_fast import native, settings
from ckpt_fast.trainer.glu import _deinterleave_glu_tensor

ROWS, WIDTH = 14336, 4096
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def torch_fresh(weight: torch.Tensor, _: torch.Tensor, k: int) -> None:
    """What torch users write: the rival of ``documented_function``."""
    weight.view(-1, 2, k, WIDTH).transpose(0, 1).reshape(ROWS, WIDTH)


def documented_function(weight: torch.Tensor, _: torch.Tensor, k: int) -> None:
    _deinterleave_glu_tensor(weight, k)


def torch_into_reused_output(weight: torch.Tensor, output: torch.Tensor, k: int) -> None:
    """Without the price of fresh memory: the rival of ``native_into_reused_output``."""
    output.view(2, -1, k, WIDTH).copy_(weight.view(-1, 2, k, WIDTH).transpose(0, 1))


def native_into_reused_output(weight: torch.Tensor, output: torch.Tensor, k: int) -> None:
    where = (output.data_ptr(), weight.data_ptr(), ROWS, WIDTH * weight.element_size(), k, False)
    if weight.is_cuda:
        kernels: Any = native.cuda()
        kernels.permute_rows(*where, weight.device.index, torch.cuda.current_stream().cuda_stream)
    else:
        native.permute_rows(*where, settings.io_threads())


def plain_copy(weight: torch.Tensor, output: torch.Tensor, k: int) -> None:
    output.copy_(weight)


@pytest.mark.parametrize("k", [1, 32])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "move",
    [torch_fresh, documented_function, torch_into_reused_output, native_into_reused_output, plain_copy],
)
def test_deinterleave(
    benchmark: Any, move: Callable[[torch.Tensor, torch.Tensor, int], None], device: str, k: int
) -> None:
    if move is native_into_reused_output and device == "cuda" and native.cuda() is None:
        pytest.skip("the CUDA part is not built")
    weight = torch.arange(ROWS * WIDTH, device=device).to(torch.bfloat16).view(ROWS, WIDTH)
    output = torch.zeros_like(weight)

    def measured() -> None:
        move(weight, output, k)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{device}, interleave size {k}"
    benchmark.pedantic(measured, rounds=30, warmup_rounds=5)
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = round(weight.nbytes / benchmark.stats.stats.median / 1e9, 1)
