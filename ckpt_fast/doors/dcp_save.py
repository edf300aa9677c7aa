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
from torch.distributed.checkpoint.planner import SavePlan

from ckpt_fast.doors.dcp_writer import shards_of
from ckpt_fast.pipeline.garbage import without_collections
from ckpt_fast.pipeline.group import ControlGroup
from ckpt_fast.pipeline.save import Save
from ckpt_fast.pipeline.types import FileRecord


@without_collections
def start_save(
    state_dict: dict[str, Any],
    directory: str,
    *,
    process_group: dist.ProcessGroup | None = None,
    writers: int | None = None,
    snapshot: bool = False,
    host_buffer: int | None = None,
    beside: Sequence[FileRecord] = (),
    finish: Callable[[], Sequence[FileRecord]] | None = None,
) -> Save:
    """Collective. Everything up to and including staging; the caller then runs ``write`` and ``commit``.

    The files are those of ``dcp.save`` with the default planner.

    Args:
        state_dict: nested, of DTensors, tensors and objects.
        directory: the same on every rank; an older checkpoint in it is invalidated.
        process_group: the ranks that save together; None means all.
        writers: files per rank; None: as many as are fastest there.
        snapshot: the tensors may change as soon as this returns.
        host_buffer: bound on the host memory staged into; see ``Save``.
        beside, finish: see ``Save``.

    Raises:
        CheckpointError: on every rank, naming the rank that failed; nothing has been published.
    """
    group = ControlGroup(process_group)
    planner = DefaultSavePlanner()
    central: list[SavePlan] = []
    planner_data: dict[str, Any] = {}

    def plan_locally() -> SavePlan:
        planner.set_up_planner(state_dict, None, group.is_coordinator)
        return planner.create_local_plan()

    def plan_centrally() -> None:
        plans, metadata = planner.create_global_plan(local)
        central.extend(plans)
        planner_data.update(metadata.planner_data or {})

    local = group.gather(group.agree(plan_locally))
    group.decide(plan_centrally)
    mine = group.scatter(central)
    job = Save(
        group.agree(lambda: shards_of(planner.finish_plan(mine), planner)),
        directory,
        process_group=process_group,
        writers=writers,
        planner_data=planner_data,
        snapshot=snapshot,
        host_buffer=host_buffer,
        beside=beside,
        finish=finish,
    )
    job.stage()
    return job
