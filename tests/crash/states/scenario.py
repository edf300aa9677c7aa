# SPDX-License-Identifier: Apache-2.0
"""A training run reduced to its checkpoints, and what must hold of them after a crash at any moment.

The run saves iterations 1, 2, 3, ... into directories of their own, names each in a tracker file once it is
published, and keeps the last three. Every fifth iteration is saved a second time, over itself. After a crash
it resumes after the iteration in the tracker, so it encounters what the crash has left behind.
"""

from __future__ import annotations

import os
import shutil
import time

import torch

from ckpt_fast.format.types import ObjectShard, Shard, TensorRequest, TensorShard
from ckpt_fast.jobs.background import SaveHandle, SaveQueue
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_objects, load_tensors
from ckpt_fast.storage.commit import invalidate, write_file_atomic
from tests.pipeline.load.test_decode import archive_of
from tests.saves import new_save

SEAL = "metadata.json"
SHAPES = [(0, 3), (), (17,), (300, 70), (32, 512)]


def tensors_of(iteration: int) -> dict[str, torch.Tensor]:
    """Return the state of the run after an iteration."""
    generator = torch.Generator().manual_seed(iteration)
    return {
        f"w{number}": torch.randn(shape, generator=generator, dtype=torch.float32)
        for number, shape in enumerate(SHAPES)
    }


def directory_of(root: str, iteration: int) -> str:
    return os.path.join(root, f"iter_{iteration:07}")


def tracked(root: str) -> int:
    """Return the iteration that the tracker names; 0 before the first."""
    try:
        with open(os.path.join(root, "latest")) as file:
            return int(file.read())
    except FileNotFoundError:
        return 0


def save_iteration(root: str, iteration: int) -> None:
    """Save and publish one iteration; even ones in the background."""
    shards: list[Shard] = [ObjectShard("iteration", archive_of(iteration))]
    for fqn, tensor in tensors_of(iteration).items():
        shards.append(TensorShard(fqn, tensor, (0,) * tensor.dim(), tuple(tensor.shape)))
    job = new_save(
        shards,
        directory_of(root, iteration),
        writers=2,
        common_files={"common.pt": archive_of({"iteration": iteration})},
        seal_files={SEAL: b"{}"},
        snapshot=iteration % 2 == 0,
    )
    job.stage()
    if iteration % 2 == 0:
        handle, queue = SaveHandle(job), SaveQueue()
        handle.add_finalize_fn(lambda: track(root, iteration))
        queue.schedule_async_request(handle)
        while not queue.maybe_finalize_async_calls():  # as training does, which lets a thread publish
            time.sleep(0.001)
        return
    job.write()
    job.commit()
    track(root, iteration)


def track(root: str, iteration: int) -> None:
    write_file_atomic(os.path.join(root, "latest"), str(iteration).encode())


def train(root: str, iterations: int | None = None) -> None:
    """Resume and continue, forever or for some iterations."""
    first = tracked(root) + 1
    iteration = first
    while iterations is None or iteration < first + iterations:
        for _ in range(2 if is_saved_twice(iteration) else 1):
            save_iteration(root, iteration)
        forget(root, iteration - 3)
        iteration += 1


def forget(root: str, iteration: int) -> None:
    """Delete a checkpoint, its seal first."""
    directory = directory_of(root, iteration)
    if os.path.isdir(directory):
        invalidate(directory)
        shutil.rmtree(directory)


def is_saved_twice(iteration: int) -> bool:
    return iteration % 5 == 0


def is_published(root: str, iteration: int) -> bool:
    return os.path.exists(os.path.join(directory_of(root, iteration), SEAL))


def check(root: str) -> int:
    """Check what must hold at every moment; return the iteration that the tracker names.

    Every published checkpoint is complete, bit for bit. The tracker names a published one, even while the run
    is saving that one again.
    """
    latest = tracked(root)
    for iteration in range(max(1, latest - 3), latest + 2):
        if is_published(root, iteration):
            check_iteration(root, iteration)
    assert not latest or is_published(root, latest), f"the tracker names {latest}, which is not published"
    return latest


def check_iteration(root: str, iteration: int) -> None:
    directory = directory_of(root, iteration)
    expected = tensors_of(iteration)
    found = {fqn: torch.full_like(tensor, -1) for fqn, tensor in expected.items()}
    index = CheckpointIndex(directory)
    requests = [TensorRequest(fqn, tensor, (0,) * tensor.dim()) for fqn, tensor in found.items()]
    load_tensors(index, requests, verify=True)
    for fqn, tensor in expected.items():
        assert torch.equal(found[fqn], tensor), f"{fqn} of {directory} is not what was saved"
    assert load_objects(index, ["iteration"]) == {"iteration": iteration}
    with open(os.path.join(directory, "common.pt"), "rb") as file:
        assert file.read() == archive_of({"iteration": iteration})
