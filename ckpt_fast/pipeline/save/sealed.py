# SPDX-License-Identifier: Apache-2.0
"""What stands in ``.metadata`` beside the manifest: a pickle and a table, made once for the same programs."""

from __future__ import annotations

import re
import struct
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ckpt_fast.format.table import TableBuilder, bound_to
from ckpt_fast.format.types import ItemRecord, RankRecord
from ckpt_fast.pipeline.save.encode import encode_metadata

# Pickled as four bytes, so is every length that later takes its place. The last byte is a mark that hardly
# any other number in the pickle has; if one does, the next mark is tried.
_INT = struct.Struct("<I")
_MARKS = (0x5A, 0x6B, 0x7C, 0x3D)
_MOST = 1 << 24
# With the room that an object has to grow, its length is still one of four bytes.
_LONGEST = 1 << 30


class EncodedContents(NamedTuple):
    """A table of contents as it is stored.

    Attributes:
        pickled: for everybody.
        table: of the pickle, for ckpt_fast; empty if there is none.
    """

    pickled: bytes
    table: bytes


def encode_contents(
    records: Sequence[RankRecord], planner_data: Mapping[str, Any] | None, *, partial: bool = False
) -> EncodedContents:
    """The table of contents of what all ranks have written.

    Args:
        records: of all ranks in rank order, with their items.
        planner_data, partial: see ``encode_metadata``.

    Raises:
        CheckpointMismatchError: see ``encode_metadata``.
    """
    items = (item for record in records for item in record.items)
    pickled, table = _encode(records, items, planner_data, partial)
    return EncodedContents(pickled, bound_to(table, pickled) if table else b"")


def _encode(
    records: Sequence[RankRecord],
    items: Iterable[ItemRecord],
    planner_data: Mapping[str, Any] | None,
    partial: bool,
) -> tuple[bytes, bytes]:
    builder = TableBuilder()
    pickled = encode_metadata(items, planner_data, partial=partial, table=builder)
    payloads = [offset for record in records for digests in record.digests for offset in digests.offset]
    begins = [item.extent.offset for record in records for item in record.items]
    if len(begins) != len(payloads):  # somebody else's records
        return pickled, b""
    return pickled, builder.encode([a == b for a, b in zip(begins, payloads, strict=True)]) or b""


class SealedMetadata:
    """A pickled ``.metadata``, and where in it the lengths of objects stand. All else depends on structure.

    Args:
        records: of all ranks in rank order, with their items.
        planner_data, partial: see ``encode_metadata``.

    Raises:
        CheckpointMismatchError: see ``encode_metadata``.
        ValueError: lengths cannot be told from other numbers.
    """

    def __init__(
        self,
        records: Sequence[RankRecord],
        planner_data: Mapping[str, Any] | None,
        *,
        partial: bool = False,
    ) -> None:
        self._programs = _programs(records)
        self._planner_data = planner_data
        self._partial = partial
        self._objects = [
            (rank, position)
            for rank, record in enumerate(records)
            for position, item in enumerate(record.items)
            if item.dtype is None
        ]
        if len(self._objects) >= _MOST:
            raise ValueError(f"{len(self._objects)} objects are too many")
        if any(records[rank].items[position].extent.nbytes > _LONGEST for rank, position in self._objects):
            raise ValueError(f"an object is longer than {_LONGEST} bytes")
        for mark in _MARKS:
            pickled, table = _encode(records, _marked(records, mark), planner_data, partial)
            places = _places(pickled, mark, len(self._objects))
            if places is not None:
                # A seventh of the memory, for as long as the program is kept.
                self._pickled, self._table = (zlib.compress(each, 1) for each in (pickled, table))
                self._places = array("q", places)
                return
        raise ValueError("the lengths of objects cannot be told from other numbers")

    def fits(
        self, records: Sequence[RankRecord], planner_data: Mapping[str, Any] | None, *, partial: bool = False
    ) -> bool:
        """Whether these ranks executed the same programs, and what was required of them then suffices."""
        return (
            self._programs == _programs(records)
            and self._planner_data == planner_data
            and (partial or not self._partial)
        )

    def encode(self, records: Sequence[RankRecord]) -> EncodedContents:
        """The table of contents of what the ranks have written now.

        Args:
            records: they ``fit``; their items are not needed.
        """
        pickled, table = bytearray(zlib.decompress(self._pickled)), zlib.decompress(self._table)
        for place, (rank, position) in zip(self._places, self._objects, strict=True):
            (digests,) = records[rank].digests
            _INT.pack_into(pickled, place, digests.nbytes[position])
        encoded = bytes(pickled)
        return EncodedContents(encoded, bound_to(table, encoded) if table else b"")


def _programs(records: Sequence[RankRecord]) -> list[str]:
    return [record.program for record in records]


def _marked(records: Sequence[RankRecord], mark: int) -> list[Any]:
    items, number = [], mark << 24
    for record in records:
        for item in record.items:
            if item.dtype is None:
                items.append(item._replace(extent=item.extent._replace(nbytes=number)))
                number += 1
            else:
                items.append(item)
    return items


def _places(pickled: bytes, mark: int, count: int) -> list[int] | None:
    """Where each of the marked numbers stands; None if one does not stand in exactly one place."""
    places = [-1] * count
    # "J": an integer of four bytes follows. Looking ahead finds those that overlap, too.
    for match in re.finditer(b"(?=J(...)" + re.escape(bytes([mark])) + b")", pickled, re.DOTALL):
        number = int.from_bytes(match[1], "little")
        if number < count:
            if places[number] >= 0:
                return None
            places[number] = match.start() + 1
    return None if -1 in places else places
