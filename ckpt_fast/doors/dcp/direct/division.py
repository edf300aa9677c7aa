# SPDX-License-Identifier: Apache-2.0
"""Which rank saves what: every shard and object once, the replicated ones divided by bytes."""

from __future__ import annotations

import json
import secrets
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ckpt_fast.doors.dcp.direct.local_state import LocalState
from ckpt_fast.errors import CheckpointError, CheckpointMismatchError
from ckpt_fast.format.columns.items import Items, encode_items, join_items, row_count
from ckpt_fast.format.columns.lists import Ints
from ckpt_fast.format.types import Extent, ItemRecord
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.ranks.group import ControlGroup


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
    return division_of(state, "", range(len(state.names)), state.paths())


@without_collections
def divide_together(group: ControlGroup, state: LocalState) -> Division:
    """Collective. All ranks agree on who saves what; returns this rank's part.

    Raises:
        CheckpointMismatchError: on every rank: ranks disagree on a tensor, or two values have the same name.
    """
    found: list[tuple[str, array[int], dict[str, Any]]] = []

    def decide() -> None:
        token = secrets.token_hex(8)
        chosen = choose([each.value for each in local if each.value is not None])
        for rank, numbers in enumerate(chosen.numbers):
            found.append((token, numbers, {} if rank else chosen.paths))

    local = group.collect(lambda: describe_state(state))
    group.decide(decide, local)
    return division_of(state, *group.scatter(found))


class DescribedState(NamedTuple):
    """What a rank could save, as it tells the coordinator: shards and objects, and torch DCP's paths."""

    items: bytes
    paths: bytes

    def __getitem__(self, key: Any) -> Any:
        """Only a coordinator that plans with torch looks up names, as in what torch's planner has made.

        Raises:
            CheckpointError: see ``mixed``.
        """
        if isinstance(key, str | bytes):
            raise mixed()
        return tuple.__getitem__(self, key)


def mixed() -> CheckpointError:
    """The error for ranks of which some describe their state to another planner."""
    return CheckpointError(
        "some ranks plan this save with FastSavePlanner and others do not; use one planner, with the same "
        "arguments, on all of them, or call ckpt_fast.install() on every rank"
    )


def describe_state(state: LocalState) -> DescribedState:
    """Local. What the coordinator needs to know of a rank's state.

    Raises:
        CheckpointMismatchError: two values have the same name.
    """
    return DescribedState(encode_items(_entries(state), ()), _encoded_paths(state.paths()))


class Chosen(NamedTuple):
    """Who saves what.

    Attributes:
        numbers: for each rank, of what it saves.
        nbytes: for each rank, of the tensors among that.
        paths: torch DCP's name to path mapping.
    """

    numbers: list[array[int]]
    nbytes: list[int]
    paths: dict[str, Any]


def choose(described: Sequence[DescribedState], *, is_strict: bool = True) -> Chosen:
    """Coordinator. Divide what the ranks have described, in rank order.

    Args:
        described: by each rank.
        is_strict: see ``divide``.

    Raises:
        CheckpointMismatchError: see ``divide``.
    """
    encoded = [each.items for each in described]
    items, counts = join_items(encoded), [row_count(each) for each in encoded]
    numbers, first, nbytes = divide(items, counts, is_strict=is_strict), 0, []
    for count, chosen in zip(counts, numbers, strict=True):
        nbytes.append(int(items.rows["nbytes"][first : first + count][chosen].sum()))
        first += count
    return Chosen(numbers, nbytes, _joined_paths([each.paths for each in described]))


def divide(items: Items, counts: Sequence[int], *, is_strict: bool = True) -> list[array[int]]:
    """For each rank, the numbers of those of its shards and objects that it saves, ascending.

    What several ranks have goes, the largest first, to the one of them with the fewest bytes so far.

    Args:
        items: what all ranks could save.
        counts: how many of them are of each rank, in rank order.
        is_strict: refuse disagreement on what several ranks have. Otherwise only on what is saved of it, and
            each thing is saved by the rank that torch's planner would choose: values may differ, too.

    Raises:
        CheckpointMismatchError: ranks disagree on a tensor's shape or dtype, or whether there is a tensor.
    """
    rows, ends = items.rows, np.cumsum(np.array(counts, np.int64))
    rank = np.repeat(np.arange(len(counts)), counts)
    _require_agreement(items, rank, np.arange(len(rows)), on_tensors=is_strict)
    # How long objects are is known once they are pickled; they are small.
    nbytes = np.where(items.are_objects, 1, rows["nbytes"])
    place = rows["name"].astype(np.int64) * len(items.lists) + rows["place"]
    order = np.argsort(place, kind="stable")
    is_new = np.concatenate([[True], place[order][1:] != place[order][:-1]])[: len(order)]
    # Of what a rank has twice, the first counts.
    kept = is_new | np.concatenate([[True], rank[order][1:] != rank[order][:-1]])[: len(order)]
    held, begins = order[kept], np.flatnonzero(is_new[kept])
    copies = _Copies(held, begins, np.diff(np.concatenate([begins, [len(held)]])))
    if is_strict:
        chosen = _spread(copies, rank, nbytes)
    else:
        chosen = _spread_as_torch_does(copies, rank, items)
        _require_agreement(items, rank, chosen)
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return [
        array("q", (part - begin).tolist())
        for part, begin in zip(parts, [0, *ends[:-1].tolist()], strict=True)
    ]


