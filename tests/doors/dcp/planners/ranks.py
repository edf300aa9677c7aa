# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_planners`` do."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from ckpt_fast import FastLoadPlanner, FastSavePlanner, FastStorageReader, FastStorageWriter
from tests.doors.dcp import ranks
from tests.doors.dcp.states import differences


def by_default(rank: int, scenario: str, *arguments: Any) -> Any:
    """Run a scenario of the DCP door with our planners where none is given."""
    with (
        mock.patch.object(state_dict_saver, "DefaultSavePlanner", FastSavePlanner),
        mock.patch.object(state_dict_loader, "DefaultLoadPlanner", FastLoadPlanner),
    ):
        return getattr(ranks, scenario)(rank, *arguments)


def load_by_default(rank: int, root: str) -> dict[tuple[str, str], list[str]]:
    """Load what the scenario ``save_with_all`` has saved, also with torch's own planner."""
    return by_default(rank, "load_all", root) | {
        (*pair, "planned by torch"): wrong for pair, wrong in ranks.load_all(rank, root).items()
    }


def failing(rank: int, root: str) -> list[str]:
    """Let the ranks disagree, in each of the ways; return the errors, and what is wrong with a save after."""

    def save(state: dict[str, Any], planner: Any = None) -> str:
        writer = FastStorageWriter(f"{root}/checkpoint")
        return ranks.error_of(
            lambda: dcp.save(state, storage_writer=writer, planner=planner or FastSavePlanner())
        )

    def load(state: dict[str, Any]) -> str:
        reader = FastStorageReader(f"{root}/checkpoint")
        return ranks.error_of(lambda: dcp.load(state, storage_reader=reader, planner=FastLoadPlanner()))

    texts = [
        save({"w": torch.zeros(3 + rank)}),
        save({"w": torch.zeros(3)}, dcp.DefaultSavePlanner() if rank else None),
        save({"w": torch.zeros(3), "lock": threading.Lock() if rank else 1, f"own {rank}": 1}),
    ]
    state = {"w": torch.arange(3.0), "step": 5}
    assert save(state) == "no error"
    found = {"w": torch.zeros(3), "step": 0}
    texts.append(load({**found, "x": torch.zeros(1)} if rank else dict(found)))
    assert load(found) == "no error"
    dist.barrier()
    return [*texts, str(differences(state, found))]
