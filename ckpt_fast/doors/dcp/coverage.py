# SPDX-License-Identifier: Apache-2.0
"""Whether a torch DCP load plan fills its destinations.

torch's planner asks for what saved pieces and destinations have in common, and counts nothing: where a piece
is missing, or in another place, a part of the destination would be left as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner

from ckpt_fast.doors.dcp.direct.local_state import regions_of
from ckpt_fast.doors.dcp.planning.planners import FastLoadPlanner
from ckpt_fast.errors import CheckpointCorruptError, CheckpointMismatchError
from ckpt_fast.format.consistency import Region, missing_message, require_apart

_Asked = dict[tuple[str, tuple[int, ...]], list[Region]]


class _Destination(NamedTuple):
    """A tensor, or this rank's part of one: its name, its place in the whole, its shape."""

    fqn: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def require_covered(plan: LoadPlan, planner: LoadPlanner, metadata: Metadata, directory: str) -> None:
    """Local. Check that every element of every destination is asked for, once.

    A destination is a tensor of the planner's state dict that is in the checkpoint. With
    ``allow_partial_load`` those that are not may be left out, but none may be filled in part. Of a planner
    that makes plans of its own, what it leaves out altogether is left out on purpose; where its destinations
    are not in its state dict, the regions asked for must fill the box around them.

    Raises:
        CheckpointCorruptError: the checkpoint lacks a part of a destination.
        CheckpointMismatchError: the plan asks for an element twice, or for more than the destination has.
    """
    asked: _Asked = defaultdict(list)
    for item in plan.items:
        if item.type != LoadItemType.BYTE_IO:
            place = tuple(item.dest_index.offset or (0,) * len(item.lengths))
            asked[item.dest_index.fqn, place].append(Region(tuple(item.dest_offsets), tuple(item.lengths)))
    makes_plan = getattr(type(planner), "create_local_plan", None)
    default = makes_plan in (DefaultLoadPlanner.create_local_plan, FastLoadPlanner.create_local_plan)
    known = set()
    for fqn, offsets, sizes in _destinations(planner):
        known.add((fqn, offsets))
        regions = asked.get((fqn, offsets), [])
        saved = metadata.state_dict_metadata.get(fqn)
        if regions or (default and isinstance(saved, TensorStorageMetadata)):
            _require_covered(_Destination(fqn, offsets, sizes), regions, directory)
    for fqn, offsets in asked.keys() - known:
        regions = asked[fqn, offsets]
        ends = [map(sum, zip(*region, strict=True)) for region in regions]
        reach = tuple(max(column) for column in zip(*ends, strict=True))
        _require_covered(_Destination(fqn, offsets, reach), regions, directory)


def _destinations(planner: LoadPlanner) -> Iterator[_Destination]:
    state = getattr(planner, "state_dict", None)
    for fqn, value in state.items() if isinstance(state, dict) else ():
        for region in regions_of(value):
            yield _Destination(fqn, region.offsets, region.sizes)


def _require_covered(destination: _Destination, regions: list[Region], directory: str) -> None:
    fqn, offsets, sizes = destination
    if regions == [Region((0,) * len(sizes), sizes)] or 0 in sizes:
        return
    regions = list(dict.fromkeys(regions))  # the checkpoint may have a piece more than once
    try:
        complete = require_apart(sizes, regions)
    except ValueError as error:
        raise CheckpointMismatchError(
            f"the load plan for {fqn} at {offsets}, from {directory}, makes no sense: {error}. Check the "
            "planner; torch's own makes no such plan."
        ) from error
    if not complete:
        raise CheckpointCorruptError(f"{directory}: {missing_message(fqn, offsets, sizes, regions)}")
