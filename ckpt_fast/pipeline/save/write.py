# SPDX-License-Identifier: Apache-2.0
"""Write: a program of bytes becomes files on disk, in parallel and durable."""

from __future__ import annotations

import errno
import logging
import os
import time

from ckpt_fast import native
from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.format.manifest import BLOCK_NBYTES
from ckpt_fast.format.types import BlockDigests, FileRecord
from ckpt_fast.pipeline.save.encode import WriteProgram
from ckpt_fast.pipeline.save.stage import Staged
from ckpt_fast.settings import Settings
from ckpt_fast.storage.commit import fsync_directory
from ckpt_fast.storage.space import file_system_of

logger = logging.getLogger(__name__)

# Network file systems and paths to a device fail so while they fail over.
_MAY_PASS = (errno.EIO, errno.EAGAIN, errno.ENOBUFS, errno.ESTALE, errno.ETIMEDOUT)
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0
_POLL_S = 0.05


def automatic_writers(directory: str, settings: Settings) -> int:
    """The number of files with which a rank's save to ``directory`` is fastest.

    A device's queue is kept full by direct writes to one file, and one is easiest to handle. Through the page
    cache, the writers of one file wait for each other.
    """
    direct = settings.direct_io and file_system_of(directory)[0] not in ("tmpfs", "ramfs")
    return 1 if direct else settings.io_threads


def write(
    program: WriteProgram,
    staged: Staged,
    directory: str,
    settings: Settings,
    progress: native.Progress,
    durable: bool = True,
) -> tuple[list[FileRecord], BlockDigests]:
    """Write the program's files into ``directory``; on return they are durable, if that is wanted.

    After an error that may pass, the files are written again from the beginning, ``CKPT_FAST_RETRIES`` times:
    what the page cache holds after a failed sync is worth nothing, but the buffers still have every byte.
    What comes through a ring is copied again, unless whoever staged it has left.

    Args:
        program: what is written.
        staged: where its bytes are.
        directory: the checkpoint.
        settings: of the save.
        progress: to watch the write, and to stop it, also while it waits to try again.
        durable: whether the files are to outlive a power failure.

    Returns:
        The files, and the checksums of the payloads in them.

    Raises:
        CheckpointWriteError: naming file, offset and cause. The files are incomplete then.
    """
    failed: CheckpointWriteError | None = None
    for attempt in range(settings.write_retries + 1):
        try:
            return _write_once(program, staged, directory, settings, progress, durable)
        except CheckpointWriteError as error:
            if failed is not None and staged.has_left:
                raise failed from None  # what came through a ring did not come again
            if error.errno not in _MAY_PASS or attempt == settings.write_retries or staged.has_left:
                raise
            failed = error
            delay = min(_FIRST_DELAY_S * 4 ** min(attempt, 9), _LONGEST_DELAY_S)
            logger.warning("%s Writing again in %.1f s.", error, delay)
            _pause(delay, progress)
    raise AssertionError("unreachable")


def _pause(seconds: float, progress: native.Progress) -> None:
    """Wait, but not for one who has given the save up."""
    end = time.monotonic() + seconds
    while not progress.stopped and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _POLL_S))


def _write_once(
    program: WriteProgram,
    staged: Staged,
    directory: str,
    settings: Settings,
    progress: native.Progress,
    durable: bool,
) -> tuple[list[FileRecord], BlockDigests]:
    place = (program.paths, program.payload_file, program.payload_offset, program.payload_nbytes)
    if not program.paths:
        return [], BlockDigests(*place, b"")
    ring = staged.ring
    try:
        with staged.supply() as supply:
            _, file_crcs, block_crcs = native.write_files(
                [os.path.join(directory, path) for path in program.paths],
                **program.columns(),
                threads=settings.io_threads if ring is None else ring.threads,
                chunk_bytes=settings.chunk_bytes if ring is None else ring.chunk_nbytes,
                direct=settings.direct_io,
                fsync=durable and settings.fsync_enabled,
                progress=progress,
                block_bytes=BLOCK_NBYTES,
                supply=supply,
            )
        if durable:
            fsync_directory(directory)
    except OSError as error:
        # Of a file, the engine says what failed; of the directory, Python does not.
        what = f"fsync {directory}: " if error.filename in (None, directory) else ""
        raise CheckpointWriteError(
            f"{what}{error.strerror}. The checkpoint in {directory} is incomplete and was not published; "
            "those in other directories are untouched. Free space or fix the file system, then save again.",
            error.errno,
            error.filename or directory,
        ) from error
    files = [
        FileRecord(path, nbytes, crc)
        for path, nbytes, crc in zip(program.paths, program.file_nbytes, file_crcs, strict=True)
    ]
    return files, BlockDigests(*place, block_crcs)
