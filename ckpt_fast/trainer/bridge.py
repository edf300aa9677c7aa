# SPDX-License-Identifier: Apache-2.0
"""The manager class that a Megatron Bridge run names in ``checkpoint.custom_manager_class``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_fast.run.async_queue import AsyncCallsQueue
from ckpt_fast.trainer.manager import DefaultCheckpointManager

if TYPE_CHECKING:
    from ckpt_fast.callbacks import CallbackManager
    from ckpt_fast.config import CheckpointConfig
    from ckpt_fast.state import GlobalState
    from ckpt_fast.trainer.contexts import CheckpointSaveContext


class FastCheckpointManager(DefaultCheckpointManager):
    """Saves and loads a Megatron Bridge run with ckpt_fast; Bridge's own objects are used as they are.

    ::

        cfg.checkpoint.custom_manager_class = "ckpt_fast.FastCheckpointManager"

    Newer Bridge imports classes of its own packages only, unless told of others before the run is set up::

        from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix

        register_allowed_target_prefix("ckpt_fast.")

    Saves in the background are written by threads of this process: the manager gives Bridge's state a queue
    for them. What Bridge's own queue still had in flight is finalized first.

    Args:
        checkpoint_config: Bridge's, or ours.
    """

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        super().__init__(checkpoint_config)
        self._queue: AsyncCallsQueue | None = None

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None = None) -> None:
        """Collective. Save; with ``async_save`` return when the state is copied. See ``save_checkpoint``."""
        self._give_queue(ctx.state)
        super().save(ctx, callback_manager)

    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Collective. Publish what is written in the background. See ``maybe_finalize_async_save``."""
        self._give_queue(state)
        super().finalize_async_saves(state, blocking, terminate)

    def _give_queue(self, state: Any) -> None:
        """Put a queue that takes our saves in the place of one that is for another process."""
        theirs = state.async_calls_queue
        if not self.checkpoint_config.async_save or isinstance(theirs, AsyncCallsQueue):
            return
        if theirs is not None:
            theirs.maybe_finalize_async_calls(blocking=True)
            theirs.close()
        if self._queue is None:
            self._queue = AsyncCallsQueue()
        state._async_calls_queue = self._queue
