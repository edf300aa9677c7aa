# SPDX-License-Identifier: Apache-2.0
"""A training program that exits with a save in flight: ``main(DIRECTORY, HOW)``, in a process of its own.

RANK and WORLD_SIZE are in the environment.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist


def end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# Called last of all. Where a group is left to the end of the process, threads of gloo abort that at times
# ("terminate called without an active exception"), with or without ckpt_fast.
atexit.register(end_group)

from ckpt_fast import native  # noqa: E402
from ckpt_fast.format.types import TensorShard  # noqa: E402
from ckpt_fast.jobs.background import SaveHandle, SaveQueue  # noqa: E402
from tests.saves import new_save, save  # noqa: E402


def main(directory: str, how: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        rendezvous = f"file://{directory}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    tensor = torch.full((1, 100_000), float(rank))
    shard = TensorShard("w", tensor, (rank, 0), (world, 100_000))
    save([shard], f"{directory}/first", seal_files={"metadata.json": b"{}"})

    original = native.write_files

    def slowly(*arguments: object, **options: object) -> object:
        time.sleep(0.5)
        return original(*arguments, **options)

    native.engine().write_files = slowly
    queue = SaveQueue()
    job = new_save(
        [shard],
        f"{directory}/second",
        snapshot=True,
        seal_files={"metadata.json": b"{}"},
        finish=finish if "publishing" in how else lambda _: (),
    )
    job.stage()
    request = SaveHandle(job)
    request.add_finalize_fn(print_finalized)
    queue.schedule_async_request(request)
    tensor.fill_(-1)
    if "publishing" in how:
        publish(request, queue, how)
    if how == "exception":
        raise ValueError("the loss is nan")
    if how == "SIGTERM":
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(30)


def publish(request: SaveHandle, queue: SaveQueue, how: str) -> None:
    """Let the coordinator begin to publish, and return in the middle of it."""
    request.wait()
    while not request._is_publishing:
        queue.maybe_finalize_async_calls()
    if how.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)


def finish(_: str) -> tuple[()]:
    time.sleep(0.5)
    return ()


def print_finalized() -> None:
    sys.stdout.write("finalized\n")
