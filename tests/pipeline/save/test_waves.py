# SPDX-License-Identifier: Apache-2.0
"""Saves in waves: any state through a ring of bounded host buffers gives the same checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.format.types import ObjectShard, Shard, TensorRequest
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_objects, load_tensors
from ckpt_fast.pipeline.memory.host_buffer import HostBuffer, HostBufferPool
from ckpt_fast.pipeline.save import stage as stage_module
from ckpt_fast.pipeline.save import waves as waves_module
from ckpt_fast.pipeline.save.waves import Waves
from tests.pipeline.layouts import random_tensor, same, whole
from tests.saves import new_save, save

pytestmark = pytest.mark.usefixtures("no_fsync")
KIB = 1024


class WatchedPool(HostBufferPool):
    """Records how much was in use at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.in_use = 0

    def take(self, *args: Any, **options: Any) -> HostBuffer:
        buffer = super().take(*args, **options)
        with self._lock:
            self.in_use += buffer.nbytes
            self.peak = max(self.peak, self.in_use)
        return buffer

    def give_back(self, buffer: HostBuffer, keep: bool = True) -> None:
        with self._lock:
            self.in_use -= buffer.nbytes
        super().give_back(buffer, keep)


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> WatchedPool:
    watched = WatchedPool()
    monkeypatch.setattr(stage_module, "host_buffers", watched)
    return watched


