# SPDX-License-Identifier: Apache-2.0
"""The load strategy of the Megatron-Core door."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from ckpt_fast import compat, settings
from ckpt_fast.doors.megatron.common_state import (
    open_checkpoint,
    require_common_of_save,
    require_torch_dist,
)
from ckpt_fast.doors.megatron.sharded_state import ShardedLoad
from ckpt_fast.errors import also_raised_as
from ckpt_fast.format.names import COMMON_STATE_KEY
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.pipeline.load.report import one_load
from ckpt_fast.pipeline.remove import remove_named
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.storage.objects.client import as_url, checkpoint_files


class FastLoadStrategy(compat.TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """Megatron-Core load strategy on the ckpt_fast pipeline: tensors by offset, no code from pickles.

    Every CheckpointError it raises can be caught as Megatron-Core's CheckpointingException, or as torch's
    CheckpointException, as well.

    Args:
        options, named_options: of the installed Megatron-Core's strategy.
        verify: compare the checksums of all that is read, and of ``common.pt``; None follows
            ``CKPT_FAST_VERIFY``.
    """

    def __init__(self, *options: Any, verify: bool | None = None, **named_options: Any) -> None:
        super().__init__(*options, **named_options)
        compat.accept_common_file()
        self._verify = verify
        self._loaded: CheckpointIndex | None = None
        self._opened: OpenCheckpoint | None = None
        # Tensors of quantised kinds are made plain ones by Megatron-Core before they come here.
        self.stream_ckpt_dequant = False

    @also_raised_as(compat.DistCheckpointingError)
    def load(
        self,
        sharded_state_dict: dict[str, Any],
        checkpoint_dir: str | os.PathLike[str],
        async_strategy: str = "mcore",
    ) -> dict[str, Any]:
        """Collective. A dict of the same nesting with every sharded entry replaced by its loaded value.

        No tensor is touched on any rank before what every rank asks for is found to fit the checkpoint.

        Raises:
            CheckpointError: on every rank, naming the one that failed: no rank goes on, or waits, alone.
        """

        group = ControlGroup()
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_load(as_url(checkpoint_dir), group.global_rank))

            def prepare() -> tuple[OpenCheckpoint, ShardedLoad]:
                checkpoint = stack.enter_context(self._open(checkpoint_dir))
                with checkpoint.named():
                    require_torch_dist(checkpoint)
                    if checkpoint is not self._opened and self._is_verified():
                        require_common_of_save(checkpoint)
                    self._loaded = checkpoint.index
                    return checkpoint, ShardedLoad(sharded_state_dict, checkpoint.index)

            checkpoint, prepared = group.agree(prepare)

            def read() -> dict[str, Any]:
                with checkpoint.named():
                    return prepared.read(self._verify)

            return group.agree(read)

    @property
    def cached_global_metadata(self) -> Metadata | None:
        """The metadata of the checkpoint that was loaded last; None before the first."""
        return self._loaded.metadata if self._loaded is not None else None

    @cached_global_metadata.setter
    def cached_global_metadata(self, _none: None) -> None:
        """Megatron-Core's constructor sets it to None."""
        self._loaded = None

    @contextlib.contextmanager
    def reading(self, checkpoint: OpenCheckpoint) -> Iterator[None]:
        """A block in which requests to this checkpoint's directory are served from the open checkpoint."""
        self._opened = checkpoint
        try:
            yield
        finally:
            self._opened = None

    def _is_verified(self) -> bool:
        return settings.verify_on_load() if self._verify is None else self._verify

    def _open(self, checkpoint_dir: str | os.PathLike[str]) -> AbstractContextManager[OpenCheckpoint]:
        if self._opened is not None and self._opened.name == as_url(checkpoint_dir):
            return contextlib.nullcontext(self._opened)
        return open_checkpoint(checkpoint_dir)

    @also_raised_as(compat.DistCheckpointingError)
    def load_tensors_metadata(
        self, checkpoint_dir: str | os.PathLike[str], metadata: Any = None
    ) -> dict[str, Any]:
        """Name to ShardedTensor without data, of the whole global shape, for every saved tensor.

        Args:
            checkpoint_dir: the checkpoint.
            metadata: accepted, as Megatron-Core passes it; what the checkpoint says counts.
        """
        with self._open(checkpoint_dir) as checkpoint, checkpoint.named():
            return _tensors_of(checkpoint.index)

    @also_raised_as(compat.DistCheckpointingError)
    def load_sharded_metadata(self, checkpoint_dir: str | os.PathLike[str]) -> dict[str, Any]:
        """``load_tensors_metadata`` and, by unique key, a ShardedObject without data per saved object."""
        with self._open(checkpoint_dir) as checkpoint, checkpoint.named():
            index = checkpoint.index
            objects = {
                fqn: compat.ShardedObject.empty_from_unique_key(fqn)
                for fqn in index.names
                if index.shape(fqn) is None and fqn != COMMON_STATE_KEY
            }
            return {**objects, **_tensors_of(index)}

    @also_raised_as(compat.DistCheckpointingError)
    def remove_sharded_tensors(self, checkpoint_dir: str | os.PathLike[str], key_prefix: str) -> None:
        """Local: for one rank. Take all tensors and objects whose key begins so out of the checkpoint."""
        with checkpoint_files(checkpoint_dir) as files:
            remove_named(files, key_prefix)


def _tensors_of(index: CheckpointIndex) -> dict[str, Any]:
    shapes = {fqn: index.shape(fqn) for fqn in index.names}
    return {
        fqn: compat.ShardedTensor.from_rank_offsets(
            fqn, torch.empty(shape, dtype=index.dtype(fqn), device="meta")
        ).without_data()
        for fqn, shape in shapes.items()
        if shape is not None
    }
