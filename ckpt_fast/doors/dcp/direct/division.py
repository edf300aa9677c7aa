# SPDX-License-Identifier: Apache-2.0
"""Which rank saves what: every shard and object once, the replicated ones divided by bytes."""

from __future__ import annotations

import secrets
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckpt_fast.doors.dcp.direct.local_state import LocalState
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.ranks.group import ControlGroup

_Offsets = tuple[int, ...]


class Entry(NamedTuple):
    """A shard or object that a rank could save, as the coordinator needs to know it.

    Attributes:
        name: of the whole tensor, or of the object.
        whole: the tensor's shape and dtype; None for an object.
        offsets, nbytes: of the shard.
    """

    name: str
    whole: tuple[tuple[int, ...], str] | None
    offsets: _Offsets | None
    nbytes: int


@dataclass
class Division:
    """What one rank saves of a structure. Holds no tensors.

    Attributes:
        token: of the agreement, the same on all ranks; "" for a rank that saves alone.
        tensors, objects: their numbers in the rank's ``LocalState``.
        planner_data: torch DCP's name to path mapping, of all ranks; the coordinator's counts.
        program: the structure of the save program; None until there is one.
    """

    token: str
    tensors: array[int]
    objects: array[int]
    planner_data: dict[str, Any]
    program: bytes | None = None


def divide_alone(state: LocalState) -> Division:
    """Local. A rank that saves without others saves all it has.

    Raises:
        CheckpointMismatchError: two values have the same name.
    """
    return _division(state, "", range(len(state.names)), state.paths())


@without_collections
def divide_together(group: ControlGroup, state: LocalState) -> Division:
    """Collective. All ranks agree on who saves what; returns this rank's part.

    Raises:
        CheckpointMismatchError: on every rank: ranks disagree on a tensor, or two values have the same name.
    """
    found: list[tuple[str, list[int], dict[str, Any]]] = []

    def decide() -> None:
        token = secrets.token_hex(8)
        paths: dict[str, Any] = {}
        values = [each.value for each in local if each.value is not None]
        for _, own in reversed(values):
            paths |= own
        for rank, numbers in enumerate(divide([entries for entries, _ in values])):
            found.append((token, numbers, {} if rank else paths))

    local = group.collect(lambda: (_entries(state), state.paths()))
    group.decide(decide, local)
    return _division(state, *group.scatter(found))


def divide(ranks: Sequence[Sequence[Entry]]) -> list[list[int]]:
    """For each rank, the numbers of those of its entries that it saves.

    What several ranks have goes, the largest first, to the one of them with the fewest bytes so far.

    Args:
        ranks: all ranks' entries.

    Raises:
        CheckpointMismatchError: ranks disagree on a tensor's shape or dtype, or whether there is a tensor.
    """
    holders: dict[tuple[str, _Offsets | None], dict[int, int]] = defaultdict(dict)
    known: dict[str, Any] = {}
    for rank, entries in enumerate(ranks):
        for number, entry in enumerate(entries):
            if known.setdefault(entry.name, entry.whole) != entry.whole:
                raise CheckpointMismatchError(
                    f"ranks disagree on {entry.name}: {_described(known[entry.name])} on one, "
                    f"{_described(entry.whole)} on rank {rank}. Nothing was saved; check that all ranks "
                    "build the same model."
                )
            holders[entry.name, entry.offsets].setdefault(rank, number)
    loads = [0] * len(ranks)
    chosen: list[list[int]] = [[] for _ in ranks]
    replicated = []
    for held in holders.values():
        rank, number = next(iter(held.items()))
        if len(held) > 1:
            replicated.append((ranks[rank][number].nbytes, held))
        else:
            loads[rank] += ranks[rank][number].nbytes
            chosen[rank].append(number)
    for nbytes, held in sorted(replicated, key=lambda each: -each[0]):
        rank = min(held, key=loads.__getitem__)
        loads[rank] += nbytes
        chosen[rank].append(held[rank])
    return [sorted(numbers) for numbers in chosen]


def _entries(state: LocalState) -> list[Entry]:
    entries = []
    for name, value, place in zip(state.names, state.values, state.places, strict=True):
        if place == ():
            # How long objects are is known once they are pickled; they are small.
            entries.append(Entry(name, None, None, 1))
            continue
        offsets, shape = place or ((0,) * value.dim(), tuple(value.shape))
        nbytes = value.numel() * value.dtype.itemsize
        entries.append(Entry(name, (shape, str(value.dtype)), offsets, nbytes))
    return entries


def _division(state: LocalState, token: str, numbers: Iterable[int], paths: dict[str, Any]) -> Division:
    tensors, objects = array("q"), array("q")
    for number in numbers:
        (objects if state.places[number] == () else tensors).append(number)
    return Division(token, tensors, objects, paths)


def _described(whole: tuple[tuple[int, ...], str] | None) -> str:
    return "an object" if whole is None else f"a tensor of {whole[1]} and shape {whole[0]}"
