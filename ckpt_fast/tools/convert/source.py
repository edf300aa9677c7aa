# SPDX-License-Identifier: Apache-2.0
"""What of a checkpoint is converted, and how it is divided."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

from ckpt_fast.errors import CheckpointCorruptError, CheckpointMismatchError
from ckpt_fast.format.names import COMMON_STATE_KEY
from ckpt_fast.pipeline.load.decode import decode_object
from ckpt_fast.pipeline.load.entries.kinds import SavedTensor
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_parts
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.tools import opening

# Keys of the common state of Megatron-Core that belong to the optimizer.
_OF_OPTIMIZER = ("optimizer", "optim", "opt_param_scheduler")


def is_of_optimizer(name: str) -> bool:
    """Whether a tensor or object belongs to an optimizer, by its name: its first or second key says so.

    "optimizer.state.exp_avg.w", "optim.param_groups", "chained_0.optimizer.state.w".
    """
    return any(key in _OF_OPTIMIZER for key in name.split("/", 1)[0].split(".")[:2])


class Source:
    """A checkpoint that is open, without what is left out.

    Args:
        checkpoint: see ``opening.opened``.
        weights_only: leave out what is the optimizer's.

    Attributes:
        index: its table of contents.
        format: of the checkpoint.
        tensors: names of the tensors that are converted.
        objects: names of the objects, without the common state.
        left_out: names of what is left out.

    Raises:
        CheckpointMismatchError: it is a local checkpoint, the state of one rank.
    """

    def __init__(self, checkpoint: OpenCheckpoint, weights_only: bool) -> None:
        self._checkpoint = checkpoint
        self._weights_only = weights_only
        self.index: CheckpointIndex = checkpoint.index
        self.format = opening.format_of(checkpoint)
        if self.format == "local":
            raise CheckpointMismatchError(
                f"{checkpoint.name} is a local checkpoint: the state of one rank, which only its run can "
                "restore. Convert a persistent checkpoint of the run."
            )
        index = self.index
        names = [name for name in sorted(index.names) if name != COMMON_STATE_KEY]
        self.left_out = [name for name in names if weights_only and is_of_optimizer(name)]
        out = set(self.left_out)
        self.tensors = [name for name in names if name not in out and index.shape(name) is not None]
        self.objects = [name for name in names if name not in out and index.shape(name) is None]

    @property
    def name(self) -> str:
        """The checkpoint, for people."""
        return self._checkpoint.name

    @property
    def identity(self) -> str:
        """Names the save, and what is converted of it."""
        parts = "weights" if self._weights_only else "all"
        return f"{parts} of {self.index.identity}"

    def saved(self) -> Iterator[SavedTensor]:
        """The tensors that are converted.

        Raises:
            CheckpointCorruptError: what ``.metadata`` says of one makes no sense.
        """
        return map(self.index.tensor, self.tensors)

    def payloads(self) -> dict[str, bytes]:
        """The objects, as the bytes of ``torch.save``, by name."""
        return load_parts(self.index, (), self.objects)[1]

    def values(self) -> dict[str, Any]:
        """The objects, by name.

        Raises:
            UnsafeCheckpointError: one is of a class that is not read.
        """
        return {
            name: decode_object(payload, f"{name} in {self.name}", verify=True)
            for name, payload in self.payloads().items()
        }

    def common_state(self) -> dict[str, Any]:
        """What is not sharded: Megatron-Core's common state, or torch DCP's objects, nested as they were.

        Raises:
            UnsafeCheckpointError: there are values of a class that is not read.
        """
        state = opening.common_state(self._checkpoint)
        if state is not None:
            return {
                key: value
                for key, value in state.items()
                if not (self._weights_only and str(key) in _OF_OPTIMIZER)
            }
        if self.format == "torch_dist":
            raise CheckpointCorruptError(f"{self.name} has no common state: it is not complete")
        values = self.values()
        paths = self.paths()
        return dict(unflatten_state_dict(values, {name: paths.get(name, (name,)) for name in values}))

    def paths(self) -> dict[str, tuple[Any, ...]]:
        """Where torch DCP has noted that each name stands in the nested state dict."""
        known = self.index.metadata.planner_data
        if not isinstance(known, dict):
            return {}
        return {str(name): tuple(path) for name, path in known.items() if isinstance(path, (tuple, list))}


def token_of(*parts: str) -> str:
    """A short name of what is converted, and into what."""
    return f"{zlib.crc32(os.fsencode(chr(0).join(parts))):08x}"
