# SPDX-License-Identifier: Apache-2.0
"""The table of contents of a save: pickle, table and payloads, made once for the same programs."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.distributed.checkpoint import filesystem

from ckpt_fast.format.columns.complete import require_complete
from ckpt_fast.format.columns.items import Items, items_of
from ckpt_fast.format.columns.lists import Ints
from ckpt_fast.format.columns.metadata import set_object_nbytes, write_metadata
from ckpt_fast.format.columns.records import WorldRecord, encode_record, join_records
from ckpt_fast.format.table import bound_to, encode_table
from ckpt_fast.format.types import BlockDigests, ItemRecord, RankRecord
from ckpt_fast.pipeline.memory.garbage import without_collections


class EncodedContents(NamedTuple):
    """A table of contents as it is stored.

    Attributes:
        pickled: for everybody.
        table: of the pickle, for ckpt_fast; empty if there is none.
        digests: the payloads that the table has rows for, with their checksums.
    """

    pickled: bytes
    table: bytes
    digests: BlockDigests


def encode_metadata(
    records: Sequence[ItemRecord], planner_data: Mapping[str, Any] | None = None, *, partial: bool = False
) -> bytes:
    """The pickle in ``.metadata`` of items of any number of ranks; see ``SealedMetadata``."""
    return SealedMetadata(items_of(records), [], planner_data, partial=partial).pickled


def contents_of(
    records: Sequence[RankRecord], planner_data: Mapping[str, Any] | None = None, *, partial: bool = False
) -> EncodedContents:
    """The table of contents of what has been saved once, with all items; see ``SealedMetadata``.

    Args:
        records: of all ranks in rank order.
        planner_data, partial: see there.
    """
    world = join_records([encode_record(record) for record in records])
    assert world.items is not None
    return SealedMetadata(world.items, [], planner_data, partial=partial).encode(world)


class SealedMetadata:
    """What ``.metadata`` says of the items of all ranks. Only the lengths of objects differ between saves.

    The pickle is readable by torch DCP of any version from 2.6 on, and names no class of ours.

    Args:
        items: of all ranks.
        programs: the ranks' save programs, where later saves may use it again.
        planner_data: torch DCP's flattened-name to path mapping; None for Megatron-Core checkpoints.
        partial: see ``SaveOptions``.

    Raises:
        CheckpointMismatchError: see ``require_complete``.
    """

    @without_collections
    def __init__(
        self,
        items: Items,
        programs: Sequence[str],
        planner_data: Mapping[str, Any] | None,
        *,
        partial: bool = False,
    ) -> None:
        self._programs = list(programs)
        self._planner_data = planner_data
        self._partial = partial
        kept = require_complete(items, partial=partial)
        version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
        self.pickled, self._object_nbytes_at = write_metadata(items, kept, planner_data, version)
        self._table = encode_table(items, kept.is_left_out)
        self._paths, self._file = _sorted_paths(items)
        self._offset, self._nbytes = items.rows["payload"].copy(), items.rows["payload_nbytes"].copy()
        self._objects = np.flatnonzero(items.are_objects)

    def fits(
        self, programs: Sequence[str], planner_data: Mapping[str, Any] | None, *, partial: bool = False
    ) -> bool:
        """Whether these ranks executed the same programs, and what was required of them then suffices."""
        return (
            bool(self._programs)
            and self._programs == programs
            and self._planner_data == planner_data
            and (partial or not self._partial)
        )

    def encode(self, world: WorldRecord) -> EncodedContents:
        """The table of contents of what the ranks have written now.

        Args:
            world: of the programs that it fits; its items are not needed.
        """
        pickled = set_object_nbytes(self.pickled, self._object_nbytes_at, world.object_nbytes)
        nbytes = self._nbytes.copy()
        nbytes[self._objects] = world.object_nbytes
        digests = BlockDigests(self._paths, self._file, _array(self._offset), _array(nbytes), world.crcs)
        return EncodedContents(pickled, bound_to(self._table, pickled) if self._table else b"", digests)


def _sorted_paths(items: Items) -> tuple[list[str], array[int]]:
    """The data files in order, and which of them each row is in."""
    order = sorted(range(len(items.paths)), key=items.paths.__getitem__)
    place = np.zeros(len(order), np.uint32)
    place[order] = np.arange(len(order))
    file = array("I")
    file.frombytes(place[items.rows["file"]].tobytes())
    return [items.paths[number] for number in order], file


def _array(column: Ints) -> array[int]:
    values = array("q")
    values.frombytes(column.tobytes())
    return values
