# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of ckpt_fast: every file, and where a file is damaged every item, against its checksums."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import torch

from ckpt_fast import native
from ckpt_fast.errors import CheckpointCorruptError
from ckpt_fast.format.archive import tensor_archive
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.format.types import Extent, FileRecord
from ckpt_fast.jobs.progress import shown
from ckpt_fast.pipeline.load.complete import crc32_of
from ckpt_fast.pipeline.load.entries.kinds import Piece, SavedTensor
from ckpt_fast.pipeline.load.entries.pickled import PickledEntries
from ckpt_fast.pipeline.load.index import CheckpointIndex, RawData
from ckpt_fast.verification.content import archive_problem, block_crcs, whole_archive
from ckpt_fast.verification.findings import Findings, length_finding
from ckpt_fast.verification.places import is_data_file
from ckpt_fast.verification.report import State

# One item: its name, the tensor and piece (both None for an object), and where it is.
_Item = tuple[str, SavedTensor | None, Piece | None, Extent]


def check_own(found: Findings, index: CheckpointIndex, records: Sequence[FileRecord], by: str = "") -> None:
    """Compare the files of a checkpoint with their records, and its items with the files.

    Args:
        found: takes the findings.
        index: the table of contents.
        records: of its files.
        by: who keeps the records, for the details.
    """
    for record in records:
        _check_file(found, record, by)
    items = list(_items(found, index))
    damaged: dict[str, list[_Item]] = {}
    for item in items:
        name, _, piece, extent = item
        offsets = piece.offsets if piece is not None else None
        state = _state_by_file(found, extent)
        if state is not None:
            found.item(name, offsets, extent, *state)
        else:
            damaged.setdefault(extent.path, []).append(item)
    for path, inside in damaged.items():
        with found.fetched(path) as local, open(local, "rb") as file:
            for item in inside:
                _check_item(found, index, file, item)


def disagreements(index: CheckpointIndex) -> Iterator[str]:
    """Names about which the table and the pickle in ``.metadata`` disagree, as sentences."""
    table = index.table
    if table is None:
        return
    pickled = PickledEntries(index.metadata)
    for name in dict.fromkeys((*table.names, *pickled.names)):
        mine, other = ((each.tensor(name), each.object(name)) for each in (table, pickled))
        if _sorted(mine[0]) != _sorted(other[0]) or mine[1] != other[1]:
            yield f"table and pickle disagree on {name}"


def uncovered(tensor: SavedTensor) -> str | None:
    """What is wrong if the pieces of a tensor leave some of it out; None if they do not."""
    covered, whole = sum(math.prod(piece.sizes) for piece in tensor.pieces), math.prod(tensor.shape)
    return None if covered == whole else f"has pieces for {covered} of its {whole} elements"


def _sorted(tensor: SavedTensor | None) -> SavedTensor | None:
    return None if tensor is None else tensor._replace(pieces=sorted(tensor.pieces))


def _check_file(found: Findings, record: FileRecord, by: str) -> None:
    path = record.path
    wrong = length_finding(found.sizes.get(path), record.nbytes, by)
    if wrong is not None:
        found.file(path, *wrong)
        return
    if is_data_file(path) and not found.deep:
        found.file(path, State.UNREAD)
        return
    try:
        with found.fetched(path) as local:
            crc = _crc32_shown(local, os.path.join(found.files.directory, path), record.nbytes)
            if crc == record.crc32:
                found.file(path, State.SOUND)
                return
            is_other = not is_data_file(path) and _is_whole(local)
    except OSError as error:
        found.file(path, State.UNCHECKED, f"cannot be read ({error.strerror or error})")
        return
    state = State.SWAPPED if is_other else State.FLIPPED
    found.file(path, state, f"has CRC-32 {crc:08x} instead of {record.crc32:08x}{by}")


def _crc32_shown(local: str, name: str, nbytes: int) -> int:
    """The CRC-32 of a file; a terminal shows how far its reading is."""
    progress = native.Progress()
    with shown(f"verifying {name}", lambda: (progress.nbytes, nbytes)):
        return crc32_of(local, nbytes, progress)


def _is_whole(path: str) -> bool:
    with open(path, "rb") as file:
        return whole_archive(file.read())


