# SPDX-License-Identifier: Apache-2.0
"""A load as ``dcp.load`` does it, in which no rank touches anything before all ranks can.

torch's own has no agreement between plan and reading: where a rank finds that it cannot read what was
planned, others may have filled their tensors.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan

from ckpt_fast.doors.dcp.reader import FastStorageReader
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.ranks.group import ControlGroup


def load_together(state_dict: dict[str, Any], reader: FastStorageReader, planner: DefaultLoadPlanner) -> None:
    """Collective. Fill a state dict in place, as torch's ``load_state_dict`` would.

    Args:
        state_dict: nested; tensors are filled, other values replaced.
        reader: of the checkpoint.
        planner: torch's own, which leaves the ranks' plans as they are.

    Raises:
        CheckpointMismatchError: the checkpoint does not fit. Nothing was changed on any rank.
        CheckpointCorruptError: it is damaged. If its metadata lacks a part of a tensor, nothing was changed
            on any rank.
        UnsafeCheckpointError: an object is more than tensors and plain data.

        All of these are raised on every rank, naming the rank that failed.
    """
    group = ControlGroup()

    def make_plan() -> LoadPlan:
        metadata = reader.read_metadata()
        planner.set_up_planner(state_dict, metadata, group.is_coordinator)
        reader.set_up_storage_reader(metadata, group.is_coordinator)
        try:
            plan = planner.create_local_plan()
        except (ValueError, RuntimeError) as error:
            raise CheckpointMismatchError(
                f"{reader.checkpoint_id} does not fit the state dict: {error}. Nothing was loaded; load into "
                "the model that was saved."
            ) from error
        return reader.prepare_local_plan(plan)

    def check() -> None:
        reader.prepare_global_plan([each.value for each in plans if each.value is not None])

    mine = group.attempt(make_plan)
    plans = group.gather(mine)
    group.decide(check, plans)
    plan = mine.value
    assert plan is not None, "a plan that failed has been agreed on"
    located = group.agree(lambda: reader.locate_data(plan, planner))
    group.agree(lambda: reader.fill(located))