class _Copies(NamedTuple):
    """Rows that are of the same piece or object, in groups.

    Attributes:
        rows: one group after the other, each in rank order.
        begins, counts: of each group.
    """

    rows: Ints
    begins: Ints
    counts: Ints

    @property
    def firsts(self) -> Ints:
        """The first row of each group."""
        return self.rows[self.begins]

    def of(self, group: int) -> Ints:
        """The rows of a group."""
        return self.rows[self.begins[group] : self.begins[group] + self.counts[group]]


def _spread(copies: _Copies, rank: Ints, nbytes: Ints) -> Ints:
    """One row of each group, ascending: the largest first, each to the rank with the fewest bytes so far."""
    firsts, shared = copies.firsts, np.flatnonzero(copies.counts > 1)
    chosen = firsts.copy()
    alone = firsts[copies.counts == 1]
    loads = np.zeros(rank.max(initial=0) + 1, np.int64)
    np.add.at(loads, rank[alone], nbytes[alone])
    for group in shared[np.lexsort((firsts[shared], -nbytes[firsts[shared]]))].tolist():
        candidates = copies.of(group)
        chosen[group] = candidates[loads[rank[candidates]].argmin()]
        loads[rank[chosen[group]]] += nbytes[candidates[0]]
    return np.sort(chosen)


def _spread_as_torch_does(copies: _Copies, rank: Ints, items: Items) -> Ints:
    """One row of each group, ascending, by the rules of torch's ``dedup_save_plans``.

    Each in the order in which they first occur goes to the rank with the fewest bytes so far. Of a piece, the
    bytes of the whole tensor count, as its last rank describes it; of anything without bytes, one.
    """
    lasts = copies.rows[copies.begins + copies.counts - 1]
    widths = np.array([0 if dtype is None else dtype.itemsize for dtype in items.dtypes], np.int64)
    nbytes = items.lists.products[items.rows["shape"][lasts]] * widths[items.rows["dtype"][lasts]]
    nbytes = np.maximum(nbytes, 1)
    chosen = copies.firsts
    order = np.argsort(chosen, kind="stable")
    loads = np.zeros(rank.max(initial=0) + 1, np.int64)
    done = 0
    for at in np.flatnonzero(copies.counts[order] > 1).tolist():
        alone = order[done:at]
        np.add.at(loads, rank[chosen[alone]], nbytes[alone])
        group, done = order[at], at + 1
        candidates = copies.of(group)
        chosen[group] = candidates[loads[rank[candidates]].argmin()]
        loads[rank[chosen[group]]] += nbytes[group]
    return np.sort(chosen)


def _require_agreement(items: Items, rank: Ints, among: Ints, *, on_tensors: bool = True) -> None:
    """Check that rows of the same name are of the same tensor, or of objects.

    Args:
        items: what all ranks could save.
        rank: of each row.
        among: the rows to compare, ascending.
        on_tensors: compare dtypes and shapes too.
    """
    rows, names = items.rows, items.rows["name"][among]
    first = np.zeros(len(items.names), np.int64)
    first[names[::-1]] = among[::-1]
    known = first[names]
    differs = items.are_objects[among] != items.are_objects[known]
    if on_tensors:
        for column in ("dtype", "shape"):
            differs |= rows[column][among] != rows[column][known]
    if differs.any():
        at = int(differs.argmax())
        row = int(among[at])
        raise CheckpointMismatchError(
            f"ranks disagree on {items.names[rows['name'][row]]}: {_described(items, int(known[at]))} on "
            f"one, {_described(items, row)} on rank {rank[row]}. Nothing was saved; check that all ranks "
            "build the same model."
        )


def _described(items: Items, row: int) -> str:
    dtype, shape = items.rows["dtype"][row], items.rows["shape"][row]
    return f"a tensor of {items.dtypes[dtype]} and shape {items.lists[shape]}" if dtype else "an object"


def _entries(state: LocalState) -> list[ItemRecord]:
    """What the coordinator needs to know of each shard and object."""
    entries = []
    for name, value, place in zip(state.names, state.values, state.places, strict=True):
        if place == ():
            entries.append(ItemRecord(name, Extent("", 0, 0), None, (), (), ()))
            continue
        offsets, shape = place or ((0,) * value.dim(), tuple(value.shape))
        nbytes = value.numel() * value.dtype.itemsize
        entries.append(ItemRecord(name, Extent("", 0, nbytes), value.dtype, tuple(offsets), (), tuple(shape)))
    return entries


def _encoded_paths(paths: Mapping[str, tuple[str | int, ...]]) -> bytes:
    return zlib.compress(json.dumps(paths, separators=(",", ":")).encode(), 1)


def _joined_paths(encoded: Sequence[bytes]) -> dict[str, tuple[str | int, ...]]:
    """The paths of all ranks, most of which have the same; where they differ, those of the first."""
    paths: dict[str, tuple[str | int, ...]] = {}
    for each in reversed(dict.fromkeys(encoded)):
        paths |= {name: tuple(path) for name, path in json.loads(zlib.decompress(each)).items()}
    return paths


def division_of(state: LocalState, token: str, numbers: Iterable[int], paths: dict[str, Any]) -> Division:
    """Local. The division in which a rank saves the shards and objects of these numbers."""
    tensors, objects = array("q"), array("q")
    for number in numbers:
        (objects if state.places[number] == () else tensors).append(number)
    return Division(token, tensors, objects, paths)
