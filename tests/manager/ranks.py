# SPDX-License-Identifier: Apache-2.0
"""What ranks do in the tests of ``CheckpointManager``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ckpt_fast
from ckpt_fast import CheckpointManager, KeepNewest
from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.pipeline.save import waves

ROWS = 5


def state(value: float) -> dict[str, Any]:
    """Return a state dict that has this value everywhere: sharded, replicated, and an object."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "sharded": distribute_tensor(torch.full((ROWS, 3), float(value)), mesh, [Shard(0)]),
        "plain": torch.full((4,), float(value)),
        "progress": {"step": value},
    }


def value_of(found: dict[str, Any]) -> float:
    """Return the value that a state dict has everywhere."""
    sharded = found["sharded"]
    whole = sharded.full_tensor() if isinstance(sharded, DTensor) else sharded
    values = {*whole.flatten().tolist(), *found["plain"].tolist(), float(found["progress"]["step"])}
    assert len(values) == 1, values
    return values.pop()


def error_of(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        return "no error", str(action())
    except Exception as error:
        return type(error).__name__, str(error)


def save(rank: int, root: str, steps: list[int], options: dict[str, Any]) -> tuple[int | None, int]:
    """Resume and save these steps; return the step resumed from, and the number of reports."""
    heard: list[Any] = []
    leave = ckpt_fast.add_listener(heard.append)
    with CheckpointManager(root, **options) as manager:
        found = state(-1)
        begin = manager.restore(found)
        assert begin is None or value_of(found) == begin
        for step in steps:
            future = manager.save(step, state(step), metrics={"loss": abs(step - 2)})
            assert future.result().directory == f"{root}/iter_{step:07d}"
        report = manager.wait()
        assert report is not None and report.nbytes > 0
        assert manager.latest() == steps[-1]
    leave()
    return begin, len(heard)


def restore(rank: int, root: str, step: int | None) -> Any:
    """Return the step and the value that are restored, or the error."""
    found = state(-1)
    with CheckpointManager(root) as manager:
        return error_of(lambda: (manager.restore(found, step), value_of(found)))


def roll_back(rank: int, root: str) -> list[int | None]:
    with CheckpointManager(root, policies=[KeepNewest(2)]) as manager:
        return [manager.restore(state(-1), 2), manager.save(4, state(4)).result() and manager.latest()]


def fail_once(rank: int, root: str) -> dict[str, Any]:
    """Let the save of step 2 fail on the last rank."""
    write, outcome = waves.write, {}

    def fail(*_: Any) -> Any:
        raise CheckpointWriteError("the disk is broken")

    with CheckpointManager(root) as manager:
        manager.save(1, state(1))
        manager.wait()
        if rank == dist.get_world_size() - 1:
            waves.write = fail  # type: ignore[assignment]
        manager.save(2, state(2))
        outcome["failed"] = error_of(lambda: manager.save(3, state(3)))
        waves.write = write
        outcome["latest"] = manager.latest()
        manager.save(4, state(4))
        outcome["after"] = (manager.wait() is not None and manager.latest(), sorted(os.listdir(root)))
    return outcome


def fail_at_the_end(rank: int, root: str, raises: bool) -> tuple[str, str]:
    """Let the last save fail; with ``raises`` the block ends with an error of its own."""
    write = waves.write

    def fail(*_: Any) -> Any:
        raise CheckpointWriteError("the disk is broken")

    def run() -> None:
        with CheckpointManager(root) as manager:
            waves.write = fail  # type: ignore[assignment]
            manager.save(1, state(1))
            if raises:
                raise KeyError("the loop's own")

    try:
        return error_of(run)
    finally:
        waves.write = write


def train_until_told(rank: int, root: str, first: int) -> tuple[list[int], bool, int | None]:
    """Train; one rank is told to end in step 7."""
    saved, before = [], signal.getsignal(signal.SIGTERM)
    with CheckpointManager(root, save_every=5, save_on=signal.SIGTERM) as manager:
        for step in range(1, 20):
            if step == 7 and rank == first:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
            if manager.should_save(step):
                manager.save(step, state(step))
                saved.append(step)
            if manager.stopping:
                break
    assert signal.getsignal(signal.SIGTERM) is before
    return saved, manager.stopping, manager.latest()


def save_for_ever(root: str) -> None:
    """Save step after step until killed."""
    with CheckpointManager(root, policies=[KeepNewest(2)], no_dist=True) as manager:
        found = {"w": torch.zeros(200_000), "step": 0}
        step = manager.restore(found) or 0
        while True:
            step += 1
            manager.save(step, {"w": torch.full((200_000,), float(step)), "step": step})
