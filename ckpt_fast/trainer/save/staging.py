# SPDX-License-Identifier: Apache-2.0
"""Which GPU tensors a save may keep reading while training continues: those whose optimizer waits for it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ckpt_fast.jobs.background import wait_staged
from ckpt_fast.pipeline.memory.device_copy import StagingPolicy

_waiting: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def staging_policy(model: Sequence[Any], optimizer: Any | None) -> StagingPolicy:
    """How GPU tensors are copied for a background save.

    Every torch optimizer inside Megatron-Core's is made to wait, in its next steps, for copies on their way.
    That protects its parameters and its state; and, if all of them wait, the model's parameters, which
    change as a consequence of a step only.
    """
    waiting = torch_optimizers(optimizer)
    for each in waiting:
        if each not in _waiting:
            each.register_step_pre_hook(_before_step)
            _waiting.add(each)
    all_wait = waiting and len(waiting) == len(_members(optimizer))

    @functools.cache
    def protected() -> set[int]:
        storages = {_storage(tensor) for each in waiting for tensor in _tensors(each)}
        if all_wait:
            storages.update(_storage(parameter) for chunk in model for parameter in chunk.parameters())
        # Wrappers around other tensors have no memory of their own.
        storages.discard(0)
        return storages

    return StagingPolicy.chosen(lambda tensor: _storage(tensor) in protected())


def torch_optimizers(optimizer: Any | None) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron-Core's."""
    inner = [getattr(member, "optimizer", None) for member in _members(optimizer)]
    return [each for each in inner if isinstance(each, torch.optim.Optimizer)]


def _before_step(*_: Any) -> None:
    wait_staged()


def _members(optimizer: Any | None) -> list[Any]:
    members: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        member for member in members if member is not None and not getattr(member, "is_stub_optimizer", False)
    ]


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
