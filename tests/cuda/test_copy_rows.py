# SPDX-License-Identifier: Apache-2.0
"""Strided rows on a GPU are copied to page-locked memory and back without an intermediate contiguous copy."""

from __future__ import annotations

import pytest
import torch

from ckpt_fast.pipeline.memory.device_rows import copy_across

pytestmark = pytest.mark.gpu

SHAPES = [(7, 2, 3, 100), (7, 2, 1, 1), (1, 2, 32, 4096), (448, 2, 32, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex128])
@pytest.mark.parametrize("part", ["gate", "up", "both"])
@pytest.mark.parametrize("to_gpu", [False, True])
def test_views_of_interleaved_rows(
    shape: tuple[int, ...], dtype: torch.dtype, part: str, to_gpu: bool
) -> None:
    memory = torch.arange(torch.Size(shape).numel(), device="cuda").to(dtype).view(shape)
    views = {"gate": memory[:, 0], "up": memory[:, 1], "both": memory.transpose(0, 1)}
    host = torch.zeros(views[part].shape, dtype=dtype, pin_memory=True)
    if to_gpu:
        host.copy_(views[part])
        before = memory.clone()
        views[part].zero_()
        copy_across(views[part], host)
        torch.cuda.synchronize()
        assert torch.equal(memory, before)
    else:
        copy_across(host, views[part])
        torch.cuda.synchronize()
        assert torch.equal(host, views[part].cpu())


@pytest.mark.parametrize("part", ["gate", "both"])
def test_no_memory_of_the_gpu_is_taken(part: str) -> None:
    memory = torch.zeros(448, 2, 32, 4096, dtype=torch.bfloat16, device="cuda")
    view = {"gate": memory[:, 0], "both": memory.transpose(0, 1)}[part]
    host = torch.zeros(view.shape, dtype=view.dtype, pin_memory=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    copy_across(host, view)
    copy_across(view, host)
    assert torch.cuda.max_memory_allocated() == before
