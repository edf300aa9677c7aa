# SPDX-License-Identifier: Apache-2.0
"""Callbacks: registration, order, and what is never called."""

from __future__ import annotations

import pytest

from ckpt_fast.callbacks import (
    VALID_EVENTS,
    Callback,
    CallbackContext,
    CallbackManager,
    normalize_callbacks,
    should_fire,
)

CONTEXT = CallbackContext(state="state", model=["chunk"])


class Saver(Callback):
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def on_checkpoint_save(self, context):
        self.calls.append((self.name, context))


def test_events():
    phases = [f"on_{kind}_{point}" for kind in ("eval", "test") for point in ("start", "end")]
    phases += [f"on_{kind}_step_{point}" for kind in ("train", "eval", "test") for point in ("start", "end")]
    phases += ["on_data_init_start", "on_train_start", "on_train_end", "on_checkpoint_save"]
    phases += ["on_checkpoint_save_failed"]
    assert frozenset(phases) == VALID_EVENTS == CallbackManager().events


def test_context_defaults():
    assert CONTEXT.user_state == {}
    assert CONTEXT.user_state is not CallbackContext(state=None, model=None).user_state
    assert (CONTEXT.optimizer, CONTEXT.scheduler, CONTEXT.loss_dict) == (None, None, None)
    assert (CONTEXT.grad_norm, CONTEXT.skipped_iter, CONTEXT.total_loss_dict) == (None, None, None)


def test_only_overridden_methods_are_registered():
    manager = CallbackManager()
    manager.add(Saver("a", []))
    assert [event for event in VALID_EVENTS if manager.has_callbacks(event)] == ["on_checkpoint_save"]


def test_inherited_overrides_count():
    class Derived(Saver):
        pass

    manager = CallbackManager()
    manager.add(Derived("a", []))
    assert manager.has_callbacks("on_checkpoint_save")


def test_order_is_that_of_registration():
    calls = []
    manager = CallbackManager()
    manager.add([Saver("a", calls), Saver("b", calls)])
    manager.register("on_checkpoint_save", lambda context: calls.append(("f", context)))
    manager.add(Saver("c", calls))
    manager.fire("on_checkpoint_save", CONTEXT)
    assert calls == [(name, CONTEXT) for name in "abfc"]


def test_an_exception_reaches_the_caller_and_ends_the_round():
    calls = []
    manager = CallbackManager()

    def fail(context):
        raise RuntimeError("stop")

    manager.register("on_train_start", fail)
    manager.register("on_train_start", calls.append)
    with pytest.raises(RuntimeError, match="stop"):
        manager.fire("on_train_start", CONTEXT)
    assert calls == []


def test_unknown_events():
    manager = CallbackManager()
    with pytest.raises(ValueError, match=r"on_lunch.*on_checkpoint_save"):
        manager.register("on_lunch", print)
    with pytest.raises(ValueError, match="on_lunch"):
        manager.list_callbacks("on_lunch")
    assert manager.has_callbacks("on_lunch") is False


def test_the_list_is_a_copy():
    manager = CallbackManager()
    manager.register("on_train_end", print)
    manager.list_callbacks("on_train_end").clear()
    assert manager.list_callbacks("on_train_end") == [print]


def test_user_state_lives_as_long_as_the_manager():
    manager = CallbackManager()
    manager.user_state["best"] = 1
    assert manager.user_state == {"best": 1}


def test_normalize():
    assert normalize_callbacks(None) is None
    manager = CallbackManager()
    assert normalize_callbacks(manager) is manager
    assert normalize_callbacks([Saver("a", [])]).has_callbacks("on_checkpoint_save")


def test_should_fire():
    assert should_fire(None, "on_checkpoint_save") is False
    manager = CallbackManager()
    assert should_fire(manager, "on_checkpoint_save") is False
    manager.add(Saver("a", []))
    assert should_fire(manager, "on_checkpoint_save") is True
