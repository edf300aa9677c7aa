# SPDX-License-Identifier: Apache-2.0
"""Creating managers: the default, and classes named by the user."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast.config import CheckpointConfig
from ckpt_fast.trainer.contexts import CheckpointLoadContext, CheckpointSaveContext
from ckpt_fast.trainer.load import load as load_home
from ckpt_fast.trainer.manager import CheckpointManager, DefaultCheckpointManager, create_checkpoint_manager
from ckpt_fast.trainer.save import save as save_home

_names = (f"custom_manager_{number}" for number in itertools.count())

GOOD = """
class MyManager:
    def __init__(self, checkpoint_config):
        self.config = checkpoint_config
    def save(self, ctx, callback_manager):
        return None
    def load(self, ctx):
        return 7, 8
    def finalize_async_saves(self, state, blocking=False, terminate=False):
        return None
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a module and return its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        name = next(_names)
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def create(name: str) -> CheckpointManager:
    return create_checkpoint_manager(CheckpointConfig(custom_manager_class=name))


def test_default_manager() -> None:
    config = CheckpointConfig()
    manager = create_checkpoint_manager(config)
    assert isinstance(manager, DefaultCheckpointManager)
    assert isinstance(manager, CheckpointManager)
    assert manager.checkpoint_config is config
    assert manager.checkpointing_context == {}
    assert manager.checkpointing_context is manager.checkpointing_context


def test_a_users_manager_needs_no_registration(module: Any) -> None:
    config = CheckpointConfig(custom_manager_class=f"{module(GOOD)}.MyManager")
    manager: Any = create_checkpoint_manager(config)
    assert type(manager).__name__ == "MyManager"
    assert manager.config is config


def test_names_that_lead_nowhere(module: Any) -> None:
    with pytest.raises(ValueError, match="Invalid custom_manager_class format"):
        create("MyManager")
    with pytest.raises(ValueError, match="Invalid custom_manager_class format"):
        create(".MyManager")
    with pytest.raises(ImportError, match=r"Could not import module 'nonexistent\.module'"):
        create("nonexistent.module.MyManager")
    with pytest.raises(AttributeError, match="does not have class 'MyManager'"):
        create(f"{module('')}.MyManager")


def test_an_import_error_inside_the_module_keeps_its_cause(module: Any) -> None:
    with pytest.raises(ImportError, match=r"Could not import module.*missing_dependency"):
        create(f"{module('import missing_dependency')}.MyManager")


def test_a_class_without_the_protocol_is_refused(module: Any) -> None:
    source = GOOD.replace("def load", "def restore").replace("def finalize_async_saves", "def finish")
    with pytest.raises(TypeError, match="CheckpointManager protocol: it lacks load, finalize_async_saves"):
        create(f"{module(source)}.MyManager")


@pytest.mark.parametrize(
    "parameters", ["self, ctx", "self, ctx, *, callback_manager", "self, ctx, callback_manager, more"]
)
def test_save_with_other_parameters_is_refused(module: Any, parameters: str) -> None:
    source = GOOD.replace("self, ctx, callback_manager", parameters)
    with pytest.raises(TypeError, match="save must accept"):
        create(f"{module(source)}.MyManager")


@pytest.mark.parametrize("parameters", ["self, ctx, callback_manager=None", "self, *args", "self, a, b, c=1"])
def test_save_may_name_its_parameters_as_it_likes(module: Any, parameters: str) -> None:
    create(f"{module(GOOD.replace('self, ctx, callback_manager', parameters))}.MyManager")


def test_save_passes_the_context_on(monkeypatch: pytest.MonkeyPatch) -> None:
    signature = inspect.signature(save_home.save_checkpoint)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        save_home, "save_checkpoint", lambda **given: calls.append(signature.bind(**given).arguments)
    )
    manager = DefaultCheckpointManager(CheckpointConfig())
    state, model = object(), [object()]
    ctx: Any = CheckpointSaveContext(
        state, model, "optimizer", "scheduler", 5, "iterator", True, "groups", "module"
    )
    manager.save(ctx, callback_manager="callbacks")  # type: ignore[arg-type]
    assert calls == [
        {
            "state": state,
            "model": model,
            "optimizer": "optimizer",
            "opt_param_scheduler": "scheduler",
            "num_floating_point_operations_so_far": 5,
            "checkpointing_context": manager.checkpointing_context,
            "non_persistent_ckpt": True,
            "train_data_iterator": "iterator",
            "pg_collection": "groups",
            "callback_manager": "callbacks",
            "module_name": "module",
        }
    ]
    assert calls[0]["checkpointing_context"] is manager.checkpointing_context


def test_load_passes_the_context_on(monkeypatch: pytest.MonkeyPatch) -> None:
    signature = inspect.signature(load_home.load_checkpoint)
    calls: list[dict[str, Any]] = []

    def load(**given: Any) -> tuple[int, int]:
        calls.append(dict(signature.bind(**given).arguments))
        return 3, 4

    monkeypatch.setattr(load_home, "load_checkpoint", load)
    manager = DefaultCheckpointManager(CheckpointConfig())
    state, model = object(), [object()]
    ctx: Any = CheckpointLoadContext(state, model, "optimizer", "scheduler", False, True, "groups", "module")
    assert manager.load(ctx) == (3, 4)
    assert calls == [
        {
            "state": state,
            "model": model,
            "optimizer": "optimizer",
            "opt_param_scheduler": "scheduler",
            "strict": False,
            "checkpointing_context": manager.checkpointing_context,
            "skip_load_to_model_and_opt": True,
            "pg_collection": "groups",
            "module_name": "module",
        }
    ]


def test_finalize_closes_the_queue_of_the_state() -> None:
    closed = []

    class Queue:
        def get_num_unfinalized_calls(self) -> int:
            return 0

        def maybe_finalize_async_calls(self, blocking: bool) -> list[int]:
            closed.append(("finalize", blocking))
            return []

        def close(self) -> None:
            closed.append(("close", True))

    class State:
        async_calls_queue = Queue()

    state: Any = State()
    manager = DefaultCheckpointManager(CheckpointConfig(async_save=True, save="/nowhere"))
    manager.finalize_async_saves(state, blocking=True, terminate=True)
    assert closed == [("finalize", True), ("close", True)]