def state(kib: Sequence[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return tensors of the given sizes in KiB."""
    return {
        f"w{number}": random_tensor((size, 256), torch.float32, seed + number)
        for number, size in enumerate(kib)
    }


def shards_of(tensors: dict[str, torch.Tensor]) -> list[Shard]:
    return [whole(fqn, tensor) for fqn, tensor in tensors.items()]


def wrong(directory: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that do not come back from a checkpoint, verifying every checksum."""
    found = {fqn: torch.zeros_like(tensor) for fqn, tensor in expected.items()}
    index = CheckpointIndex(str(directory))
    requests = [TensorRequest(fqn, tensor, (0,) * tensor.dim()) for fqn, tensor in found.items()]
    report = load_tensors(index, requests, verify=True)
    assert report.verified == len(expected)
    return [fqn for fqn, tensor in expected.items() if not same(tensor, found[fqn])]


@pytest.mark.usefixtures("native_impl")
@pytest.mark.parametrize(("bound", "waves"), [(None, 1), (400, 1), (150, 7), (64, 14)])
def test_the_checkpoint_is_the_same(bound: int | None, waves: int, tmp_path: Path, pool: WatchedPool) -> None:
    tensors = state([70, 30, 30, 40, 50])
    shards = [*shards_of(tensors), ObjectShard("object", b"PK")]
    report = save(shards, str(tmp_path), snapshot=True, host_buffer=bound and bound * KIB)
    assert wrong(tmp_path, tensors) == []
    assert report.files == 1 and report.waves == waves
    assert [path.name for path in tmp_path.glob("*.distcp")] == ["__0_0.distcp"]
    assert pool.peak <= (bound or 220) * KIB, "tensors are cut"
    assert pool.in_use == 0


def test_waves_of_several_files(tmp_path: Path) -> None:
    tensors = state([20] * 8)
    report = save(shards_of(tensors), str(tmp_path), snapshot=True, host_buffer=100 * KIB, writers=2)
    assert report.files == 2 and report.waves > 2
    assert wrong(tmp_path, tensors) == []


def test_only_what_is_copied_counts(tmp_path: Path, pool: WatchedPool) -> None:
    tensors = {**state([100, 100]), "t": torch.randn(64, 64).t()}
    report = save(shards_of(tensors), str(tmp_path), host_buffer=20 * KIB)
    assert report.waves == 1 and pool.peak == 16 * KIB
    assert wrong(tmp_path, tensors) == []


@pytest.mark.parametrize("bound", [None, 90 * KIB])
def test_memory_is_allocated_once_and_reported(bound: int | None, tmp_path: Path, pool: WatchedPool) -> None:
    tensors = state([30] * 6)
    first = save(shards_of(tensors), str(tmp_path / "1"), snapshot=True, host_buffer=bound)
    assert first.host_memory_allocated == pool.peak
    assert pool.peak == 180 * KIB if bound is None else 45 * KIB < pool.peak <= 90 * KIB
    assert f"{first.host_memory_allocated / 1e6:.1f} MB of host buffers allocated" in first.details
    second = save(shards_of(tensors), str(tmp_path / "2"), snapshot=True, host_buffer=bound)
    assert second.host_memory_allocated == 0 and "allocated" not in second.details
    assert wrong(tmp_path / "2", tensors) == []


def test_bound_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    monkeypatch.setenv("CKPT_FAST_HOST_BUFFER", "80K")
    report = save(shards_of(state([30] * 4)), str(tmp_path), snapshot=True)
    assert report.waves > 1 and pool.peak <= 80 * KIB


class HeldDisk:
    """Blocks writes until released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        write = waves_module.write

        def held(*args: Any) -> Any:
            assert self.go.wait(30)
            return write(*args)

        monkeypatch.setattr(waves_module, "write", held)


def test_two_saves_at_once_share_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    """Each alone fits: the second waits for the first one's memory."""
    disk = HeldDisk(monkeypatch)
    first_state, second_state = state([60], seed=1), state([70], seed=2)
    jobs = [
        new_save(shards_of(tensors), str(tmp_path / name), snapshot=True, host_buffer=100 * KIB)
        for name, tensors in (("1", first_state), ("2", second_state))
    ]
    jobs[0].stage()
    second = threading.Thread(target=jobs[1].stage)
    second.start()
    second.join(0.1)
    assert second.is_alive() and pool.in_use == 60 * KIB
    disk.go.set()
    second.join(30)
    for job in jobs:
        job.write()
        job.commit()
    assert pool.peak <= 100 * KIB and pool.in_use == 0
    assert wrong(tmp_path / "1", first_state) == [] and wrong(tmp_path / "2", second_state) == []


def test_two_saves_at_once_have_their_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    disk = HeldDisk(monkeypatch)
    tensors = state([60])
    before = {fqn: tensor.clone() for fqn, tensor in tensors.items()}
    jobs = []
    for name in ("1", "2"):
        job = new_save(shards_of(tensors), str(tmp_path / name), snapshot=True)
        job.stage()
        jobs.append(job)
        for tensor in tensors.values():
            tensor.add_(1)
    assert pool.in_use == 120 * KIB
    disk.go.set()
    for job in jobs:
        job.write()
        job.commit()
    assert wrong(tmp_path / "1", before) == []
    assert wrong(tmp_path / "2", {fqn: tensor + 1 for fqn, tensor in before.items()}) == []


def test_waves_are_copied_while_those_before_them_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: WatchedPool
) -> None:
    disk = HeldDisk(monkeypatch)
    tensors = state([40] * 5)
    job = new_save(shards_of(tensors), str(tmp_path), snapshot=True, host_buffer=80 * KIB)
    staging = threading.Thread(target=job.stage)
    staging.start()
    staging.join(0.3)
    assert staging.is_alive() and 0 < pool.in_use <= 80 * KIB
    disk.go.set()
    staging.join(30)
    job.write()
    job.commit()
    assert wrong(tmp_path, tensors) == []


def test_failed_write(tmp_path: Path, pool: WatchedPool) -> None:
    """Nothing more is copied or written, all memory is returned, and the error is the first one."""
    report = SaveReport(str(tmp_path / "missing"))
    waves = Waves(report, "__0_", snapshot=True, bound=50 * KIB)
    ran = []
    waves.stage(shards_of(state([25] * 6)))
    waves.then(lambda: ran.append(1))
    with pytest.raises(CheckpointWriteError, match=r"missing/__0_0\.distcp"):
        waves.finish()
    assert ran == [] and pool.in_use == 0
    tensors = state([25] * 6, seed=3)
    assert save(shards_of(tensors), str(tmp_path / "next"), snapshot=True, host_buffer=50 * KIB).waves > 3
    assert wrong(tmp_path / "next", tensors) == []


def test_failed_staging(tmp_path: Path, pool: WatchedPool) -> None:
    """Nothing is published."""
    no_data = whole("no data", torch.empty(20, 256, device="meta"))
    shards = [*shards_of(state([25] * 3)), no_data]
    with pytest.raises(CheckpointError, match="meta tensor"):
        save(shards, str(tmp_path), snapshot=True, host_buffer=50 * KIB)
    assert pool.in_use == 0 and not (tmp_path / ".metadata").exists()

    waves = Waves(SaveReport(str(tmp_path)), "__0_", snapshot=True, bound=50 * KIB)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        waves.run(shards)
    assert pool.in_use == 0


def test_a_process_that_may_start_no_more_threads(
    tmp_path: Path, pool: WatchedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    waves = Waves(SaveReport(str(tmp_path)), "__0_", snapshot=True)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        waves.stage(shards_of(state([25])))
    assert pool.in_use == 0


def test_actions_follow_the_writes(tmp_path: Path) -> None:
    waves = Waves(SaveReport(str(tmp_path)), "__0_")
    seen = []
    waves.stage(shards_of(state([10])))
    waves.then(lambda: seen.extend(path.name for path in tmp_path.iterdir()))
    assert [file.path for file in waves.finish().files] == seen == ["__0_0.distcp"]


def test_objects_and_no_shards(tmp_path: Path) -> None:
    torch.save({"step": 3}, tmp_path / "value")
    payload = (tmp_path / "value").read_bytes()
    save([ObjectShard("o", payload)], str(tmp_path / "o"), snapshot=True, host_buffer=1)
    assert load_objects(CheckpointIndex(str(tmp_path / "o")), ["o"]) == {"o": {"step": 3}}
    assert save([], str(tmp_path / "none"), snapshot=True, host_buffer=1).files == 0
