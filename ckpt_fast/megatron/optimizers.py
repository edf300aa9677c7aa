# SPDX-License-Identifier: Apache-2.0
"""Optimizers as a load needs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def give_adam_its_state(optimizer: Any) -> None:
    """Let a distributed optimizer around torch's Adam, which is still without state, have zeros for it.

    torch's Adam makes its state in the first step; Megatron-Core's ``sharded_state_dict`` takes it for
    granted, also where it is asked for the scaffold of a load. (Transformer Engine's and Apex's Adam keep the
    step elsewhere and do not need this.) Parameters are not touched.
    """
    for distributed in _distributed_optimizers(optimizer):
        adam = distributed.optimizer
        if not isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)) or adam.state:
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }


def _distributed_optimizers(optimizer: Any) -> Iterator[Any]:
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(member, DistributedOptimizer) and not getattr(member, "is_stub_optimizer", False):
            yield member
