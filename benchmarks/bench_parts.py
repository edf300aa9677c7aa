# SPDX-License-Identifier: Apache-2.0
"""Measure each step of a save and a load: the cost per byte, and per tensor for 10 000 small ones.

    pytest benchmarks/bench_parts.py

``CKPT_FAST_BENCH_TENSORS`` and ``CKPT_FAST_BENCH_MB`` make it smaller.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import states
import torch
from hardware import limits

from ckpt_fast import native, settings
from ckpt_fast.format import manifest
from ckpt_fast.format.archive import tensor_archive
from ckpt_fast.format.types import Shard, TensorRequest, TensorShard
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from ckpt_fast.pipeline.save.encode import WriteProgram
from ckpt_fast.pipeline.save.parts import Share
from ckpt_fast.pipeline.save.plan import item_records, plan_save
from ckpt_fast.pipeline.save.save import Save
from ckpt_fast.pipeline.save.sealed import encode_metadata
from ckpt_fast.pipeline.save.stage import stage

TENSORS = int(os.environ.get("CKPT_FAST_BENCH_TENSORS", "10000"))
TENSOR_NBYTES = 27_000
BLOCK_NBYTES = int(os.environ.get("CKPT_FAST_BENCH_MB", "256")) << 20


@pytest.fixture(scope="module")
def shards() -> list[Shard]:
    state = states.many_tensors(TENSORS * TENSOR_NBYTES / 1e9, TENSOR_NBYTES)
    return [TensorShard(name, t, (0,) * t.dim(), tuple(t.shape)) for name, t in state.items()]


@pytest.fixture(scope="module")
def block() -> torch.Tensor:
    return torch.ones(BLOCK_NBYTES, dtype=torch.uint8)


@pytest.fixture
def in_memory() -> Any:
    """Return a directory on an in-memory file system if there is one."""
    root = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    path = root / f"ckpt_fast-bench-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


# --- per byte ----------------------------------------------------------------------------------------------


def measure_bytes(benchmark: Any, group: str, nbytes: int, work: Callable[[], Any]) -> None:
    benchmark.group = group
    benchmark.pedantic(work, rounds=10, warmup_rounds=2)
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = round(nbytes / benchmark.stats.stats.median / 1e9, 2)


@pytest.mark.parametrize("function", ["native", "zlib"])
def test_crc32(benchmark: Any, block: torch.Tensor, function: str) -> None:
    memory = block.numpy()
    work = {
        "native": lambda: native.crc32(block.data_ptr(), block.nbytes),
        "zlib": lambda: zlib.crc32(memory),
    }
    assert work["native"]() == zlib.crc32(memory)
    measure_bytes(benchmark, "CRC-32", block.nbytes, work[function])


@pytest.mark.parametrize("function", ["copy_crc32", "memcpy"])
def test_copy(benchmark: Any, block: torch.Tensor, function: str) -> None:
    copy = torch.zeros_like(block)
    where = (copy.data_ptr(), block.data_ptr(), block.nbytes)
    move = {"copy_crc32": native.copy_crc32, "memcpy": ctypes.memmove}[function]
    measure_bytes(benchmark, "copy, one thread", block.nbytes, lambda: move(*where))


@pytest.mark.parametrize("function", ["write_files", "pwrite"])
def test_write(benchmark: Any, block: torch.Tensor, in_memory: Path, function: str) -> None:
    """Write one file without streams or patches, as native.write_files sees it; pwrite is the limit."""
    threads = settings.io_threads()
    piece = dict(
        zip(
            ("piece_file", "piece_offset", "piece_nbytes", "piece_address", "piece_digest"),
            (array("q", [value]) for value in (0, 0, block.nbytes, block.data_ptr(), 0)),
            strict=True,
        )
    )
    none = array("q")
    path = str(in_memory / "file")
    work = {
        "write_files": lambda: native.write_files(
            [path], file_nbytes=array("q", [block.nbytes]), **piece,
            patch_file=none, patch_offset=none, patch_digest=none, digest_count=1,
            threads=threads, chunk_bytes=settings.chunk_bytes(), direct=False, fsync=False,
        ),
        "pwrite": limits.buffered_writer(in_memory / "raw", [block], limits.Threads(threads)),
    }  # fmt: skip

    def fresh() -> None:
        for file in in_memory.iterdir():
            file.unlink()

    benchmark.group = "write to memory"
    benchmark.pedantic(work[function], setup=fresh, rounds=10, warmup_rounds=2)
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = round(block.nbytes / benchmark.stats.stats.median / 1e9, 2)


@pytest.mark.parametrize("function", ["read_extents", "read_extents, checked", "memcpy"])
def test_read(benchmark: Any, block: torch.Tensor, in_memory: Path, function: str) -> None:
    """Read one file from the page cache into warm memory; a memcpy with as many threads is the limit."""
    (in_memory / "file").write_bytes(block.numpy().tobytes())
    into, threads = torch.zeros_like(block), settings.io_threads()

    place = [array("q", [value]) for value in (0, 0, block.nbytes)]
    none = array("q")

    def read(*ranges: Any) -> None:
        file, offset, nbytes = place
        range_file, range_offset, range_nbytes, range_block = ranges
        native.read_extents(
            [str(in_memory / "file")],
            extent_file=file,
            extent_offset=offset,
            extent_nbytes=nbytes,
            extent_address=array("q", [into.data_ptr()]),
            range_file=range_file,
            range_offset=range_offset,
            range_nbytes=range_nbytes,
            range_block=range_block,
            threads=threads,
            chunk_bytes=settings.chunk_bytes(),
            direct=False,
        )

    work = {
        "read_extents": lambda: read(none, none, none, none),
        "read_extents, checked": lambda: read(*place, array("q", [manifest.BLOCK_NBYTES])),
        "memcpy": limits.copier([into], [block], limits.Threads(threads)),
    }
    measure_bytes(benchmark, "read from memory", block.nbytes, work[function])


# --- per tensor --------------------------------------------------------------------------------------------


def measure_tensors(benchmark: Any, work: Callable[..., Any], **options: Any) -> None:
    benchmark.group = f"{TENSORS} tensors of {TENSOR_NBYTES // 1000} KB"
    benchmark.pedantic(work, rounds=5, warmup_rounds=1, **options)
    if benchmark.stats is not None:
        benchmark.extra_info["us per tensor"] = round(benchmark.stats.stats.median / TENSORS * 1e6, 2)


def test_plan_save(benchmark: Any, shards: list[Shard]) -> None:
    measure_tensors(benchmark, lambda: plan_save(shards, "__0_", 2))


def test_plan_save_of_new_shapes(benchmark: Any, shards: list[Shard]) -> None:
    """Plan a first save, for which no archive layout is cached yet."""
    tensors = [
        TensorShard(f"{n}", torch.empty(n + 1, dtype=torch.uint8), (0,), (n + 1,)) for n in range(len(shards))
    ]
    measure_tensors(benchmark, lambda: plan_save(tensors, "__0_", 2), setup=tensor_archive.cache_clear)


def test_stage(benchmark: Any, shards: list[Shard]) -> None:
    files = plan_save(shards, "__0_", 2)
    measure_tensors(benchmark, lambda: stage(files))


def test_stage_snapshot(benchmark: Any, shards: list[Shard]) -> None:
    files = plan_save(shards, "__0_", 2)
    measure_tensors(benchmark, lambda: stage(files, snapshot=True))


def test_write_program(benchmark: Any, shards: list[Shard]) -> None:
    files = plan_save(shards, "__0_", 2)
    staged = stage(files)
    measure_tensors(benchmark, lambda: WriteProgram(files, staged))


def test_encode_metadata(benchmark: Any, shards: list[Shard]) -> None:
    records = item_records(plan_save(shards, "__0_", 2))
    measure_tensors(benchmark, lambda: encode_metadata(records))


def test_item_records(benchmark: Any, shards: list[Shard]) -> None:
    files = plan_save(shards, "__0_", 2)
    measure_tensors(benchmark, lambda: item_records(files))


def save(shards: list[Shard], path: Path) -> None:
    job = Save(str(path), lambda: Share(shards))
    job.stage()
    job.write()
    job.commit()


def test_whole_save(benchmark: Any, shards: list[Shard], in_memory: Path) -> None:
    measure_tensors(benchmark, lambda: save(shards, in_memory))


def test_checkpoint_index(benchmark: Any, shards: list[Shard], in_memory: Path) -> None:
    save(shards, in_memory)
    measure_tensors(benchmark, lambda: CheckpointIndex(str(in_memory)))


def test_whole_load(benchmark: Any, shards: list[Shard], in_memory: Path) -> None:
    save(shards, in_memory)
    requests = [
        TensorRequest(s.fqn, torch.zeros_like(s.tensor), s.offsets)
        for s in shards
        if isinstance(s, TensorShard)
    ]
    measure_tensors(benchmark, lambda: load_tensors(CheckpointIndex(str(in_memory)), requests))
