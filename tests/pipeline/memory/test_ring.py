# SPDX-License-Identifier: Apache-2.0
"""Synchronous saves whose copies go through a ring of host memory: the same files, in little memory."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_fast import native
from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.format.types import TensorShard
from ckpt_fast.pipeline.memory import gpu
from ckpt_fast.pipeline.save import ring as ring_module
from ckpt_fast.pipeline.save import stage as stage_module
from ckpt_fast.pipeline.save import waves as waves_module
from ckpt_fast.pipeline.save import write as write_module
from ckpt_fast.pipeline.save.plan import plan_save
from ckpt_fast.pipeline.save.program import ProgramCache
from ckpt_fast.pipeline.save.ring import Ring, Source
from ckpt_fast.settings import Settings
from tests.pipeline.layouts import random_tensor, whole
from tests.pipeline.memory.rings import KIB, SLAB, WatchedPool, contents, expected, on_gpu, small_ring, state
from tests.saves import new_save, save

pytestmark = pytest.mark.usefixtures("no_fsync", "native_impl")


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchedPool]:
    yield from small_ring(monkeypatch)


@given(
    sizes=st.lists(st.sampled_from([0, 1, 100, 1000, 1024, 5000, 20_000]), max_size=12),
    writers=st.integers(1, 5),
    threads=st.integers(1, 3),
    chunk=st.sampled_from(["4K", "8K", "64K"]),
    slab=st.sampled_from([1, 4 * KIB, 20 * KIB]),
    direct=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_the_files_are_the_same(
    sizes: list[int], writers: int, threads: int, chunk: str, slab: int, direct: bool, seed: int
) -> None:
    shards = state([*sizes, 9000])
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_FAST_CHUNK", chunk)
        patch.setenv("CKPT_FAST_THREADS", str(threads))
        patch.setenv("CKPT_FAST_DIRECT", str(int(direct)))
        patch.setattr(ring_module, "SLAB_NBYTES", slab)
        wanted = expected(shards, Path(root, "in place"), writers)
        on_gpu(patch, seed)
        save(shards, f"{root}/ring", writers=writers)
        assert contents(Path(root, "ring")) == wanted


@given(
    sizes=st.lists(st.sampled_from([0, 1, 100, 1000, 1024, 5000, 20_000]), max_size=12),
    writers=st.integers(1, 5),
    threads=st.integers(1, 3),
    chunk=st.sampled_from(["4K", "64K"]),
    bound=st.integers(1, 300 * KIB),
    direct=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_a_background_save_within_a_bound(
    sizes: list[int], writers: int, threads: int, chunk: str, bound: int, direct: bool
) -> None:
    """The files are the same, without what changes after the call; the next save executes a program."""
    shards, programs = state([*sizes, 9000]), ProgramCache()
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_FAST_CHUNK", chunk)
        patch.setenv("CKPT_FAST_THREADS", str(threads))
        patch.setenv("CKPT_FAST_DIRECT", str(int(direct)))
        for number in range(2):
            wanted = expected(shards, Path(root, f"in place {number}"), writers)
            directory = Path(root, f"ring {number}")
            job = new_save(
                shards, str(directory), snapshot=True, host_buffer=bound, writers=writers, programs=programs
            )
            job.stage()
            for shard in shards:
                if isinstance(shard, TensorShard):
                    shard.tensor.zero_()
            job.write()
            job.commit()
            assert contents(directory) == wanted
            assert len(programs) == 1


def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool) -> None:
    shards = state([100_000, 50, 200_000])
    wanted = expected(shards, tmp_path / "in place")
    on_gpu(monkeypatch)
    report = save(shards, str(tmp_path / "ring"))
    assert contents(tmp_path / "ring") == wanted
    assert max(pool.asked) <= 4 * SLAB
    assert report.host_memory_allocated <= 4 * SLAB and report.staged_nbytes > 800_000
    assert report.files == 1


def test_what_fits_is_copied_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    on_gpu(monkeypatch)
    report = save(state([2000]), str(tmp_path))
    assert len(pool.asked) == 1 and pool.asked[0] >= report.staged_nbytes


def test_tensors_are_not_looked_at_if_all_of_them_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save of thousands of small ones costs what it did."""
    files = plan_save(state([100] * 20), "__0_", 1)
    monkeypatch.setattr(stage_module, "needs_copy", lambda *arguments, **options: pytest.fail("looked at"))
    assert stage_module.find_ring(files, Settings.read(), bound=None, snapshot=False) is None


