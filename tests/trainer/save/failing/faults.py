# SPDX-License-Identifier: Apache-2.0
"""Faults of background saves: each is a block in which a save to ``root`` of iteration ``step`` is made."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from ckpt_fast import native
from ckpt_fast.trainer.save import publish
from tests.trainer.save.test_failures import limited_files

Fault = Callable[[int, str, int], contextlib.AbstractContextManager[Any]]


def last_rank() -> int:
    return dist.get_world_size() - 1


def on(rank: int, wanted: int, fault: contextlib.AbstractContextManager[Any]) -> Any:
    return fault if rank == wanted else contextlib.nullcontext()


def disk_full(rank: int, root: str, step: int) -> Any:
    """Writes of the last rank's data fail with EFBIG."""
    return on(rank, last_rank(), limited_files(6000))


def disks_full(rank: int, root: str, step: int) -> Any:
    return limited_files(6000)


def broken_disk(rank: int, root: str, step: int) -> Any:
    """The first rank's engine gets EIO."""
    return on(
        rank, 0, mock.patch.object(native.engine(), "write_files", side_effect=OSError(errno.EIO, "EIO"))
    )


@contextlib.contextmanager
def in_the_way(rank: int, path: str, remove: Callable[[], None]) -> Iterator[None]:
    if rank == 0:
        os.makedirs(os.path.join(path, "in_the_way"))
    dist.barrier()
    try:
        yield
    finally:
        dist.barrier()
        if rank == 0:
            remove()
        dist.barrier()


def unsealable(rank: int, root: str, step: int) -> Any:
    """The coordinator cannot write ``.metadata``."""
    directory = f"{root}/iter_{step:07d}"
    return in_the_way(rank, f"{directory}/.metadata", lambda: shutil.rmtree(directory))


def unpublished(rank: int, root: str, step: int) -> Any:
    """The coordinator cannot write the trackers."""
    return mock.patch.object(publish, "publish_trackers", side_effect=OSError(errno.EROFS, "read-only"))


@contextlib.contextmanager
def hanging(rank: int, root: str, step: int) -> Iterator[None]:
    """The last rank's storage does not answer before ``CKPT_FAST_TIMEOUT`` is over."""
    answers, engine = threading.Event(), native.engine()
    original = engine.write_files

    def write_files(*args: Any, **options: Any) -> Any:
        assert answers.wait(60)
        return original(*args, **options)

    with (
        mock.patch.dict(os.environ, CKPT_FAST_TIMEOUT="1"),
        on(rank, last_rank(), mock.patch.object(engine, "write_files", write_files)),
    ):
        try:
            yield
        finally:
            answers.set()


@contextlib.contextmanager
def no_directory(rank: int, root: str, step: int) -> Iterator[None]:
    """A file lies where the directory should be made: the call itself fails."""
    path = Path(root, f"iter_{step:07d}")
    if rank == 0:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a file in the way")
    dist.barrier()
    try:
        yield
    finally:
        dist.barrier()
        if rank == 0:
            path.unlink()
        dist.barrier()


def no_room(rank: int, root: str, step: int) -> Any:
    """The coordinator's file system reports no free space: the call itself fails."""
    full = os.statvfs_result((4096, 4096, 9, 0, 0, 9, 9, 9, 0, 255))
    return mock.patch.object(os, "statvfs", return_value=full)


IN_BACKGROUND: dict[str, Fault] = {
    fault.__name__: fault for fault in (disk_full, disks_full, broken_disk, unsealable, unpublished, hanging)
}
IN_CALL: dict[str, Fault] = {fault.__name__: fault for fault in (no_directory, no_room)}
FAULTS = IN_BACKGROUND | IN_CALL

# What the error must say of each.
CAUSES = {
    "disk_full": "File too large",
    "disks_full": "File too large",
    "broken_disk": "EIO",
    "unsealable": ".metadata",
    "unpublished": "read-only",
    "hanging": "CKPT_FAST_TIMEOUT",
    "no_directory": "directory",
    "no_room": "free",
}
