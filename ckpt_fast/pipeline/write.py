# SPDX-License-Identifier: Apache-2.0
"""Write: a program of bytes becomes files on disk, in parallel and durable."""

from __future__ import annotations

import os

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.pipeline.commit import fsync_directory
from ckpt_fast.pipeline.encode import WriteProgram
from ckpt_fast.pipeline.types import FileRecord


def write(program: WriteProgram, directory: str) -> list[FileRecord]:
    """Write the program's files into ``directory``; on return they are durable.

    Raises:
        CheckpointWriteError: naming file, offset and cause. The files are incomplete then.
    """
    if not program.paths:
        return []
    try:
        _, file_digests = native.write_files(
            [os.path.join(directory, path) for path in program.paths],
            program.file_nbytes,
            program.piece_file,
            program.piece_offset,
            program.piece_nbytes,
            program.piece_address,
            program.piece_digest,
            program.patch_file,
            program.patch_offset,
            program.patch_digest,
            program.digest_count,
            settings.io_threads(),
            settings.chunk_bytes(),
            settings.direct_io(),
            settings.fsync_enabled(),
        )
        fsync_directory(directory)
    except OSError as error:
        raise CheckpointWriteError(
            f"{error.strerror}. The checkpoint in {directory} is incomplete and was not published; those in "
            "other directories are untouched. Free space or fix the file system, then save again.",
            error.errno,
            error.filename or directory,
        ) from error
    return [
        FileRecord(path, nbytes, digest)
        for path, nbytes, digest in zip(program.paths, program.file_nbytes, file_digests, strict=True)
    ]