def test_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool) -> None:
    """Less memory than the usual ring has: a smaller one, and still one file."""
    monkeypatch.setattr(ring_module, "SLAB_NBYTES", 1 << 20)
    shards = state([50_000, 50_000])
    wanted = expected(shards, tmp_path / "in place")
    on_gpu(monkeypatch)
    report = save(shards, str(tmp_path / "ring"), host_buffer=40 * KIB)
    assert contents(tmp_path / "ring") == wanted
    assert max(pool.asked) <= 40 * KIB and report.files == 1


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_tensor_that_is_not_contiguous(tmp_path: Path, pool: WatchedPool, snapshot: bool) -> None:
    """Runs of 4 bytes. It is cut between rows."""
    shards = [whole(f"w{n}", random_tensor((100, 90), torch.float32, n).t()) for n in range(4)]
    wanted = expected(shards, tmp_path / "at once")
    pool.asked.clear()
    report = save(shards, str(tmp_path / "ring"), host_buffer=80 * KIB, snapshot=snapshot)
    assert contents(tmp_path / "ring") == wanted
    assert report.files == 1 and max(pool.asked) <= 80 * KIB


def test_rows_longer_than_the_bound(tmp_path: Path, pool: WatchedPool) -> None:
    """As much memory as they need, and no more than that."""
    shards = [whole(f"w{n}", random_tensor((3000, 4), torch.float64, n).t()) for n in range(6)]
    wanted = expected(shards, tmp_path / "at once")
    pool.asked.clear()
    save(shards, str(tmp_path / "ring"), host_buffer=10 * KIB, snapshot=True)
    assert contents(tmp_path / "ring") == wanted
    assert max(pool.asked) < 6 * 96 * KIB


def test_later_saves_execute_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    programs = ProgramCache()
    for number in range(3):
        shards = state([30_000, 10, 500, 40_000], seed=number * 100)
        with pytest.MonkeyPatch.context() as patch:
            wanted = expected(shards, tmp_path / f"in place {number}")
            pool.asked.clear()
            on_gpu(patch)
            if number:
                patch.setattr(waves_module, "plan_save", lambda *a, **k: pytest.fail("it was planned again"))
            save(shards, str(tmp_path / str(number)), programs=programs)
        assert contents(tmp_path / str(number)) == wanted
        assert max(pool.asked) <= 4 * SLAB and len(programs) == 1


