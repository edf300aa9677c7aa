# SPDX-License-Identifier: Apache-2.0
"""Calling the user's code at fixed points of a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass
class CallbackContext:
    """The data that a callback may read.

    Attributes:
        state: GlobalState.
        model: model chunks.
        user_state: one dict for the whole run, the callbacks' own to use.
        optimizer: None where there is none.
        scheduler: learning rate scheduler.
        loss_dict: losses of the step that ended.
        grad_norm: gradient norm of the step that ended.
        skipped_iter: whether that step was skipped.
        total_loss_dict: accumulated losses of an evaluation.
        save_error: of the background save that failed.
        failed_saves: how many background saves have failed in a row, with that one.
    """

    state: Any
    model: Any
    user_state: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    scheduler: Any = None
    loss_dict: dict[str, Any] | None = None
    grad_norm: float | None = None
    skipped_iter: bool | None = None
    total_loss_dict: dict[str, Any] | None = None
    save_error: Exception | None = None
    failed_saves: int | None = None


class Callback:
    """Base class: override the methods of the events of interest; the others are never called."""

    def on_data_init_start(self, context: CallbackContext) -> None:
        """Before the data is set up."""

    def on_train_start(self, context: CallbackContext) -> None:
        """Before the first training step."""

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Before each training step."""

    def on_train_step_end(self, context: CallbackContext) -> None:
        """After each training step."""

    def on_train_end(self, context: CallbackContext) -> None:
        """After the last training step."""

    def on_eval_start(self, context: CallbackContext) -> None:
        """Before a validation."""

    def on_eval_step_start(self, context: CallbackContext) -> None:
        """Before each validation step."""

    def on_eval_step_end(self, context: CallbackContext) -> None:
        """After each validation step."""

    def on_eval_end(self, context: CallbackContext) -> None:
        """After a validation."""

    def on_test_start(self, context: CallbackContext) -> None:
        """Before the test."""

    def on_test_step_start(self, context: CallbackContext) -> None:
        """Before each test step."""

    def on_test_step_end(self, context: CallbackContext) -> None:
        """After each test step."""

    def on_test_end(self, context: CallbackContext) -> None:
        """After the test."""

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """After a checkpoint has been saved for good; on every rank."""

    def on_checkpoint_save_failed(self, context: CallbackContext) -> None:
        """After a background save has failed, with ``on_save_failure="continue"``; on every rank."""


VALID_EVENTS: frozenset[str] = frozenset(name for name in vars(Callback) if name.startswith("on_"))

CallbackFn: TypeAlias = Callable[[CallbackContext], None]


class CallbackManager:
    """Keeps callbacks and calls them, in the order of registration."""

    def __init__(self) -> None:
        self._callbacks: dict[str, list[CallbackFn]] = {event: [] for event in VALID_EVENTS}
        self._user_state: dict[str, Any] = {}

    @property
    def user_state(self) -> dict[str, Any]:
        """One dict for the whole run, handed to every callback."""
        return self._user_state

    @property
    def events(self) -> frozenset[str]:
        """All events there are."""
        return VALID_EVENTS

    def add(self, callback: Callback | Sequence[Callback]) -> None:
        """Register the methods that a callback object, or each of several, overrides."""
        for each in callback if isinstance(callback, (list, tuple)) else [callback]:
            for event in VALID_EVENTS:
                if getattr(type(each), event) is not getattr(Callback, event):
                    self.register(event, getattr(each, event))

    def register(self, event: str, fn: CallbackFn) -> None:
        """Call ``fn`` at ``event``.

        Raises:
            ValueError: there is no such event.
        """
        self._of(event).append(fn)

    def list_callbacks(self, event: str) -> list[CallbackFn]:
        """The callbacks of an event, in order; a copy.

        Raises:
            ValueError: there is no such event.
        """
        return list(self._of(event))

    def has_callbacks(self, event: str) -> bool:
        """Whether anything would be called at ``event``; False for an unknown one."""
        return bool(self._callbacks.get(event))

    def fire(self, event: str, context: CallbackContext) -> None:
        """Call the callbacks of ``event`` in order. An exception goes to the caller and ends the round.

        Raises:
            ValueError: there is no such event.
        """
        for fn in self.list_callbacks(event):
            fn(context)

    def _of(self, event: str) -> list[CallbackFn]:
        if event not in self._callbacks:
            raise ValueError(f"unknown event {event!r}; there are {', '.join(sorted(VALID_EVENTS))}")
        return self._callbacks[event]


def normalize_callbacks(callbacks: Sequence[Callback] | CallbackManager | None) -> CallbackManager | None:
    """A manager for whatever form callbacks were given in; None stays None."""
    if callbacks is None or isinstance(callbacks, CallbackManager):
        return callbacks
    manager = CallbackManager()
    manager.add(callbacks)
    return manager


def should_fire(callback_manager: CallbackManager | None, event: str) -> bool:
    """Whether building a context for ``event`` is worth the while."""
    return callback_manager is not None and callback_manager.has_callbacks(event)
