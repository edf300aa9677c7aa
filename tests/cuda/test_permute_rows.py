# SPDX-License-Identifier: Apache-2.0
"""The row permutation on a GPU, against torch's views of the same rows."""

from __future__ import annotations

import threading
from array import array
from types import ModuleType

import pytest
import torch

from ckpt_fast import native
from ckpt_fast.glu.model import (
    _deinterleave_glu_tensor,
    _interleave_glu_tensor,
    _process_state_dict_for_glu_interleaving,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.complex128]


def kernels() -> ModuleType:
    module = native.cuda()
    assert module is not None
    return module


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda", generator=generator)


def by_views(tensor: torch.Tensor, k: int, interleave: bool) -> torch.Tensor:
    pairs = tensor.shape[0] // (2 * k)
    split = (2, pairs, k) if interleave else (pairs, 2, k)
    return tensor.reshape(*split, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape).clone()


def permute(destination: torch.Tensor, source: torch.Tensor, k: int, interleave: bool) -> None:
    row_nbytes = source.nbytes // source.shape[0]
    stream = torch.cuda.current_stream().cuda_stream
    row = (destination.data_ptr(), source.data_ptr(), source.shape[0], row_nbytes, k)
    columns = [array("q", [value]) for value in row]
    kernels().permute_rows(*columns, interleave, torch.cuda.current_device(), stream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24,), (24, 1), (24, 5), (1536, 4096), (24, 3, 7), (0, 4), (24, 0)])
@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("interleave", [True, False])
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...], k: int, interleave: bool) -> None:
    count = torch.Size(shape).numel() * dtype.itemsize
    data = random_bytes(count) & 1 if dtype is torch.bool else random_bytes(count)
    tensor = data.view(dtype).reshape(shape)
    function = _interleave_glu_tensor if interleave else _deinterleave_glu_tensor
    result = function(tensor, k)
    assert (result.dtype, result.shape, result.device) == (dtype, tensor.shape, tensor.device)
    assert torch.equal(result.view(torch.uint8), by_views(tensor, k, interleave).view(torch.uint8))


def test_every_alignment_and_no_byte_outside() -> None:
    for row_nbytes in (1, 2, 3, 6, 8, 12, 16, 80, 8192):
        for to_offset, from_offset in [(0, 0), (1, 1), (2, 2), (4, 4), (8, 8), (3, 5), (0, 1), (16, 4)]:
            size = 24 * row_nbytes
            source = random_bytes(size + 32)[from_offset : from_offset + size].view(24, row_nbytes)
            around = torch.full((size + 64,), 165, dtype=torch.uint8, device="cuda")
            destination = around[to_offset : to_offset + size]
            permute(destination, source, 3, True)
            assert torch.equal(destination, by_views(source, 3, True).flatten())
            assert torch.all(around[:to_offset] == 165) and torch.all(around[to_offset + size :] == 165)


@pytest.mark.parametrize("count", [1, 95, 96, 97, 200])
@pytest.mark.parametrize("interleave", [True, False])
def test_many_tensors_at_once(count: int, interleave: bool) -> None:
    """Of different widths, some empty, in one launch and in several."""
    sources, columns = [], [array("q") for _ in range(5)]
    for i in range(count):
        k, row_nbytes = i % 5 + 1, (i * 37) % 97 if i % 3 else 4096
        sources.append(random_bytes(2 * k * (i % 7) * row_nbytes, i).view(2 * k * (i % 7), row_nbytes))
    results = [torch.zeros_like(source) for source in sources]
    for i, (source, result) in enumerate(zip(sources, results, strict=True)):
        row = (result.data_ptr(), source.data_ptr(), source.shape[0], source.shape[1], i % 5 + 1)
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    stream = torch.cuda.current_stream().cuda_stream
    kernels().permute_rows(*columns, interleave, torch.cuda.current_device(), stream)
    for i, (source, result) in enumerate(zip(sources, results, strict=True)):
        expected = by_views(source, i % 5 + 1, interleave) if source.numel() else source
        assert torch.equal(result, expected)


def test_nothing_to_do() -> None:
    kernels().permute_rows(*(array("q") for _ in range(5)), True, 0, 0)


@pytest.mark.parametrize("pinned", ["destination", "source"])
def test_pinned_host_memory(pinned: str) -> None:
    source = random_bytes(1024 * 48).view(1024, 48)
    expected = by_views(source, 4, True).cpu()
    if pinned == "source":
        source, destination = source.cpu().pin_memory(), torch.empty_like(source)
    else:
        destination = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
    permute(destination, source, 4, True)
    torch.cuda.synchronize()
    assert torch.equal(destination.cpu(), expected)


def test_work_is_ordered_on_the_current_stream() -> None:
    """On a side stream, rows are read after the stream's earlier work, and the call does not wait."""
    tensor = torch.zeros(4096, 8192, dtype=torch.bfloat16, device="cuda")
    values = torch.arange(4096, device="cuda", dtype=torch.bfloat16).view(-1, 1).expand_as(tensor)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _interleave_glu_tensor(tensor, 32)  # loads the kernel and fills the stream's memory pool
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        tensor.copy_(values)
        result = _interleave_glu_tensor(tensor, 32)
        busy = not stream.query()
    assert busy, "the call waited for the stream"
    stream.synchronize()
    assert torch.equal(result, by_views(tensor, 32, True))


def test_call_returns_to_the_callers_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    tensor = torch.arange(64.0, device="cuda:1").view(16, 4)
    assert torch.equal(_interleave_glu_tensor(tensor, 2), by_views(tensor, 2, True))
    assert torch.cuda.current_device() == 0


def test_threads_without_a_context_of_their_own() -> None:
    source = random_bytes(4096 * 64).view(4096, 64)
    results: list[torch.Tensor] = []
    worker = threading.Thread(target=lambda: results.append(_interleave_glu_tensor(source, 8)))
    worker.start()
    worker.join()
    torch.cuda.synchronize()
    assert torch.equal(results[0], by_views(source, 8, True))


@pytest.mark.parametrize("offset", [0, 1])
def test_more_than_2_to_the_31_elements(offset: int) -> None:
    rows, width = (1 << 17) + 64, (1 << 14) + 48
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * rows * width:
        pytest.skip("not enough memory on the GPU")
    storage = torch.empty(rows * width + offset, dtype=torch.uint8, device="cuda").random_(0, 256)
    source = storage[offset:].view(rows, width)
    destination = torch.empty(rows, width, dtype=torch.uint8, device="cuda")
    permute(destination, source, 32, True)
    assert destination.numel() > 1 << 31
    halves = source.view(2, rows // 64, 32, width)
    blocks = destination.view(rows // 64, 2, 32, width)
    for half in (0, 1):
        assert torch.equal(blocks[:, half], halves[half])


def test_a_layer_of_experts_is_one_launch() -> None:
    names = [f"decoder.layers.0.mlp.experts.linear_fc1.weight{number}" for number in range(64)]
    state = {name: random_bytes(256 * 64, seed).view(256, 64) for seed, name in enumerate(names)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = _process_state_dict_for_glu_interleaving(state, 32)
        torch.cuda.synchronize()
    kernels_run = [event for event in profile.events() if "permute_rows_kernel" in event.name]
    assert len(kernels_run) == 1
    assert all(torch.equal(result[name], by_views(state[name], 32, True)) for name in names)
