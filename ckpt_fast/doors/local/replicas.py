# SPDX-License-Identifier: Apache-2.0
"""Whose states are where, and how they reach the ranks whose states they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def complete(available: Sequence[Iterable[Any]]) -> list[int]:
    """The iterations of which every rank's state is somewhere.

    Args:
        available: for each rank the ids (iteration, rank, session) of the states that it has.
    """
    ranks: dict[int, set[int]] = defaultdict(set)
    for ids in available:
        for iteration, rank, _ in ids:
            ranks[iteration].add(rank)
    return [iteration for iteration, covered in ranks.items() if len(covered) == len(available)]


def exchange(strategy: Any, plan: Any, states: dict[Any, Any]) -> dict[Any, Any]:
    """Collective. The states that this rank receives according to nvidia-resiliency-ext's plan.

    Args:
        strategy: its replication strategy, which made the plan.
        plan: what it gives.
        states: those that this rank has read.
    """
    if torch.cuda.is_available():
        received: dict[Any, Any] = strategy.retrieve_execute(plan, states)
        return received
    # nvidia-resiliency-ext sends from GPU memory only.
    received, me = {}, dist.get_rank()
    for entry in plan.entries:
        if entry.sender == me == entry.receiver:
            received[entry.id_] = states[entry.id_]
        elif entry.sender == me:
            plan.group.send_object(states[entry.id_], entry.receiver)
        elif entry.receiver == me:
            received[entry.id_] = plan.group.recv_object(entry.sender)
    return received
