# SPDX-License-Identifier: Apache-2.0
"""Random tensors, random partitions of them, and saving them that way."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from ckpt_fast.format.types import Shard, TensorShard
from ckpt_fast.jobs.report import SaveReport
from tests.saves import save

# Every dtype whose tensors are plain bytes in a torch.save archive.
PLAIN_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex128,
    torch.complex64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    *(
        getattr(torch, name)
        for name in (
            "float8_e4m3fn",
            "float8_e4m3fnuz",
            "float8_e5m2",
            "float8_e5m2fnuz",
            "float8_e8m0fnu",
            "float4_e2m1fn_x2",
        )
        if hasattr(torch, name)
    ),
]


class Region(NamedTuple):
    """Part of a tensor: its start and size in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part itself, as a view."""
        for dimension, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            tensor = tensor.narrow(dimension, offset, size)
        return tensor


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return a contiguous tensor of random bytes (random truth values for bool)."""
    generator = torch.Generator().manual_seed(seed)
    numel = math.prod(shape)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(torch.bool)
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return torch.empty(shape, dtype=dtype) if not numel else raw.view(dtype).reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Return the elements in row-major order; equal bytes mean equal tensors, NaNs included."""
    if not tensor.numel():
        return b""
    flat = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw_bytes(a) == raw_bytes(b)


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """A partition: an uneven grid, some of whose cells are split once more."""
    axes = []
    for size in shape:
        edges = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        axes.append([(a, b - a) for a, b in itertools.pairwise(edges)])
    regions = []
    for cell in itertools.product(*axes):
        region = Region(tuple(a for a, _ in cell), tuple(n for _, n in cell))
        regions += draw(_maybe_split(region))
    return draw(st.permutations(regions))


@st.composite
def _maybe_split(draw: st.DrawFn, region: Region) -> list[Region]:
    splittable = [dimension for dimension, size in enumerate(region.sizes) if size > 1]
    if not splittable or draw(st.integers(0, 3)):
        return [region]
    dimension = draw(st.sampled_from(splittable))
    at = draw(st.integers(1, region.sizes[dimension] - 1))
    first, second = list(region.sizes), list(region.sizes)
    first[dimension], second[dimension] = at, region.sizes[dimension] - at
    start = list(region.offsets)
    start[dimension] += at
    return [Region(region.offsets, tuple(first)), Region(tuple(start), tuple(second))]


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """A region to request; sometimes empty, often as wide as the tensor."""
    offsets, sizes = [], []
    for size in shape:
        if draw(st.booleans()):
            offset, end = 0, size
        else:
            offset = draw(st.integers(0, size))
            end = draw(st.integers(offset, size))
        offsets.append(offset)
        sizes.append(end - offset)
    return Region(tuple(offsets), tuple(sizes))


def shards_of(fqn: str, tensor: torch.Tensor, regions: list[Region]) -> list[Shard]:
    return [
        TensorShard(fqn, region.of(tensor).contiguous(), region.offsets, tuple(tensor.shape))
        for region in regions
    ]


def whole(fqn: str, tensor: torch.Tensor) -> TensorShard:
    """Return a tensor that is one piece."""
    return TensorShard(fqn, tensor, (0,) * tensor.dim(), tuple(tensor.shape))


def save_tensors(
    directory: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], **options: object
) -> SaveReport:
    """Save whole tensors on one rank."""
    return save([whole(fqn, tensor) for fqn, tensor in tensors.items()], os.fspath(directory), **options)
