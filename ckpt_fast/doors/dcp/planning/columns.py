# SPDX-License-Identifier: Apache-2.0
"""The save plans of FastSavePlanner: bytes instead of torch DCP's objects for every tensor.

They travel as torch's plans do, between the same calls: what a rank has goes to the coordinator in the local
plan, what it saves of that comes back in the global plan, and what it has written goes to the coordinator as
the result of the write. Nothing is computed twice for the structures that a process has saved last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan

from ckpt_fast.doors.dcp.direct.division import (
    DescribedState,
    Division,
    choose,
    describe_state,
    division_of,
    mixed,
)
from ckpt_fast.doors.dcp.direct.local_state import LocalState
from ckpt_fast.doors.dcp.direct.save import prepared_shards, shards_of
from ckpt_fast.format.columns.records import encode_record, join_records
from ckpt_fast.format.manifest import Manifest, new_save_id
from ckpt_fast.format.types import RankRecord, Shard
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.save.program import Prepared, ProgramCache, StructureCache
from ckpt_fast.pipeline.save.sealed import SealedMetadata

# A model, its optimizer, an average of it; each alone or with the others.
_MOST_STRUCTURES = 4


@dataclasses.dataclass
class TakesColumns(StorageMeta):
    """Tells a planner that its storage takes plans in columns."""


class OwnPart(NamedTuple):
    """What a rank saves, in the global plan.

    Attributes:
        numbers: those of its shards and objects, in an array of int64.
        nbytes: of the tensors among them.
    """

    numbers: bytes
    nbytes: int


class _Known:
    """What this process knows of the structures that it saved last. No tensors."""

    def __init__(self) -> None:
        self.described: StructureCache[DescribedState] = StructureCache(_MOST_STRUCTURES)
        self.divided: StructureCache[tuple[list[OwnPart], dict[str, Any]]] = StructureCache(_MOST_STRUCTURES)
        self.divisions: StructureCache[Division] = StructureCache(_MOST_STRUCTURES)
        self.programs = ProgramCache(_MOST_STRUCTURES)
        self.sealed: StructureCache[SealedMetadata] = StructureCache(_MOST_STRUCTURES)


_known = _Known()


def forget() -> None:
    """Local. Let the next saves plan and compile everything again."""
    global _known
    _known = _Known()


class ColumnPlan:
    """One rank's part of one save.

    Args:
        state_dict: nested; of tensors of any kind and objects.

    Raises:
        CheckpointMismatchError: a tensor is not what its sharding says.
    """

    @without_collections
    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self._state = LocalState(state_dict)
        self._structure = self._state.structure(())
        self._key: bytes | None = None
        self._division: Division | None = None

    @property
    def leaves(self) -> list[Any]:
        """The tensors and objects of the state dict."""
        return self._state.leaves

    @without_collections
    def local(self) -> SavePlan:
        """What this rank could save.

        Raises:
            CheckpointMismatchError: two values have the same name.
        """
        described = _known.described.find(self._structure) if self._structure is not None else None
        if described is None:
            described = describe_state(self._state)
            if self._structure is not None:
                _known.described.keep(self._structure, described)
        return SavePlan([], planner_data=described)

    @without_collections
    def shards(
        self, plan: SavePlan, bound: int | None, options: tuple[Any, ...]
    ) -> Sequence[Shard] | Prepared:
        """What this rank saves; for the program of an earlier save, if there is one that suits.

        Args:
            plan: as the coordinator has made it.
            bound: see ``Waves``.
            options: what else decides where bytes go.

        Raises:
            CheckpointMismatchError: a tensor has no memory for its values.
            UnsafeCheckpointError: an object could not be loaded again.
        """
        part = plan.planner_data
        if not isinstance(part, OwnPart):
            raise mixed()
        if self._structure is not None:
            key = self._structure + part.numbers + repr(options).encode()
            self._key = hashlib.blake2b(key, digest_size=16).digest()
            self._division = _known.divisions.find(self._key)
        if self._division is None:
            numbers = array("q")
            numbers.frombytes(part.numbers)
            self._division = division_of(self._state, "", numbers, {})
        prepared = prepared_shards(self._state, self._division, _known.programs, snapshot=False, bound=bound)
        return prepared or shards_of(self._state, self._division)

    def written(self, record: RankRecord, structure: bytes | None) -> bytes:
        """What the coordinator needs to know of what this rank has written.

        Args:
            record: of it.
            structure: names its save program.
        """
        if self._key is not None and self._division is not None:
            self._division.program = structure
            _known.divisions.keep(self._key, self._division)
        return encode_record(record)


def programs() -> ProgramCache:
    """The save programs of the structures that are known."""
    return _known.programs


class SavedMetadata(Metadata):
    """torch DCP's metadata of a save that is planned in columns: unpickled once somebody looks at it.

    Args:
        paths: torch DCP's name to path mapping.
        storage_meta: the save.
        pickled: the content of ``.metadata``, once the checkpoint is sealed.
    """

    def __init__(
        self,
        paths: Mapping[str, Any] | None = None,
        storage_meta: StorageMeta | None = None,
        pickled: bytes = b"",
    ) -> None:
        self._paths = paths
        self._pickled = pickled
        self.storage_meta = storage_meta

    def seal(self, records: Sequence[bytes]) -> tuple[bytes, Manifest]:
        """Coordinator. The table of contents, and the manifest of the save.

        Args:
            records: of all ranks in rank order.

        Raises:
            CheckpointMismatchError: see ``require_complete``.
        """
        world = join_records(records)
        assert world.items is not None
        key = pickle.dumps(world.programs)
        sealed = _known.sealed.find(key)
        if sealed is None or not sealed.fits(world.programs, self._paths):
            made_by = world.programs if all(world.programs) else []
            sealed = SealedMetadata(world.items, made_by, self._paths)
            if made_by:
                _known.sealed.keep(key, sealed)
        contents = sealed.encode(world)
        self._pickled = contents.pickled
        return contents.pickled, Manifest(
            new_save_id(), world.files, [contents.digests], encoded_table=contents.table
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return SavedMetadata, (None, self.storage_meta, self._pickled)

    def _look(self, name: str) -> Any:
        if self._pickled:
            metadata = pickle.loads(self._pickled)
            whole = {field.name: getattr(metadata, field.name, None) for field in _FIELDS}
            vars(self).update(whole | vars(self))
        return vars(self).get(name)


_FIELDS = dataclasses.fields(Metadata)


def _field(name: str) -> property:
    def get(metadata: SavedMetadata) -> Any:
        return vars(metadata)[name] if name in vars(metadata) else metadata._look(name)

    def put(metadata: SavedMetadata, value: Any) -> None:
        vars(metadata)[name] = value

    return property(get, put)


for _each in _FIELDS:
    setattr(SavedMetadata, _each.name, _field(_each.name))


@without_collections
def divide(plans: Sequence[SavePlan], *, is_strict: bool = True) -> tuple[list[SavePlan], SavedMetadata]:
    """Coordinator. The global plan, and what will be the checkpoint's metadata.

    Args:
        plans: the local ones, in rank order.
        is_strict: see ``divide`` of ``division``.

    Raises:
        CheckpointError: some ranks have plans of another planner.
        CheckpointMismatchError: ranks disagree on a tensor, or two values have the same name.
    """
    described = [plan.planner_data for plan in plans]
    if not all(isinstance(each, DescribedState) for each in described):
        raise mixed()
    key = hashlib.blake2b(pickle.dumps((described, is_strict), 5), digest_size=16).digest()
    known = _known.divided.find(key)
    if known is None:
        chosen = choose(described, is_strict=is_strict)
        numbers = [each.tobytes() for each in chosen.numbers]
        known = [OwnPart(*each) for each in zip(numbers, chosen.nbytes, strict=True)], chosen.paths
        _known.divided.keep(key, known)
    parts, paths = known
    divided = [dataclasses.replace(plan, planner_data=part) for plan, part in zip(plans, parts, strict=True)]
    return divided, SavedMetadata(paths)
