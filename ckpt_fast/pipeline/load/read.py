# SPDX-License-Identifier: Apache-2.0
"""Read: extents of the data files straight into memory, checked while they come in."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import heapq
import mmap
import os
import struct
from array import array
from collections.abc import Sequence

import numpy as np

from ckpt_fast import native, settings, system
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from ckpt_fast.format.types import Extent, Runs
from ckpt_fast.jobs import trace
from ckpt_fast.jobs.progress import shown
from ckpt_fast.jobs.worker import interruptibly
from ckpt_fast.ranks.world import get_rank_safe
from ckpt_fast.storage.files import Files

# Reserving so much for nothing does no harm; .metadata may be damaged and name any lengths.
_TRUSTED_NBYTES = 1 << 20
# What a file, not this process, is to blame for.
_DAMAGE = system.error_numbers("EIO", "EISDIR", "ENOTDIR", "EBADMSG", "EUCLEAN", "ENODATA")
# Many small reads share a block of this length.
_BLOCK_NBYTES = 64 << 10
# Less is read before it matters whether it passes the page cache.
MIN_DIRECT_NBYTES = 32 << 20
# Of this many extents the page cache is asked.
SAMPLES = 16
_U32 = struct.Struct("<I")


class ReadProgram:
    """The columns that ``native.read_extents`` takes, built extent by extent.

    Args:
        files: the checkpoint; extents' paths are names in it.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self.directory = files.directory
        self.nbytes = 0
        self._paths: dict[str, int] = {}
        self._file, self._offset, self._nbytes = array("q"), array("q"), array("q")
        self._address = array("q")
        self._range_file, self._range_offset = array("q"), array("q")
        self._range_nbytes, self._range_block = array("q"), array("q")
        self._range_of: dict[tuple[str, int], tuple[int, int]] = {}
        self._unlisted = 0  # how many of the ranges, the last ones, are not in it
        self._block_count = 0

    def add(self, extent: Extent, address: int) -> None:
        """Read ``extent`` to ``address``."""
        file = self._paths.setdefault(extent.path, len(self._paths))
        self._file.append(file)
        self._offset.append(extent.offset)
        self._nbytes.append(extent.nbytes)
        self._address.append(address)
        self.nbytes += extent.nbytes

    def add_runs(self, path: str, runs: Runs) -> None:
        """``add`` for every run of a file."""
        file, count = self._paths.setdefault(path, len(self._paths)), len(runs.offsets)
        self._file.extend(array("q", [file]) * count)
        self._offset.extend(runs.offsets)
        self._nbytes.extend(array("q", [runs.nbytes]) * count)
        self._address.extend(runs.addresses)
        self.nbytes += count * runs.nbytes

    def add_columns(
        self,
        paths: Sequence[str],
        file: array[int],
        offset: array[int],
        nbytes: array[int],
        address: array[int],
        block_nbytes: int | None,
    ) -> int:
        """``add`` for many extents of which no two share a byte, and ``check`` that each is one payload.

        Args:
            paths: of the files.
            file: for each extent, an index into ``paths``.
            offset, nbytes, address: one for each extent.
            block_nbytes: None if nothing is to be checked.

        Returns:
            The first of their blocks in what ``run`` returns; the others follow in the order of the extents.
        """
        number = {each: self._paths.setdefault(paths[each], len(self._paths)) for each in sorted(set(file))}
        files = array("q", map(number.__getitem__, file))
        self._file.extend(files)
        self._offset.extend(offset)
        self._nbytes.extend(nbytes)
        self._address.extend(address)
        self.nbytes += sum(nbytes)
        first = self._block_count
        if block_nbytes is not None:
            self._range_file.extend(files)
            self._range_offset.extend(offset)
            self._range_nbytes.extend(nbytes)
            self._range_block.extend(array("q", [block_nbytes]) * len(files))
            lengths = np.frombuffer(nbytes, np.int64)
            self._block_count += int((-(-lengths // block_nbytes)).sum())
            self._unlisted += len(files)
        return first

    def check(self, payload: Extent, block_nbytes: int) -> tuple[int, int]:
        """Of what is read, read the blocks of ``payload`` that it touches whole, for their checksums.

        Returns:
            (first, end) of the payload's blocks in what ``run`` returns.
        """
        if self._unlisted:
            self._list_ranges()
        known = self._range_of.get((payload.path, payload.offset))
        if known is not None:
            return known
        file = self._paths.setdefault(payload.path, len(self._paths))
        block_nbytes = max(block_nbytes, 1)
        self._range_file.append(file)
        self._range_offset.append(payload.offset)
        self._range_nbytes.append(payload.nbytes)
        self._range_block.append(block_nbytes)
        first = self._block_count
        self._block_count += -(-payload.nbytes // block_nbytes)
        self._range_of[payload.path, payload.offset] = (first, self._block_count)
        return first, self._block_count

    def _list_ranges(self) -> None:
        """Let ``check`` find the ranges that came in columns."""
        paths, end = list(self._paths), self._block_count
        for row in reversed(range(len(self._range_file) - self._unlisted, len(self._range_file))):
            first = end + -self._range_nbytes[row] // self._range_block[row]
            self._range_of[paths[self._range_file[row]], self._range_offset[row]] = (first, end)
            end = first
        self._unlisted = 0

    def is_cold(self) -> bool:
        """Whether the device would have to be asked for most of this, as the page cache says of samples."""
        paths = list(self._paths)
        pages = [row for row, nbytes in enumerate(self._nbytes) if nbytes >= mmap.PAGESIZE]
        largest = heapq.nlargest(SAMPLES, pages, key=self._nbytes.__getitem__)
        try:
            missing = sum(
                not is_cached(
                    os.path.join(self.directory, paths[self._file[row]]),
                    self._offset[row] + self._nbytes[row] // 2,
                )
                for row in largest
            )
        except (OSError, ValueError):  # reading will fail as well, and say why
            return False
        return 2 * missing > len(largest)

    def run(self, direct: bool = False) -> memoryview:
        """Read everything; returns the CRC-32 of every block, -1 for those that nothing touches.

        A signal's handler that raises ends it early.

        Args:
            direct: past the page cache, where the file system can.

        Raises:
            CheckpointNotFoundError: a data file is missing.
            CheckpointCorruptError: a data file ends early, or the device cannot read it.
            CheckpointError: the process may not read it, or has no resources left to.
        """
        if not len(self._file):
            return memoryview(array("q", [-1]) * self._block_count)
        self.files.fetch(self._paths)
        progress = native.Progress()
        read = functools.partial(
            native.read_extents,
            [os.path.join(self.directory, path) for path in self._paths],
            extent_file=self._file,
            extent_offset=self._offset,
            extent_nbytes=self._nbytes,
            extent_address=self._address,
            range_file=self._range_file,
            range_offset=self._range_offset,
            range_nbytes=self._range_nbytes,
            range_block=self._range_block,
            threads=settings.io_threads(),
            chunk_bytes=settings.chunk_bytes(),
            direct=direct,
            progress=progress,
        )

        def read_shown() -> bytes:
            facts = {"files": len(self._paths), "nbytes": self.nbytes, "direct": direct}
            with trace.span("read", **facts), trace.rate("read", lambda: progress.nbytes):
                return read()

        try:
            with self._shown(progress):
                return memoryview(interruptibly(read_shown, progress.stop)).cast("q")
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"a data file of the checkpoint is gone: {error.strerror}. Restore it, or load an "
                "earlier iteration."
            ) from error
        except OSError as error:
            if error.errno in _DAMAGE:
                raise CheckpointCorruptError(
                    f"{error.strerror}. The checkpoint in {self.directory} is damaged; load an earlier "
                    "iteration."
                ) from error
            raise CheckpointError(
                f"{error.strerror}. That says nothing about the checkpoint in {self.directory}: remove the "
                "cause and load again."
            ) from error

    def _shown(self, progress: native.Progress) -> contextlib.AbstractContextManager[None]:
        """A block during which the first rank's terminal shows how much is read."""
        if get_rank_safe() != 0:
            return contextlib.nullcontext()
        return shown(f"loading {self.directory}", lambda: (progress.nbytes, self.nbytes))


def is_cached(path: str, offset: int) -> bool:
    """Whether the page cache has the page at ``offset``.

    To the owner of the file, and to those who may write to it, the kernel tells; to others it says yes, and
    so does this where there is no such question (Windows).
    Unlike a read that does not wait, the question brings no page in.
    """
    mincore = getattr(system.c_library(), "mincore", None)
    if mincore is None:
        return True
    file = os.open(path, os.O_RDONLY | system.open_flags("O_CLOEXEC", "O_NONBLOCK"))
    try:
        begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(file, mmap.PAGESIZE, access=mmap.ACCESS_COPY, offset=begin) as page:
            at, resident = ctypes.c_char.from_buffer(page), ctypes.c_ubyte()
            asked = mincore(
                ctypes.c_void_p(ctypes.addressof(at)), ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(resident)
            )
            del at  # or the mapping could not be closed
            return asked != 0 or bool(resident.value & 1)
    finally:
        os.close(file)


class ByteArena:
    """Memory for small reads whose content Python looks at: extents in, ``bytes`` out."""

    def __init__(self, program: ReadProgram) -> None:
        self._program = program
        self._blocks: list[ctypes.Array[ctypes.c_char]] = []
        self._free = 0  # bytes left at the end of the last block
        self._reserved = 0
        self._file_nbytes: dict[str, int | None] = {}
        self._places: list[tuple[int, int, int]] = []  # (block, position, nbytes), by handle

    def add(self, extent: Extent) -> int:
        """Schedule ``extent``; returns the handle for ``content`` after the program has run.

        Raises:
            CheckpointCorruptError: the file ends before the extent does.
        """
        nbytes = extent.nbytes
        self._reserved += nbytes
        if self._reserved > _TRUSTED_NBYTES:
            self._require_in_file(extent)
        if nbytes > self._free or not self._blocks:
            self._free = max(nbytes, _BLOCK_NBYTES)
            self._blocks.append(ctypes.create_string_buffer(self._free))
        block = self._blocks[-1]
        position = len(block) - self._free
        self._free -= nbytes
        self._places.append((len(self._blocks) - 1, position, nbytes))
        self._program.add(extent, ctypes.addressof(block) + position)
        return len(self._places) - 1

    def _require_in_file(self, extent: Extent) -> None:
        """Do not reserve memory for a length that is itself damaged."""
        path = os.path.join(self._program.directory, extent.path)
        if extent.path not in self._file_nbytes:
            self._program.files.fetch([extent.path])
            self._file_nbytes[extent.path] = None
            with contextlib.suppress(OSError):  # then reading fails, and says so better
                self._file_nbytes[extent.path] = os.stat(path).st_size
        nbytes = self._file_nbytes[extent.path]
        if nbytes is not None and extent.offset + extent.nbytes > nbytes:
            raise CheckpointCorruptError(
                f"{path} should have {extent.nbytes} bytes at {extent.offset}, but the file ends at "
                f"{nbytes}. The checkpoint is damaged; load an earlier iteration."
            )

    def content(self, handle: int) -> bytes:
        """The bytes read."""
        block, position, nbytes = self._places[handle]
        return bytes(memoryview(self._blocks[block])[position : position + nbytes])

    def crc32(self, handle: int) -> int:
        """The bytes read, as a little-endian 32-bit number."""
        block, position, _ = self._places[handle]
        return int(_U32.unpack_from(self._blocks[block], position)[0])
