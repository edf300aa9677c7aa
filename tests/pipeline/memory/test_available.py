# SPDX-License-Identifier: Apache-2.0
"""The default bound on host buffers: what the machine and its cgroups can spare, in made-up and real ones."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_fast import FastStorageWriter, verify
from ckpt_fast.format.types import TensorRequest, TensorShard
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from ckpt_fast.pipeline.memory import available
from ckpt_fast.pipeline.memory.available import LEAST_NBYTES, default_bound, is_tight, spare_nbytes
from ckpt_fast.pipeline.memory.host_buffer import HostBufferPool, host_buffers
from tests.helpers import run_ranks
from tests.saves import save

MIB = 1 << 20


class Machine:
    """A machine of made-up files: ``/proc`` and ``/sys/fs/cgroup``."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()
        patch.setattr(available, "_PROC", str(self.proc))
        patch.setattr(available, "_CGROUPS", str(self.cgroups))

    def has(self, total: int, free: int) -> Machine:
        """Let the machine have so many MiB, and be member of no cgroup."""
        kib = f"MemTotal: {total << 10} kB\nMemFree: 1 kB\nMemAvailable: {free << 10} kB\n"
        (self.proc / "meminfo").write_text(kib)
        return self

    def limits(self, version: int, path: str, limit: str, used: int, reclaimable: int = 0) -> Machine:
        """Let a cgroup have so many MiB (or "max"), and use so many."""
        line = f"4:memory:/{path}\n" if version == 1 else f"0::/{path}\n"
        with (self.proc / "self/cgroup").open("a") as file:
            file.write(line)
        root = self.cgroups / "memory" if version == 1 else self.cgroups
        return self.cgroup(version, root / path, limit, used, reclaimable)

    def cgroup(self, version: int, directory: Path, limit: str, used: int, reclaimable: int = 0) -> Machine:
        names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
        directory.mkdir(parents=True, exist_ok=True)
        text = str(int(limit) * MIB) if limit.isdigit() else limit
        (directory / f"memory.{names[0]}").write_text(f"{text}\n")
        (directory / f"memory.{names[1]}").write_text(f"{used * MIB}\n")
        name = "total_inactive_file" if version == 1 else "inactive_file"
        (directory / "memory.stat").write_text(f"cache 5\n{name} {reclaimable * MIB}\n")
        return self


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "machine", monkeypatch)


@pytest.fixture
def no_buffers() -> Iterator[None]:
    host_buffers.trim()
    yield
    host_buffers.trim()


def test_of_a_machine(machine: Machine) -> None:
    assert machine.has(1600, 700) and spare_nbytes() == 600 * MIB, "less a sixteenth of all"
    assert machine.has(1 << 20, 1 << 19) and spare_nbytes() == (1 << 39) - (8 << 30), "at most 8 GiB"
    assert machine.has(1600, 50) and spare_nbytes() == 0


@pytest.mark.parametrize("version", [1, 2])
def test_of_a_cgroup(machine: Machine, version: int) -> None:
    machine.has(1 << 20, 1 << 19).limits(version, "job/step", "1600", 1000, 100)
    assert spare_nbytes() == 600 * MIB, "what the page cache holds can be had"
    parent = (machine.cgroups / "memory" if version == 1 else machine.cgroups) / "job"
    machine.cgroup(version, parent, "800", 400)
    assert spare_nbytes() == 350 * MIB, "a limit above holds as well"


@pytest.mark.parametrize(("version", "limit"), [(1, str((1 << 63) - 4096)), (2, "max")])
def test_of_a_cgroup_without_a_limit(machine: Machine, version: int, limit: str) -> None:
    machine.has(1600, 700).limits(version, "", "1600", 1)
    root = machine.cgroups / "memory" if version == 1 else machine.cgroups
    name = "limit_in_bytes" if version == 1 else "max"
    (root / f"memory.{name}").write_text(limit)
    assert spare_nbytes() == 600 * MIB


def test_where_nobody_knows(machine: Machine) -> None:
    assert spare_nbytes() is None and default_bound(1 << 50) is None and not is_tight()


def test_of_this_machine() -> None:
    spare = spare_nbytes()
    assert spare is not None and 0 <= spare < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.usefixtures("no_buffers")
def test_the_bound(machine: Machine) -> None:
    machine.has(1600, 300)
    assert default_bound(200 * MIB) is None, "it fits"
    assert default_bound(201 * MIB) == 200 * MIB
    held = host_buffers.take(10 * MIB)
    assert default_bound(300 * MIB) == 210 * MIB, "what is in use is bounded, too"
    host_buffers.give_back(held)
    assert default_bound(210 * MIB) is None, "what is idle will be used"
    machine.has(1600, 0)
    assert default_bound(10 * MIB) is None
    assert default_bound(300 * MIB) == LEAST_NBYTES, "a save goes on, however slowly"
    assert is_tight()