def _items(found: Findings, index: CheckpointIndex) -> Iterator[_Item]:
    for name in index.names:
        try:
            if index.shape(name) is None:
                yield name, None, None, index.object_extent(name)
                continue
            tensor = index.tensor(name)
        except CheckpointCorruptError as error:
            found.file(METADATA_FILE, State.FLIPPED, f"is damaged ({error})")
            continue
        lacking = uncovered(tensor)
        if lacking is not None:
            found.item(name, None, Extent("", 0, 0), State.MISSING, lacking)
        for piece in tensor.pieces:
            yield name, tensor, piece, piece.item


def _state_by_file(found: Findings, extent: Extent) -> tuple[State, str] | None:
    """What the state of its file says about an item; None if the item must be looked at."""
    nbytes, state = found.sizes.get(extent.path), found.state_of(extent.path)
    if nbytes is None:
        return State.MISSING, "its file is missing"
    if nbytes < extent.offset + extent.nbytes:
        return State.TRUNCATED, f"its file ends at {nbytes}"
    if state in (State.SOUND, State.UNREAD):
        return state, ""
    if state is State.UNCHECKED:
        return State.UNCHECKED, "its file cannot be read"
    return None if found.deep else (State.UNREAD, "")


def _check_item(found: Findings, index: CheckpointIndex, file: BinaryIO, item: _Item) -> None:
    name, tensor, piece, extent = item
    offsets = piece.offsets if piece is not None else None
    try:
        state, detail = _state_of_item(index, file, tensor, piece, extent)
    except CheckpointCorruptError as error:
        state, detail = State.FLIPPED, str(error)
    found.item(name, offsets, extent, state, detail)


def _state_of_item(
    index: CheckpointIndex, file: BinaryIO, tensor: SavedTensor | None, piece: Piece | None, extent: Extent
) -> tuple[State, str]:
    raw = index.payload_of(extent)
    if raw is None and tensor is not None and piece is not None:
        raw = index.locate([(tensor.dtype, piece)])[extent]
    if raw is None or raw.crcs is None:  # of the time before the manifest
        problem = archive_problem(file, extent.offset, extent.nbytes)
        return (State.SOUND, "") if problem is None else (State.FLIPPED, problem)
    wrong = _wrong_block(file, raw)
    if wrong is not None:
        # Of an item as a whole not all bytes are in its own checksums: what differs may be one of the others.
        if raw.extent != extent and archive_problem(file, extent.offset, extent.nbytes) is None:
            return State.SWAPPED, f"{wrong}, but is whole by its own checksum: it is of another save"
        return State.FLIPPED, wrong
    if tensor is not None and piece is not None and raw.extent != extent:
        return _state_of_frame(file, tensor.dtype, piece, raw)
    return State.SOUND, ""


def _wrong_block(file: BinaryIO, raw: RawData) -> str | None:
    assert raw.crcs is not None
    offset, nbytes = raw.extent.offset, raw.extent.nbytes
    for number, (crc, wanted) in enumerate(
        zip(block_crcs(file, offset, nbytes, raw.block_nbytes), raw.crcs, strict=True)
    ):
        if crc != wanted:
            begin = offset + number * raw.block_nbytes
            end = min(begin + raw.block_nbytes, offset + nbytes)
            return f"has CRC-32 {crc:08x} instead of {wanted:08x} (bytes {begin} to {end})"
    return None


def _state_of_frame(file: BinaryIO, dtype: torch.dtype, piece: Piece, raw: RawData) -> tuple[State, str]:
    """Of an item whose elements are right: whether the archive around them is, which stock readers parse."""
    archive = tensor_archive(dtype, piece.sizes)
    file.seek(piece.item.offset)
    head = file.read(len(archive.head))
    crc = 0
    for _ in range(0, raw.extent.nbytes, raw.block_nbytes):
        left = raw.extent.offset + raw.extent.nbytes - file.tell()
        crc = zlib.crc32(file.read(min(raw.block_nbytes, left)), crc)
    file.seek(raw.extent.offset + raw.extent.nbytes)
    tail = bytearray(archive.tail)
    for at in archive.crc_offsets:
        struct.pack_into("<I", tail, at, crc)
    if head != archive.head or file.read(len(tail)) != tail:
        return State.FLIPPED, "its elements are right, the archive around them is damaged"
    return State.SOUND, ""
