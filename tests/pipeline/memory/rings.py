# SPDX-License-Identifier: Apache-2.0
"""Saves whose copies go through a small ring of host memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast.format.types import ObjectShard, Shard
from ckpt_fast.pipeline.memory import device_copy
from ckpt_fast.pipeline.memory.host_buffer import HostBuffer, HostBufferPool
from ckpt_fast.pipeline.save import program as program_module
from ckpt_fast.pipeline.save import ring as ring_module
from ckpt_fast.pipeline.save import stage as stage_module
from tests.pipeline.layouts import random_tensor, whole
from tests.pipeline.memory.simulated_gpu import SimulatedGpu, install
from tests.saves import save

KIB = 1024
SLAB = 8 * KIB


class WatchedPool(HostBufferPool):
    """Records the lengths asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def take(self, nbytes: int, *args: Any, **options: Any) -> HostBuffer:
        self.asked.append(nbytes)
        return super().take(nbytes, *args, **options)


def small_ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchedPool]:
    """Small slabs, small chunks, small tensors gathered."""
    watched = WatchedPool()
    for module in (stage_module, program_module):
        monkeypatch.setattr(module, "host_buffers", watched)
    monkeypatch.setattr(ring_module, "SLAB_NBYTES", SLAB)
    monkeypatch.setattr(device_copy, "SMALL_NBYTES", 512)
    monkeypatch.setenv("CKPT_FAST_CHUNK", "4K")
    monkeypatch.setenv("CKPT_FAST_THREADS", "2")
    yield watched
    assert watched.used_nbytes == 0


def on_gpu(patch: pytest.MonkeyPatch, seed: int = 0) -> SimulatedGpu:
    """From now on every tensor is on a GPU."""
    simulated = SimulatedGpu(seed)
    install(patch, simulated)
    for module in (stage_module, program_module):
        patch.setattr(module, "needs_copy", lambda tensor, snapshot: True)
    return simulated


def state(sizes: Sequence[int], seed: int = 0) -> list[Shard]:
    """Tensors of the given numbers of elements, of several dtypes, one transposed, and an object."""
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex128]
    shards: list[Shard] = [
        whole(f"w{number}", random_tensor((size,), dtype, seed + number))
        for number, (size, dtype) in enumerate(zip(sizes, itertools.cycle(dtypes), strict=False))
    ]
    shards.append(whole("transposed", random_tensor((30, 20), torch.float32, seed).t()))
    shards.append(ObjectShard("object", b"PK\3\4 of an object"))
    return shards


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.distcp"))}


def expected(shards: Sequence[Shard], directory: Path, writers: int = 1) -> dict[str, bytes]:
    """What a save of tensors that are read in place writes."""
    save(shards, str(directory), writers=writers)
    return contents(directory)
