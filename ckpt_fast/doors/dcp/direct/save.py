# SPDX-License-Identifier: Apache-2.0
"""State dicts saved in torch DCP's files without ``dcp.save``: staged, written by a thread, committed.

``dcp.save`` plans with objects for every tensor, at every save. Here the first save of a structure decides
which rank saves what, and the pipeline compiles a save program. Both are kept with the process group, without
any tensor: later saves of the structure compare it, by a digest, and execute the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from ckpt_fast.doors.dcp.direct.division import Division, divide_alone, divide_together
from ckpt_fast.doors.dcp.direct.local_state import LocalState
from ckpt_fast.doors.dcp.steps import let_go
from ckpt_fast.format.types import FileRecord, ObjectShard, Shard, TensorShard
from ckpt_fast.pipeline.memory.forms import integers
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.save.objects import object_bytes
from ckpt_fast.pipeline.save.parts import Completion, Divided, SaveOptions, Share
from ckpt_fast.pipeline.save.plan import require_values
from ckpt_fast.pipeline.save.program import Prepared, ProgramCache, StructureCache
from ckpt_fast.pipeline.save.save import Save
from ckpt_fast.ranks.group import ControlGroup, PerGroup
from ckpt_fast.settings import Settings
from ckpt_fast.storage.files import absolute

# Structures that one process group is known to save: of a model, its optimizer, an average of it; each also
# as a copy that is written in the background. A structure takes about a kilobyte a tensor.
_MOST_STRUCTURES = 4


class KnownStructures:
    """What is known of the structures that a process group has saved last.

    Attributes:
        programs: their save programs.
        divisions: what this rank saves of them.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Let the next saves be as the first ones."""
        self.programs = ProgramCache(_MOST_STRUCTURES)
        self.divisions: StructureCache[Division] = StructureCache(_MOST_STRUCTURES)


_known = PerGroup(KnownStructures)


def forget(process_group: dist.ProcessGroup | None = None, *, no_dist: bool = False) -> None:
    """Local, on every rank. Let the next save of a process group divide and compile everything again."""
    group = ControlGroup.of_one() if no_dist else ControlGroup(process_group)
    _known.get(group, process_group).forget()


@without_collections
def start_save(
    state_dict: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    directory: str,
    options: SaveOptions | None = None,
    completion: Completion | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    write_beside: Callable[[str], Sequence[FileRecord]] = lambda _: (),
) -> Save:
    """Collective. Everything up to and including staging; the caller then runs ``write`` and ``commit``.

    The files are those of ``dcp.save`` with the default planner.

    Args:
        state_dict: nested, of DTensors, tensors and objects; or what gives it. A rank where that fails does
            not leave the others alone.
        directory: the same on every rank; an older checkpoint in it is replaced.
        options: see ``SaveOptions``; without ``programs``, those of earlier saves of the process group are
            used.
        completion: see ``Completion``.
        process_group: the ranks that save together; None means all.
        no_dist: this rank saves without any other.
        write_beside: see ``Share``.

    Raises:
        CheckpointError: on every rank, naming the rank that failed; nothing has been published.
    """
    # A save of torch's that failed elsewhere than in the writer has not said so.
    let_go()
    options = options or SaveOptions()
    group = ControlGroup.of_one() if no_dist else ControlGroup(process_group)
    known = _known.get(group, process_group)
    if options.programs is None:
        options = replace(options, programs=known.programs)
    collecting = _Collecting(state_dict, group, known, options, write_beside)
    job = Save(
        absolute(directory),
        collecting.share,
        options,
        completion,
        process_group,
    )
    job.talk_through(group)
    job.stage()
    collecting.learn(job.structure)
    return job


class _Collecting:
    """One rank's part of one save."""

    def __init__(
        self,
        source: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        group: ControlGroup,
        known: KnownStructures,
        options: SaveOptions,
        write_beside: Callable[[str], Sequence[FileRecord]],
    ) -> None:
        self._source = source
        self._group = group
        self._known = known
        self._options = options
        self._write_beside = write_beside
        self._structure: bytes | None = None
        self._division: Division | None = None

    def share(self) -> Share:
        """Local. What this rank brings; as last time, if it has the same structure."""
        state = LocalState(self._source() if callable(self._source) else self._source)
        options = self._options
        # What else a program is made for; a structure's division goes with it.
        made_for = (self._group.global_rank, options.snapshot, options.writers, options.separate)
        self._structure = state.structure(made_for)
        if self._structure is not None:
            self._division = self._known.divisions.find(self._structure)
        if self._division is None and self._group.size == 1:
            self._keep(divide_alone(state))
        division = self._division
        return Share(
            (self._prepared(state, division) or shards_of(state, division)) if division is not None else (),
            planner_data=division.planner_data if division is not None else None,
            write_beside=self._write_beside,
            division=division.token if division is not None else None,
            divide=lambda: self._divide(state),
        )

    def learn(self, program: bytes | None) -> None:
        """Local. Let the next save use the program of this one, which has been staged."""
        if self._division is not None:
            self._division.program = program

    def _divide(self, state: LocalState) -> Divided:
        division = divide_together(self._group, state)
        self._keep(division)
        return Divided(shards_of(state, division), division.planner_data)

    def _keep(self, division: Division) -> None:
        self._division = division
        if self._structure is not None:
            self._known.divisions.keep(self._structure, division)

    def _prepared(self, state: LocalState, division: Division) -> Prepared | None:
        programs, options = self._options.programs, self._options
        if programs is None:
            return None
        bound = options.host_buffer if options.host_buffer is not None else Settings.read().host_buffer_bytes
        return prepared_shards(state, division, programs, snapshot=options.snapshot, bound=bound)


def prepared_shards(
    state: LocalState, division: Division, programs: ProgramCache, *, snapshot: bool, bound: int | None
) -> Prepared | None:
    """Local. A rank's shards, for the program of an earlier save; None if there is none that suits.

    Args:
        state: what the rank has.
        division: what it saves of that; knows the program.
        programs: of earlier saves.
        snapshot, bound: see ``SaveProgram.suits``.

    Raises:
        UnsafeCheckpointError: an object could not be loaded again.
    """
    program = programs.find(division.program) if division.program else None
    if program is None or not program.suits(snapshot, bound):
        return None
    payloads = [object_bytes(state.values[number], state.names[number]) for number in division.objects]
    if not program.holds(payloads):
        return None
    tensors = list(map(state.values.__getitem__, division.tensors))
    pointers = state.described.addresses[integers(division.tensors)]
    return Prepared(program, pointers, payloads, lambda: tensors, tensors)


@without_collections
def shards_of(state: LocalState, division: Division) -> list[Shard]:
    """Local. What a rank saves of what it has.

    Raises:
        CheckpointMismatchError: a tensor has no memory for its values.
        UnsafeCheckpointError: an object could not be loaded again.
    """
    shards: list[Shard] = [
        ObjectShard(state.names[number], object_bytes(state.values[number], state.names[number]))
        for number in division.objects
    ]
    for number in division.tensors:
        name, tensor = state.names[number], state.values[number]
        require_values(name, tensor)
        offsets, shape = state.places[number] or ((0,) * tensor.dim(), tuple(tensor.shape))
        shards.append(TensorShard(name, tensor.detach(), offsets, shape))
    return shards
