# SPDX-License-Identifier: Apache-2.0
"""torch DCP's state dicts saved without ``dcp.save``: staged now, written by a thread, committed later.

``dcp.save`` and ``dcp.async_save`` keep their collectives in the thread that writes. For a trainer's queue
all collectives must be in the trainer's own thread; what is between them is the pipeline's ``Save``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from ckpt_fast.doors.dcp.writer import shards_of
from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.save.parts import Completion, SaveOptions, Share
from ckpt_fast.pipeline.save.save import Save
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.storage.files import absolute


@without_collections
def start_save(
    state_dict: dict[str, Any],
    directory: str,
    options: SaveOptions | None = None,
    completion: Completion | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    write_beside: Callable[[str], Sequence[FileRecord]] = lambda _: (),
) -> Save:
    """Collective. Everything up to and including staging; the caller then runs ``write`` and ``commit``.

    The files are those of ``dcp.save`` with the default planner.

    Args:
        state_dict: nested, of DTensors, tensors and objects.
        directory: the same on every rank; an older checkpoint in it is replaced.
        options: see ``SaveOptions``.
        completion: see ``Completion``.
        process_group: the ranks that save together; None means all.
        write_beside: see ``Share``.

    Raises:
        CheckpointError: on every rank, naming the rank that failed; nothing has been published.
    """
    planner = DefaultSavePlanner()
    group = ControlGroup(process_group)

    def plan_locally() -> SavePlan:
        planner.set_up_planner(state_dict, None, group.is_coordinator)
        return planner.create_local_plan()

    plan, metadata = plan_together(group, planner, plan_locally)

    def collect() -> Share:
        shards = shards_of(planner.finish_plan(plan), planner)
        planner_data = metadata.planner_data if metadata is not None else None
        return Share(shards, planner_data=planner_data or {}, write_beside=write_beside)

    job = Save(absolute(directory), collect, options, completion, process_group)
    job.stage()
    return job


def plan_together(
    group: ControlGroup,
    planner: SavePlanner,
    plan_locally: Callable[[], SavePlan],
    divide: Callable[[list[SavePlan]], list[SavePlan]] = lambda plans: plans,
) -> tuple[SavePlan, Metadata | None]:
    """Collective. torch DCP's planning: every rank's plan, then the plan of all, then each its own part.

    Args:
        group: the ranks that save together.
        planner: makes the plan of all.
        plan_locally: makes this rank's.
        divide: has the last word on the plan of all, which it gets in rank order. Runs on the coordinator.

    Returns:
        This rank's part; and what ``.metadata`` will say, on the coordinator.

    Raises:
        CheckpointError: on every rank, naming the rank that failed.
    """
    plans: list[SavePlan] = []
    metadata: list[Metadata] = []

    def plan_globally() -> None:
        together, described = planner.create_global_plan([each.value for each in local if each.value])
        plans.extend(divide(together))
        metadata.append(described)

    local = group.collect(plan_locally)
    group.decide(plan_globally, local)
    return group.scatter(plans), metadata[0] if metadata else None
