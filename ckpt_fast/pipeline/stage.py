# SPDX-License-Identifier: Apache-2.0
"""Stage: every shard's bytes at an address in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ckpt_fast.pipeline.plan import FilePlan
from ckpt_fast.pipeline.types import TensorShard


class Staged(NamedTuple):
    """Addresses of the raw data of all items, in plan order.

    Attributes:
        addresses: one entry per item; 0 for items without raw data.
        owners: the tensors that own the memory; keep them until the write is done.
    """

    addresses: list[int]
    owners: list[torch.Tensor]


def stage(files: Sequence[FilePlan], snapshot: bool = False) -> Staged:
    """Make the raw bytes of every planned item readable by the engine.

    Args:
        files: the plan.
        snapshot: copy CPU tensors too, so that training may change them while the write goes on. Without it
            contiguous CPU tensors are read where they are.
    """
    addresses: list[int] = []
    owners: list[torch.Tensor] = []
    for file in files:
        for item in file.items:
            if item.archive is None or not item.raw_nbytes or not isinstance(item.shard, TensorShard):
                addresses.append(0)
                continue
            owner = host_tensor(item.shard.tensor, snapshot)
            addresses.append(owner.data_ptr())
            owners.append(owner)
    return Staged(addresses, owners)


def host_tensor(tensor: torch.Tensor, snapshot: bool = False) -> torch.Tensor:
    """The tensor's values as contiguous CPU memory: the tensor itself where that is what it is already."""
    host = tensor.detach()
    if host.is_conj() or host.is_neg():
        host = host.resolve_conj().resolve_neg()
    host = host.to("cpu").contiguous()
    if snapshot and host.data_ptr() == tensor.data_ptr():
        host = host.clone()
    return host
