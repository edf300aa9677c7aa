# SPDX-License-Identifier: Apache-2.0
"""Read: extents of the data files straight into memory, checked while they come in."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from array import array

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError
from ckpt_fast.pipeline.types import Extent

# Reserving so much for nothing does no harm; .metadata may be damaged and name any length.
_TRUSTED_NBYTES = 1 << 20


class ReadProgram:
    """The columns that ``native.read_extents`` takes, built extent by extent.

    Args:
        directory: the checkpoint; extents' paths are relative to it.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.nbytes = 0
        self._paths: dict[str, int] = {}
        self._file, self._offset, self._nbytes = array("q"), array("q"), array("q")
        self._address, self._digest = array("q"), array("q")
        self._digest_count = 0

    def add(self, extent: Extent, address: int, digest: int = -1) -> None:
        """Read ``extent`` to ``address``; its bytes continue stream ``digest`` if one is given."""
        file = self._paths.setdefault(extent.path, len(self._paths))
        self._file.append(file)
        self._offset.append(extent.offset)
        self._nbytes.append(extent.nbytes)
        self._address.append(address)
        self._digest.append(digest)
        self.nbytes += extent.nbytes

    def new_digest(self) -> int:
        """A new stream whose CRC-32 ``run`` returns."""
        self._digest_count += 1
        return self._digest_count - 1

    def run(self) -> list[int]:
        """Read everything; returns the CRC-32 of every stream.

        Raises:
            CheckpointNotFoundError: a data file is missing.
            CheckpointCorruptError: a data file ends early or cannot be read.
        """
        if not len(self._file):
            return [0] * self._digest_count
        try:
            return native.read_extents(
                [os.path.join(self.directory, path) for path in self._paths],
                self._file,
                self._offset,
                self._nbytes,
                self._address,
                self._digest,
                self._digest_count,
                settings.io_threads(),
                settings.chunk_bytes(),
                False,
            )
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"a data file of the checkpoint is gone: {error.strerror}. Restore it, or load an "
                "earlier iteration."
            ) from error
        except OSError as error:
            raise CheckpointCorruptError(
                f"{error.strerror}. The checkpoint in {self.directory} is damaged; load an earlier iteration."
            ) from error


class ByteArena:
    """Memory for small reads whose content Python looks at: extents in, ``bytes`` out."""

    def __init__(self, program: ReadProgram) -> None:
        self._program = program
        self._blocks: list[ctypes.Array[ctypes.c_char]] = []
        self._nbytes: list[int] = []

    def add(self, extent: Extent) -> int:
        """Schedule ``extent``; returns the handle for ``content`` after the program has run.

        Raises:
            CheckpointCorruptError: the file ends before the extent does.
        """
        if extent.nbytes > _TRUSTED_NBYTES:
            self._require_in_file(extent)
        block = ctypes.create_string_buffer(max(extent.nbytes, 1))
        self._blocks.append(block)
        self._nbytes.append(extent.nbytes)
        self._program.add(extent, ctypes.addressof(block))
        return len(self._blocks) - 1

    def _require_in_file(self, extent: Extent) -> None:
        """Do not reserve memory for a length that is itself damaged."""
        path = os.path.join(self._program.directory, extent.path)
        with contextlib.suppress(OSError):  # then reading fails, and says so better
            nbytes = os.stat(path).st_size
            if extent.offset + extent.nbytes > nbytes:
                raise CheckpointCorruptError(
                    f"{path} should have {extent.nbytes} bytes at {extent.offset}, but the file ends at "
                    f"{nbytes}. The checkpoint is damaged; load an earlier iteration."
                )

    def content(self, handle: int) -> bytes:
        """The bytes read."""
        return self._blocks[handle].raw[: self._nbytes[handle]]

    def crc32(self, handle: int) -> int:
        """The bytes read, as a little-endian 32-bit number."""
        return int(struct.unpack_from("<I", self._blocks[handle].raw)[0])
