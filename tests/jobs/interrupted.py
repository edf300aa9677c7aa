# SPDX-License-Identifier: Apache-2.0
"""Jobs that are interrupted, on a slow disk: ``main(WHAT, DIRECTORY)``, in a process of its own.

WHAT is a function of this module. ``slow_disk.c`` is preloaded.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast import FastStorageWriter
from ckpt_fast.errors import AsyncSaveError
from ckpt_fast.format.types import TensorRequest, TensorShard
from ckpt_fast.jobs.background import SaveHandle
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from tests.saves import new_save, save

ROWS = 100  # of 64 KiB, one chunk each
FILES: dict[str, Any] = {"common_files": {"common.pt": b"c"}, "seal_files": {"metadata.json": b"{}"}}


def tensor(value: float) -> torch.Tensor:
    return torch.full((ROWS, 16384), value)


def pipeline_save(directory: str, value: float) -> None:
    save([TensorShard("w", tensor(value), (0, 0), (ROWS, 16384))], directory, **FILES)


def dcp_save(directory: str, value: float) -> None:
    dcp.save({"w": tensor(value)}, storage_writer=FastStorageWriter(directory))


def load(directory: str) -> torch.Tensor:
    into = torch.zeros(ROWS, 16384)
    load_tensors(CheckpointIndex(directory), [TensorRequest("w", into, (0, 0))])
    return into


@contextlib.contextmanager
def slow(milliseconds: int = 40) -> Iterator[None]:
    os.environ["SLOW_DISK_MS"] = str(milliseconds)
    try:
        yield
    finally:
        os.environ["SLOW_DISK_MS"] = "0"


def requires(condition: object, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def interrupted_after(seconds: float, action: Callable[[], object]) -> bool:
    """Return whether a signal that came this many seconds after the action began interrupted it."""
    sent = time.monotonic() + seconds
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        action()
    except (KeyboardInterrupt, CheckpointException):  # torch turns the first into the second
        requires(time.monotonic() - sent < 5.0, f"the signal took {time.monotonic() - sent:.2f} s")
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return False


def jobs_left(wait_s: float = 5.0) -> list[str]:
    """Return the threads that have not finished; a busy machine gets some time."""
    deadline = time.monotonic() + wait_s
    while True:
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("ckpt_fast")]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def holds(directory: str, value: float) -> bool:
    partial = [name for name in os.listdir(directory) if name.endswith(".partial")]
    requires(not partial, f"left: {partial}")
    return bool((load(directory) == value).all())


def rounds(directory: str) -> None:
    """Send a signal at many moments of saves and loads; later saves to the same directory are correct."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for writes in (pipeline_save, dcp_save):
        count = 0
        for number in range(20):
            shutil.rmtree(directory, ignore_errors=True)
            with slow():
                count += interrupted_after(0.02 + 0.05 * number, functools.partial(writes, directory, 1.0))
            requires(not jobs_left(), f"still at work: {jobs_left()}")
            writes(directory, 2.0)
            requires(holds(directory, 2.0), f"{writes.__name__}, round {number}: other values")
        requires(count > 10, f"only {count} saves were interrupted")
    count = 0
    for number in range(10):
        with slow():
            count += interrupted_after(0.02 + 0.05 * number, lambda: load(directory))
        requires(not jobs_left(), f"still at work: {jobs_left()}")
    requires(count > 5, f"only {count} loads were interrupted")


def given_up(directory: str) -> None:
    """The disk exceeds the deadline; meanwhile, another save to the directory is published."""
    job = new_save([TensorShard("w", tensor(1.0), (0, 0), (ROWS, 16384))], directory, snapshot=True, **FILES)
    with slow(6000):
        job.stage()
        handle = SaveHandle(job)
        handle.start()
        time.sleep(0.3)
    try:
        handle.finalize()
        raise AssertionError("the save was in time")
    except AsyncSaveError:
        pass
    requires(jobs_left(0.0), "the disk does not hang")
    pipeline_save(directory, 2.0)
    before = {name: os.stat(os.path.join(directory, name)).st_ino for name in os.listdir(directory)}
    requires(job.wait(20), "the disk hangs for ever")
    requires(holds(directory, 2.0), "the save that was given up is there")
    after = {name: os.stat(os.path.join(directory, name)).st_ino for name in os.listdir(directory)}
    requires(before.items() >= after.items(), "a file was replaced")


def failing(directory: str) -> None:
    """A save is waiting for a retry; once abandoned, it neither retries nor waits for long."""
    os.environ["SLOW_DISK_ERRORS"] = "1000"
    job = new_save([TensorShard("w", tensor(1.0), (0, 0), (ROWS, 16384))], directory, snapshot=True, **FILES)
    job.stage()
    time.sleep(0.3)
    requires(not job.is_written(), "it does not try again")
    begin = time.monotonic()
    requires(job.abandon(), "it waits though it is given up")
    requires(time.monotonic() - begin < 0.3, "the pause was not ended")
    os.environ["SLOW_DISK_ERRORS"] = "0"
    pipeline_save(directory, 2.0)
    requires(holds(directory, 2.0), "other values")


def one_save(directory: str) -> None:
    with slow():
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        pipeline_save(directory, 1.0)


def one_load(directory: str) -> None:
    pipeline_save(directory, 1.0)
    with slow(100):
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        load(directory)


def one_failing_save(directory: str) -> None:
    """A background save whose future nobody waits for."""
    os.environ["SLOW_DISK_ERRORS"] = "1000"
    os.environ["CKPT_FAST_RETRIES"] = "0"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    dcp.async_save({"w": tensor(1.0)}, storage_writer=FastStorageWriter(directory))


def one_save_of_torchs(directory: str) -> None:
    """A background save that is not waited for when the program ends."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    with slow(0):
        dcp.async_save({"w": tensor(1.0)}, storage_writer=HeldWriter(directory))


class HeldWriter(FastStorageWriter):
    """Begins to write when the program is about to exit."""

    def write_data(self, *arguments: Any) -> Any:
        time.sleep(1.0)
        return super().write_data(*arguments)


def one_failing_background_save(directory: str) -> None:
    os.environ["SLOW_DISK_ERRORS"] = "1000"
    os.environ["CKPT_FAST_RETRIES"] = "0"
    job = new_save([TensorShard("w", tensor(1.0), (0, 0), (ROWS, 16384))], directory, snapshot=True, **FILES)
    job.stage()
    job.wait()


def terminated(*_: object) -> None:
    raise SystemExit(3)


def main(what: str, directory: str) -> None:
    signal.signal(signal.SIGTERM, terminated)
    # Shells let background processes ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        globals()[what](directory)
    finally:
        sys.stdout.write(f"{time.monotonic()}\n")
