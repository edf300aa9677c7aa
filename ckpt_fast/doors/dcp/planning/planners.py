# SPDX-License-Identifier: Apache-2.0
"""Planners for ``dcp.save`` and ``dcp.load`` that make no object for every tensor."""

from __future__ import annotations

import threading
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan

from ckpt_fast.doors.dcp.direct.load import DirectLoad
from ckpt_fast.doors.dcp.planning.columns import ColumnPlan, TakesColumns, divide
from ckpt_fast.doors.dcp.planning.wanted import Wanted, source_of


class FastSavePlanner(DefaultSavePlanner):
    """Plans ``dcp.save`` and ``dcp.async_save`` with FastStorageWriter in columns, and remembers the plan.

        dcp.save(state_dict, storage_writer=FastStorageWriter(path), planner=FastSavePlanner())

    What is saved, under which names, and how several ranks divide it, is what ``ckpt_fast.save`` does. A
    later save of the same structure (names, shapes, strides, dtypes, devices, sharding) by this process
    follows the plan of the earlier one, whatever planner object it uses. That takes about a kilobyte a tensor
    for each of the last four structures, and keeps no tensors.

    Everything else is planned as DefaultSavePlanner plans it: with another storage writer, with arguments
    other than the default ones, and by a subclass that overrides how plans are made or data is looked up.

    Args:
        flatten_state_dict, flatten_sharded_tensors, dedup_replicated_tensors, dedup_save_to_lowest_rank: as
            DefaultSavePlanner's.
        enable_plan_caching: no effect on plans in columns, which are always remembered.
    """

    # Refuse disagreement on what several ranks have, though only one of them saves it.
    _is_strict = True

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        super().__init__(
            flatten_state_dict,
            flatten_sharded_tensors,
            dedup_replicated_tensors,
            dedup_save_to_lowest_rank,
            enable_plan_caching,
        )
        # torch makes all calls for one save in one thread, and saves in the background may overlap.
        self._of_thread = threading.local()

    @property
    def columns(self) -> ColumnPlan | None:
        """This thread's save; None if it is planned as DefaultSavePlanner plans."""
        return getattr(self._of_thread, "columns", None)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Begin a save; called on every rank."""
        self._of_thread.columns = None
        plain = self.flatten_state_dict and self.flatten_sharded_tensors
        if (
            plain
            and not self.dedup_save_to_lowest_rank
            and isinstance(storage_meta, TakesColumns)
            and _is_as_made(self, FastSavePlanner, SAVE_METHODS)
        ):
            self._of_thread.columns = ColumnPlan(state_dict)
        else:
            super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        """What this rank could save."""
        columns = self.columns
        return columns.local() if columns is not None else super().create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Who saves what; called on the coordinator."""
        if self.columns is None:
            return super().create_global_plan(all_plans)
        return divide(all_plans, is_strict=self._is_strict)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """What this rank saves."""
        return new_plan if self.columns is not None else super().finish_plan(new_plan)

    def __getstate__(self) -> dict[str, Any]:
        # To the process that writes, with AsyncCheckpointerType.PROCESS.
        return {name: value for name, value in self.__dict__.items() if name != "_of_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _of_thread=threading.local())


class InstalledSavePlanner(FastSavePlanner):
    """A planner in the place of torch's. Of several ranks' copies it saves one, whatever the others are."""

    _is_strict = False


class FastLoadPlanner(DefaultLoadPlanner):
    """Plans ``dcp.load`` with FastStorageReader in columns.

        dcp.load(state_dict, storage_reader=FastStorageReader(path), planner=FastLoadPlanner())

    What is loaded, and what is refused, is what ``ckpt_fast.load`` says. Everything else is planned as
    DefaultLoadPlanner plans it: with another storage reader, from checkpoints of torch before 2.4, with
    arguments other than ``allow_partial_load``, and by a subclass that overrides how plans are made or data
    is placed.

    Args:
        flatten_state_dict, flatten_sharded_tensors, allow_partial_load: as DefaultLoadPlanner's.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
    ) -> None:
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)
        self.direct: DirectLoad | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Begin a load; called on every rank."""
        self.direct = None
        source = source_of(metadata)
        if (
            source is not None
            and self.flatten_state_dict
            and self.flatten_sharded_tensors
            and _is_as_made(self, FastLoadPlanner, _LOAD_METHODS)
        ):
            self.original_state_dict = state_dict
            self.direct = DirectLoad(
                source.checkpoint_id, lambda: source.index, allow_partial_load=self.allow_partial_load
            )
        else:
            super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        """What this rank loads.

        Raises:
            CheckpointMismatchError: see ``ckpt_fast.load``.
        """
        if self.direct is None:
            return super().create_local_plan()
        self.direct.prepare(self.original_state_dict)
        return LoadPlan([], planner_data=Wanted(self.direct.seen.asked))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return global_plan if self.direct is not None else super().create_global_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return new_plan if self.direct is not None else super().finish_plan(new_plan)


SAVE_METHODS = (
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "resolve_data",
    "lookup_object",
    "transform_object",
)
_LOAD_METHODS = (
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "load_bytes",
    "resolve_bytes",
    "resolve_tensor",
    "commit_tensor",
    "lookup_tensor",
    "transform_tensor",
)


def _is_as_made(planner: Any, kind: type, methods: tuple[str, ...]) -> bool:
    """Whether a planner's class overrides none of the methods."""
    return all(getattr(type(planner), name, None) is getattr(kind, name, None) for name in methods)