def test_a_program_of_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches come in the order that the program was made for, whatever the settings have become."""
    shards, programs = state([30_000, 20_000, 25_000, 40_000]), ProgramCache()
    wanted = expected(shards, tmp_path / "in place", writers=4)
    on_gpu(monkeypatch)
    for number, (threads, chunk) in enumerate([("1", "4K"), ("4", "64K")]):
        monkeypatch.setenv("CKPT_FAST_THREADS", threads)
        monkeypatch.setenv("CKPT_FAST_CHUNK", chunk)
        save(shards, str(tmp_path / str(number)), programs=programs, writers=4)
        assert contents(tmp_path / str(number)) == wanted


@pytest.mark.parametrize("gathers_first", [True, False])
def test_a_program_of_copies_that_were_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathers_first: bool
) -> None:
    """Small tensors have their places, whether they are gathered now or not (``CKPT_FAST_NATIVE``)."""
    shards, programs = state([100, 5000, 50, 30_000, 10, 20_000, 60]), ProgramCache()
    wanted = expected(shards, tmp_path / "in place")
    on_gpu(monkeypatch)
    for number in range(2):
        gathers = gathers_first == (number == 0)
        monkeypatch.setattr(gpu, "can_gather", lambda tensor, is_so=gathers: is_so and tensor.is_contiguous())
        save(shards, str(tmp_path / str(number)), programs=programs)
        assert contents(tmp_path / str(number)) == wanted


def test_a_write_that_failed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = state([100_000])
    wanted = expected(shards, tmp_path / "in place")
    on_gpu(monkeypatch)
    failed, write_files = [], native.write_files

    def failing(paths: list[str], **options: Any) -> Any:
        if len(failed) < 2:
            failed.append(paths)
            with pytest.raises(OSError, match="cancel"):
                options["supply"].end()
                write_files(paths, **options)
            raise OSError(errno.EIO, os.strerror(errno.EIO), paths[0])
        return write_files(paths, **options)

    monkeypatch.setattr(native, "write_files", failing)
    monkeypatch.setattr(write_module, "_FIRST_DELAY_S", 0.001)
    save(shards, str(tmp_path / "ring"))
    assert len(failed) == 2 and contents(tmp_path / "ring") == wanted


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copying thread ends with the write that will never make room."""
    on_gpu(monkeypatch)
    monkeypatch.setenv("CKPT_FAST_RETRIES", "0")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(CheckpointWriteError, match="File too large"):
            save(state([100_000, 100_000]), str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.glob("*.distcp"))


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("batch", [0, 3, 9])
def test_a_copy_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, snapshot: bool
) -> None:
    on_gpu(monkeypatch)
    copy_tensors, made = ring_module.copy_tensors, itertools.count()

    def failing(*arguments: Any) -> Any:
        if next(made) == batch:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return copy_tensors(*arguments)

    monkeypatch.setattr(ring_module, "copy_tensors", failing)
    with pytest.raises(CheckpointError, match="an illegal memory access"):
        save(state([100_000]), str(tmp_path), snapshot=snapshot, host_buffer=4 * SLAB)
    assert not list(tmp_path.glob("*.distcp"))


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 6])
def test_ctrl_c_between_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, snapshot: bool
) -> None:
    on_gpu(monkeypatch)
    copy_tensors, made = ring_module.copy_tensors, itertools.count()

    def interrupted(*arguments: Any) -> Any:
        copied = copy_tensors(*arguments)
        if next(made) == batch:
            raise KeyboardInterrupt
        return copied

    monkeypatch.setattr(ring_module, "copy_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(state([100_000]), str(tmp_path), snapshot=snapshot, host_buffer=4 * SLAB)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of a background save waits for room as long as it may, not forever."""
    monkeypatch.setenv("CKPT_FAST_TIMEOUT", "1")
    going_on = threading.Event()
    write_files = native.write_files
    monkeypatch.setattr(native, "write_files", lambda *a, **k: (going_on.wait(30), write_files(*a, **k))[1])
    job = new_save(state([100_000]), str(tmp_path), snapshot=True, host_buffer=4 * SLAB)
    job.stage()
    threading.Timer(0.3, going_on.set).start()
    job.write()
    with pytest.raises(CheckpointError, match="did not end within the 1 s that CKPT_FAST_TIMEOUT allows"):
        job.commit()


def test_what_training_does_after_a_background_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    """All is copied when the call returns, though not yet written."""
    shards = state([30_000, 100, 50_000])
    wanted = expected(shards, tmp_path / "before")
    pool.asked.clear()
    job = new_save(shards, str(tmp_path / "ring"), snapshot=True, host_buffer=4 * SLAB)
    job.stage()
    for shard in shards:
        if isinstance(shard, TensorShard):
            shard.tensor.zero_()
    job.write()
    report = job.commit()
    assert contents(tmp_path / "ring") == wanted
    assert max(pool.asked) <= 4 * SLAB and report.waves > 4


@pytest.mark.parametrize("is_late", [False, True])
def test_a_background_save_that_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """Its bytes come again while it is being staged; behind that there is nothing to write again."""
    shards = state([100_000])
    wanted = expected(shards, tmp_path / "before")
    write_files, left, failed = native.write_files, threading.Event(), []

    def failing(paths: list[str], **options: Any) -> Any:
        if failed:
            return write_files(paths, **options)
        failed.append(paths)
        if is_late:
            write_files(paths, **options)
            assert left.wait(30)
        raise OSError(errno.EIO, os.strerror(errno.EIO), paths[0])

    monkeypatch.setattr(native, "write_files", failing)
    monkeypatch.setattr(write_module, "_FIRST_DELAY_S", 0.001)
    job = new_save(shards, str(tmp_path / "ring"), snapshot=True, host_buffer=4 * SLAB)
    job.stage()
    left.set()
    job.write()
    if is_late:
        with pytest.raises(CheckpointWriteError, match="Input/output error"):
            job.commit()
    else:
        job.commit()
        assert contents(tmp_path / "ring") == wanted


@given(
    sizes=st.lists(st.tuples(st.integers(0, 3000), st.booleans(), st.integers(0, 3000)), max_size=15),
    files=st.integers(1, 4),
    threads=st.integers(1, 3),
    slab=st.integers(1, 30_000),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
def test_layout(sizes: list[tuple[int, bool, int]], files: int, threads: int, slab: int) -> None:
    """Every byte of every source comes once, in order; a batch's bytes do not overlap; slabs do not."""
    sources, ends = [], [0] * files
    for number, (rows, is_transposed, gap) in enumerate(sizes):
        file = number * files // len(sizes)
        offset = ends[file] + gap // 64 * 64
        tensor = torch.empty(2, rows).t() if is_transposed else torch.empty(rows, 2)
        sources.append(Source(tensor, file, offset))
        ends[file] = -(-(offset + rows * 8) // 64) * 64
    ring = Ring(sources, threads, 4096, slab)
    parts = list(ring.parts())
    for number, source in enumerate(sources):
        own = [part for part in parts if part.source == number]
        ends_at = list(itertools.accumulate((part.nbytes for part in own), initial=0))
        assert [part.begin for part in own] == ends_at[:-1] and ends_at[-1] == source.tensor.numel() * 4
    for batch, nbytes in enumerate(ring.batch_nbytes):
        own = sorted((part.offset, part.nbytes) for part in parts if part.batch == batch)
        assert sum(nbytes for _, nbytes in own) == nbytes
        slab_nbytes = ring.nbytes // min(4, len(ring.batch_nbytes))
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(own))
        assert own[0][0] >= batch % 4 * slab_nbytes
        assert sum(own[-1]) <= (batch % 4 + 1) * slab_nbytes
