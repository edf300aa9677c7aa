# SPDX-License-Identifier: Apache-2.0
"""Checkpoint managers: the interface a training loop speaks to, the default, and how to bring one's own."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ckpt_fast.trainer.contexts import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    init_checkpointing_context,
)

if TYPE_CHECKING:
    from ckpt_fast.callbacks import CallbackManager
    from ckpt_fast.config import CheckpointConfig
    from ckpt_fast.state import GlobalState


@runtime_checkable
class CheckpointManager(Protocol):
    """A checkpoint manager as a training loop sees it; implement it for custom saves and loads."""

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        """Called once, on every rank, with the run's checkpoint configuration."""
        ...

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None) -> None:
        """Save a checkpoint. Collective."""
        ...

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        """Load a checkpoint. Collective.

        Returns:
            (iteration, floating point operations so far); (0, 0) if there was nothing to load.
        """
        ...

    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Publish saves whose data has been written in the background. Collective.

        Args:
            state: holds the queue of saves in flight.
            blocking: wait for all of them.
            terminate: close the queue afterwards.
        """
        ...


class DefaultCheckpointManager:
    """Saves with ``save_checkpoint``, loads with ``load_checkpoint``.

    Attributes:
        checkpoint_config: the configuration it was made with.
    """

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        self.checkpoint_config = checkpoint_config
        self._context = init_checkpointing_context(checkpoint_config)

    @property
    def checkpointing_context(self) -> dict[str, Any]:
        """Kept across saves and loads: strategies, the local checkpoint manager, cached metadata."""
        return self._context

    # The delegates are looked up on each call: replacing save_checkpoint in its home replaces it here too.

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None) -> None:
        """Save a checkpoint; see ``save_checkpoint``."""
        from ckpt_fast.trainer.save.save import save_checkpoint

        save_checkpoint(
            state=ctx.state,
            model=ctx.model,
            optimizer=ctx.optimizer,
            opt_param_scheduler=ctx.opt_param_scheduler,
            num_floating_point_operations_so_far=ctx.num_floating_point_operations_so_far,
            checkpointing_context=self._context,
            non_persistent_ckpt=ctx.non_persistent_ckpt,
            train_data_iterator=ctx.train_data_iterator,
            pg_collection=ctx.pg_collection,
            callback_manager=callback_manager,
            module_name=ctx.module_name,
        )

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        """Load a checkpoint; see ``load_checkpoint``."""
        from ckpt_fast.trainer.load.load import load_checkpoint

        return load_checkpoint(
            state=ctx.state,
            model=ctx.model,
            optimizer=ctx.optimizer,
            opt_param_scheduler=ctx.opt_param_scheduler,
            strict=ctx.strict,
            checkpointing_context=self._context,
            skip_load_to_model_and_opt=ctx.skip_load_to_model_and_opt,
            pg_collection=ctx.pg_collection,
            module_name=ctx.module_name,
        )

    def finalize_async_saves(
        self, state: GlobalState, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Publish saves in flight; see ``maybe_finalize_async_save``."""
        from ckpt_fast.trainer.save.async_save import maybe_finalize_async_save

        maybe_finalize_async_save(
            global_state=state, ckpt_cfg=self.checkpoint_config, blocking=blocking, terminate=terminate
        )


def create_checkpoint_manager(checkpoint_config: CheckpointConfig) -> CheckpointManager:
    """The manager that ``checkpoint_config`` asks for.

    Args:
        checkpoint_config: ``custom_manager_class`` None gives the default; otherwise it is the full name of
            a class, e.g. "mypackage.module.MyManager", which is imported and called with this argument.

    Raises:
        ValueError: the name has no module.
        ImportError: the module cannot be imported.
        AttributeError: the module has no such class.
        TypeError: the class lacks a method of ``CheckpointManager``, or its ``save`` takes other arguments.
    """
    name = checkpoint_config.custom_manager_class
    if name is None:
        return DefaultCheckpointManager(checkpoint_config)
    manager_class = _import_class(name)
    manager = manager_class(checkpoint_config)
    if not isinstance(manager, CheckpointManager):
        missing = [
            method for method in ("save", "load", "finalize_async_saves") if not hasattr(manager, method)
        ]
        raise TypeError(
            f"custom_manager_class {name} does not implement the CheckpointManager protocol: "
            f"it lacks {', '.join(missing)}"
        )
    _check_save_signature(manager, name)
    return manager


def _import_class(name: str) -> Any:
    module_name, _, class_name = name.rpartition(".")
    if not module_name or not class_name:
        raise ValueError(
            f"Invalid custom_manager_class format: {name!r}. Give the full name of a class, "
            "e.g. 'mypackage.module.MyManager'."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"Could not import module {module_name!r} of custom_manager_class {name!r}: {error}. "
            "It must be importable (installed, or on PYTHONPATH) on every rank."
        ) from error
    try:
        return getattr(module, class_name)
    except AttributeError as error:
        raise AttributeError(
            f"Module {module_name!r} does not have class {class_name!r} (custom_manager_class {name!r})"
        ) from error


def _check_save_signature(manager: CheckpointManager, name: str) -> None:
    """Managers written before callbacks existed take one argument; say so now, not at the first save."""
    try:
        inspect.signature(manager.save).bind(object(), object())
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"custom_manager_class {name}: save must accept (ctx, callback_manager) as positional "
            f"arguments: {error}"
        ) from error
