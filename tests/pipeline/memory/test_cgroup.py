# SPDX-License-Identifier: Apache-2.0
"""Background saves in a real cgroup that has little more memory than the state: nobody is killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckpt_fast import verify
from ckpt_fast.format.types import TensorShard
from ckpt_fast.jobs.background import SaveHandle, SaveQueue
from ckpt_fast.pipeline.memory import available
from ckpt_fast.pipeline.memory.host_buffer import host_buffers
from tests.helpers import run_ranks
from tests.saves import new_save

MIB = 1 << 20
RANKS, STATE, TENSORS, SAVES = 2, 256 * MIB, 64, 8
LIMIT = RANKS * STATE * 13 // 10
# What training takes more of with every save; in the end more than the margin that saves leave free.
GROWTH = 4 * MIB


@contextlib.contextmanager
def memory_cgroup(nbytes: int) -> Iterator[Path]:
    """A cgroup below that of this process, of which members are killed if they use more.

    Skips the test if none can be made.
    """
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root, name = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v2, "memory.max")
    path = root / f"ckpt_fast-test-{os.getpid()}"
    try:
        path.mkdir()
        (path / name).write_text(str(nbytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            path.rmdir()
        pytest.skip(f"no cgroup can limit memory here: {error}")
    try:
        yield path
    finally:
        path.rmdir()


def train_and_save(rank: int, root: str, cgroup: str) -> list[int | None]:
    """Save in the background, with more memory taken meanwhile; return the number of waves of each save."""
    available.LEAST_NBYTES = 4 * MIB
    Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    host_buffers.trim()
    state = [torch.full((STATE // TENSORS // 4,), float(n)) for n in range(TENSORS)]
    queue, waves, grown = SaveQueue(), [], []
    for number in range(SAVES):
        shards = [TensorShard(f"w{rank}.{n}", t, (0,), tuple(t.shape)) for n, t in enumerate(state)]
        job = new_save(shards, f"{root}/{number}", snapshot=True)
        job.stage()
        queue.schedule_async_request(SaveHandle(job))
        grown.append(torch.ones(GROWTH // 4))
        for tensor in state:
            tensor.add_(1)
        queue.maybe_finalize_async_calls(blocking=True)
        waves.append(job.report.waves)
    return waves


@pytest.mark.long
def test_a_state_and_a_third_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_CHUNK", "256K")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(RANKS))
    with memory_cgroup(LIMIT) as cgroup:
        results = run_ranks(train_and_save, RANKS, str(tmp_path), str(cgroup), fresh=True)
    for waves in results:
        assert all(count is not None and count > 1 for count in waves), "the limit was not felt"
        assert waves[-1] > waves[0], "what training has taken was not left to it"
    for number in range(SAVES):
        assert verify(tmp_path / str(number), deep=True).is_sound
