# SPDX-License-Identifier: Apache-2.0
"""The tensor functions: every path returns the bytes that torch's own views do, in memory of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.glu.model import (
    _apply_glu_interleave_to_tensor_data,
    _deinterleave_glu_tensor,
    _interleave_glu_tensor,
)
from ckpt_fast.glu.rows import contiguous_view

DTYPES = [
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
PATHS = ["engine", "fallback", "torch"]


class Subclassed(torch.Tensor):
    """A tensor whose memory only torch may interpret."""


@contextlib.contextmanager
def taking(path: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, CKPT_FAST_NATIVE="0" if path == "fallback" else "1"):
        yield


def on_path(path: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(Subclassed) if path == "torch" else tensor


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bits, NaNs included; a bool has only two values."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def by_views(tensor: torch.Tensor, k: int, interleave: bool) -> torch.Tensor:
    """The definition, in torch operations."""
    pairs = tensor.shape[0] // (2 * k)
    split = (2, pairs, k) if interleave else (pairs, 2, k)
    return tensor.reshape(*split, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape).clone()


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()
    return plain.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None)
@given(
    k=st.integers(1, 6),
    pairs=st.integers(0, 7),
    rest=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from(DTYPES),
    interleave=st.booleans(),
)
def test_same_bits_as_views_and_back(
    path: str, k: int, pairs: int, rest: list[int], dtype: torch.dtype, interleave: bool
) -> None:
    tensor = random_tensor((2 * k * pairs, *rest), dtype)
    before = bits(tensor)
    with taking(path):
        result = _apply_glu_interleave_to_tensor_data(on_path(path, tensor), k, interleave)
        restored = _apply_glu_interleave_to_tensor_data(result, k, not interleave)
    assert (result.shape, result.dtype, result.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert bits(result) == bits(by_views(tensor, k, interleave))
    assert bits(restored) == bits(tensor) == before


@pytest.mark.parametrize("path", PATHS)
def test_worked_example(path: str) -> None:
    contiguous = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    interleaved = torch.tensor([0, 1, 10, 11, 2, 3, 12, 13])
    with taking(path):
        assert _interleave_glu_tensor(on_path(path, contiguous), 2).tolist() == interleaved.tolist()
        assert _deinterleave_glu_tensor(on_path(path, interleaved), 2).tolist() == contiguous.tolist()


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_every_alignment(path: str) -> None:
    storage = random_tensor((4096,), torch.uint8)
    with taking(path):
        for offset in range(17):
            for row_nbytes in (1, 2, 3, 7, 8, 15, 16, 48, 80):
                tensor = storage[offset : offset + 24 * row_nbytes].view(24, row_nbytes)
                result = _interleave_glu_tensor(on_path(path, tensor), 3)
                assert bits(result) == bits(by_views(tensor, 3, True))


@settings(deadline=None)
@given(
    k=st.integers(1, 5),
    pairs=st.integers(0, 6),
    rest=st.lists(st.integers(0, 4), max_size=2),
    side=st.integers(0, 2),
    cut=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_views_are_the_rows_of_the_contiguous_order(
    k: int, pairs: int, rest: list[int], side: int, cut: tuple[int, int]
) -> None:
    tensor = random_tensor((2 * k * pairs, *rest), torch.int32)
    expected = _deinterleave_glu_tensor(tensor, k)
    first, count = (0, 2 * k * pairs)
    if side < 2:
        begin, end = sorted(min(at, pairs) for at in cut)
        first, count = k * (side * pairs + begin), k * (end - begin)
    view = contiguous_view(tensor, k, first, count)
    assert view is not None and view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert torch.equal(view.reshape(count, *rest), expected[first : first + count])


@pytest.mark.parametrize(("first", "count"), [(0, 3), (1, 2), (2, 4), (0, 6)])
def test_rows_that_have_no_view(first: int, count: int) -> None:
    assert contiguous_view(torch.zeros(8, 3), 2, first, count) is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("permute", [_interleave_glu_tensor, _deinterleave_glu_tensor])
@pytest.mark.parametrize("k", [4, 2, 1], ids=["one pair, nothing moves", "two pairs", "single rows"])
def test_result_has_memory_of_its_own(path: str, permute: object, k: int) -> None:
    tensor = torch.arange(24.0).reshape(8, 3)
    before = tensor.clone()
    with taking(path):
        result = permute(on_path(path, tensor), k)  # type: ignore[operator]
    result.fill_(-1.0)
    assert torch.equal(tensor, before)
    assert result.is_contiguous()


@pytest.mark.parametrize(
    "strided",
    [
        torch.arange(48.0).reshape(6, 8).t(),
        torch.arange(96.0).reshape(16, 6)[::2],
        torch.arange(64.0).reshape(8, 8)[:, 1:6],
        torch.arange(8.0)[:, None].expand(8, 5),
        torch.arange(8 * 3 * 2 * 2.0).reshape(8, 3, 2, 2).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "every second row", "columns", "expanded", "channels last"],
)
@pytest.mark.parametrize("interleave", [True, False])
def test_strided_inputs(strided: torch.Tensor, interleave: bool) -> None:
    result = _apply_glu_interleave_to_tensor_data(strided, 2, interleave)
    assert torch.equal(result, by_views(strided, 2, interleave))
    assert result.is_contiguous()


@pytest.mark.parametrize("path", PATHS)
def test_lazy_conjugates_and_negatives_are_seen_as_they_read(path: str) -> None:
    tensor = random_tensor((8, 3), torch.complex64, seed=1).nan_to_num()
    with taking(path):
        for lazy in (tensor.conj(), tensor.conj().imag):
            result = _interleave_glu_tensor(on_path(path, lazy), 2)
            assert bits(result) == bits(by_views(lazy, 2, True))
            assert not result.is_conj() and not result.is_neg()


@pytest.mark.parametrize("path", PATHS)
def test_parameters_give_plain_values(path: str) -> None:
    parameter = torch.nn.Parameter(torch.arange(16.0).reshape(8, 2))
    with taking(path):
        result = _deinterleave_glu_tensor(on_path(path, parameter), 2)
    assert not result.requires_grad and result.grad_fn is None and not isinstance(result, torch.nn.Parameter)
    assert torch.equal(result.as_subclass(torch.Tensor), by_views(parameter.detach(), 2, False))


def test_devices_without_memory() -> None:
    result = _interleave_glu_tensor(torch.empty(8, 3, device="meta", dtype=torch.bfloat16), 2)
    assert (result.shape, result.dtype, result.device.type) == ((8, 3), torch.bfloat16, "meta")


@pytest.mark.parametrize("permute", [_interleave_glu_tensor, _deinterleave_glu_tensor])
@pytest.mark.parametrize(
    ("tensor", "k", "kinds", "text"),
    [
        (torch.zeros(6, 5), 2, RuntimeError, r"shape \(6, 5\) is no multiple of twice .* size 2"),
        (torch.zeros(4), 4, RuntimeError, r"shape \(4,\) is no multiple"),
        (torch.tensor(1.0), 1, IndexError, "without dimensions"),
        (torch.zeros(8), 0, ValueError, "size is 0, but must be at least 1"),
        (torch.zeros(8), -2, ValueError, "size is -2"),
    ],
)
def test_impossible_layouts_are_named(
    permute: object, tensor: torch.Tensor, k: int, kinds: type[Exception], text: str
) -> None:
    with pytest.raises(kinds, match=text) as caught:
        permute(tensor, k)  # type: ignore[operator]
    assert isinstance(caught.value, CheckpointMismatchError)


def test_interleave_size_must_be_whole() -> None:
    with pytest.raises(TypeError):
        _interleave_glu_tensor(torch.zeros(8), 2.0)  # type: ignore[arg-type]
