# SPDX-License-Identifier: Apache-2.0
"""Checks: is what a load reads what the save has written?"""

from __future__ import annotations

from typing import NamedTuple

from ckpt_fast.errors import CheckpointCorruptError
from ckpt_fast.format.types import Extent
from ckpt_fast.pipeline.load.index import CheckpointIndex, RawData
from ckpt_fast.pipeline.load.read import ByteArena, ReadProgram


class _Check(NamedTuple):
    """Checksums to compare once the data is in.

    Attributes:
        name: of the tensor or object.
        item: where it lies.
        first, end: its blocks, in what the read program returns.
        raw: what they must be.
        crc_handle: of the one that stands in the file, in the arena.
    """

    name: str
    item: Extent
    first: int
    end: int
    raw: RawData
    crc_handle: int | None


class Checks:
    """The checksums of what a program reads.

    Args:
        index: the checkpoint.
        program: what is read.
        arena: for checksums that stand in the files.
    """

    def __init__(self, index: CheckpointIndex, program: ReadProgram, arena: ByteArena) -> None:
        self._index, self._program, self._arena = index, program, arena
        self._checks: dict[int, _Check] = {}

    def add(self, name: str, item: Extent, raw: RawData) -> None:
        """Every payload that the program reads must match the checksums it was written with."""
        first, end = self._program.check(raw.extent, raw.block_nbytes)
        if first < end and first not in self._checks:
            handle = self._arena.add(raw.crc_extent) if raw.crc_extent is not None else None
            self._checks[first] = _Check(name, item, first, end, raw, handle)

    def compare(self, found: memoryview) -> None:
        """Raise CheckpointCorruptError for the first block that differs."""
        for check in self._checks.values():
            handle, expected = check.crc_handle, check.raw.crcs
            crcs = [self._arena.crc32(handle)] if handle is not None else expected
            assert crcs is not None
            mine = found[check.first : check.end].tolist()
            if mine == (crcs.tolist() if isinstance(crcs, memoryview) else crcs):
                continue
            for block, (crc, wanted) in enumerate(zip(mine, crcs, strict=True)):
                if crc not in (wanted, -1):
                    raw = check.raw
                    damaged = block_of(raw.extent, block, raw.block_nbytes)
                    raise CheckpointCorruptError(
                        damage_message(self._index, check.name, check.item, damaged, crc, wanted)
                    )


def damage_message(
    index: CheckpointIndex, name: str, item: Extent, block: Extent, crc: int, wanted: int
) -> str:
    """Text of the error for bytes that are not what was saved.

    Args:
        index: the checkpoint.
        name: of the tensor or object.
        item: where it is.
        block: the bytes.
        crc, wanted: their CRC-32, and what it should be.
    """
    save = index.manifest.save_id if index.manifest is not None else None
    origin = f", or of another save than {save}, whose .metadata it is" if save else ""
    end = block.offset + block.nbytes
    return (
        f"{name} in {index.directory}/{item.path} (bytes {block.offset} to {end}) has CRC-32 {crc:08x} "
        f"instead of {wanted:08x}: the file is damaged{origin}. Load an earlier iteration."
    )


def block_of(payload: Extent, number: int, block_nbytes: int) -> Extent:
    """The block of this number of a payload that is cut into blocks of ``block_nbytes``."""
    begin = number * block_nbytes
    nbytes = min(block_nbytes, payload.nbytes - begin)
    return Extent(payload.path, payload.offset + begin, nbytes)