def save_under_pressure(rank: int, root: str, nbytes: int) -> tuple[int, int | None, int, list[str]]:
    """Save as one of two ranks on a machine that spares a quarter of what they have; return what was used."""
    host_buffers.trim()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckpt_fast.jobs.report").addHandler(handler)
    peak = 0
    take = HostBufferPool.take

    def watched(self: HostBufferPool, *args: Any, **options: Any) -> Any:
        nonlocal peak
        buffer = take(self, *args, **options)
        peak = max(peak, self.used_nbytes)
        return buffer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        patch.setattr(HostBufferPool, "take", watched)
        machine = Machine(Path(root) / f"machine{rank}", patch).has(1 << 14, 1 << 13)
        machine.limits(2, "job", "640", 640 - 40 - 2 * 64)  # a margin of 40, and 64 for each of the ranks
        value = torch.arange(nbytes // 4 // 32, dtype=torch.float32)
        shards = [TensorShard(f"w{rank}.{n}", value + n, (0,), tuple(value.shape)) for n in range(32)]
        report = save(shards, f"{root}/save", snapshot=True)
    logging.getLogger("ckpt_fast.jobs.report").removeHandler(handler)
    host_buffers.trim()
    return report.waves, report.host_memory_bound, peak, [*lines, report.details]


def test_two_ranks_share_what_a_cgroup_can_spare(tmp_path: Path) -> None:
    for waves, bound, peak, lines in run_ranks(save_under_pressure, 2, str(tmp_path), 256 * MIB):
        assert bound == peak and 60 * MIB < peak <= 64 * MIB
        assert waves > 15 and "throttled" in lines[0] and "67.1 MB" in lines[0]
        assert f"in {waves} waves through 67.1 MB of host memory" in lines[-1]
    assert verify(tmp_path / "save", deep=True).is_sound


def resident_nbytes() -> int:
    """Return the anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10


def after_a_save_and_a_load(rank: int, root: str, nbytes: int) -> tuple[int, int]:
    """Return how many bytes remain of a snapshot that is not cached, and of a load into transposed memory."""
    host_buffers.trim()
    state = {"w": torch.ones(nbytes // 4)}
    state["w"].add_(1)
    small = {"w": torch.ones(4)}
    for each in (small, state):
        before = resident_nbytes()
        writer = FastStorageWriter(f"{root}/dcp{each['w'].numel()}", cache_staged_state_dict=False)
        dcp.async_save(each, storage_writer=writer).result()
        del writer
        # torch's thread may still be about to drop what it was given.
        end = time.monotonic() + 30
        while (saved := resident_nbytes() - before) > nbytes // 2 and time.monotonic() < end:
            time.sleep(0.05)
    side = 1024
    destination = torch.zeros(nbytes // 4 // side, side).t()
    whole = torch.ones(side, nbytes // 4 // side)
    save([TensorShard("t", whole, (0, 0), tuple(whole.shape))], f"{root}/t")
    destination.fill_(0)
    before = resident_nbytes()
    load_tensors(CheckpointIndex(f"{root}/t"), [TensorRequest("t", destination, (0, 0))])
    return saved, resident_nbytes() - before


def test_what_is_not_kept_is_given_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = 128 * MIB
    monkeypatch.setenv("CKPT_FAST_CHUNK", "256K")  # the engine keeps up to 128 MiB of chunks
    ((saved, loaded),) = run_ranks(after_a_save_and_a_load, 1, str(tmp_path), nbytes, fresh=True)
    assert saved < nbytes // 2 and loaded < nbytes // 2


def test_buffers_are_not_kept_while_memory_is_tight(machine: Machine, tmp_path: Path) -> None:
    machine.has(1600, 800)
    shards = [TensorShard("w", torch.ones(MIB), (0,), (MIB,))]
    host_buffers.trim()
    save(shards, str(tmp_path / "1"), snapshot=True)
    assert host_buffers.idle_nbytes == 4 * MIB
    machine.has(1600, 10)
    save(shards, str(tmp_path / "2"), snapshot=True)
    assert host_buffers.idle_nbytes == 0


def memory_of_many(rank: int, root: str, count: int) -> list[int]:
    state = {"w": torch.ones(4 * MIB)}
    sizes = []
    for _ in range(count):
        save([TensorShard("w", state["w"], (0,), (4 * MIB,))], root, snapshot=True)
        index = CheckpointIndex(root)
        load_tensors(index, [TensorRequest("w", state["w"], (0,))])
        sizes.append(resident_nbytes())
    return sizes


def test_many_saves_and_loads_take_no_more_memory(tmp_path: Path, no_fsync: None) -> None:
    (sizes,) = run_ranks(memory_of_many, 1, str(tmp_path / "c"), 100, fresh=True)
    assert max(sizes[10:]) - sizes[10] < 8 * MIB
