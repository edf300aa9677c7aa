# SPDX-License-Identifier: Apache-2.0
"""``ckpt_fast.checkpointing`` has every documented name, with the documented signature."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import logging
from typing import Any

import pytest

from ckpt_fast import checkpointing
from ckpt_fast.trainer.contents import version
from tests.api import documented

CLASSES = {
    name: found
    for name, found in vars(documented).items()
    if inspect.isclass(found) and found.__module__ == documented.__name__
}
FUNCTIONS = {name: found for name, found in vars(documented).items() if inspect.isfunction(found)}

# Parameters that only ckpt_fast has, with the reason. They are optional and come after the documented ones,
# so that every documented call means what the documentation says.
OWN_PARAMETERS = {
    "cleanup_old_non_persistent_checkpoint": {
        "max_iteration": "a save in the background tells retention which newer ones are still being written",
    },
    "_load_non_persistent_base_checkpoint": {
        "cfg": "temporary checkpoints of the fsdp_dtensor format are preprocessed by the whole configuration",
        "is_megatron_mimo": "temporary checkpoints of multi-module models cannot be validated either",
    },
}


def parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def plain(parameter: inspect.Parameter) -> tuple[str, str, Any]:
    """Return name, kind and default: what callers can rely on."""
    default = "required" if parameter.default is parameter.empty else repr(parameter.default)
    return parameter.name, parameter.kind.description, default


def assert_same_signature(ours: Any, theirs: Any, own: dict[str, str]) -> None:
    found = parameters(ours)
    kept = [plain(each) for each in found if each.name not in own]
    assert kept == [plain(each) for each in parameters(theirs)]
    for position, each in enumerate(found):
        if each.name not in own:
            continue
        assert each.default is not each.empty, f"{each.name} must be optional"
        positional_after = [
            later.name
            for later in found[position + 1 :]
            if later.kind is later.POSITIONAL_OR_KEYWORD and later.name not in own
        ]
        assert each.kind is each.KEYWORD_ONLY or not positional_after, f"{each.name} moves {positional_after}"
    result = inspect.signature(theirs).return_annotation
    if result is not inspect.Signature.empty:
        # A dataclass's __init__ has None itself where the others have the string.
        assert str(inspect.signature(ours).return_annotation) == result


def test_every_documented_name_is_there() -> None:
    documented_names = {*documented.DATA, "logger", *CLASSES, *FUNCTIONS}
    assert len(documented_names) == 54
    assert documented_names <= {*checkpointing.__all__}
    assert len(checkpointing.__all__) == len({*checkpointing.__all__})
    for name in documented_names:
        assert hasattr(checkpointing, name), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    assert_same_signature(getattr(checkpointing, name), FUNCTIONS[name], OWN_PARAMETERS.get(name, {}))


@pytest.mark.parametrize("name", OWN_PARAMETERS)
def test_own_parameters_exist(name: str) -> None:
    names = {each.name for each in parameters(getattr(checkpointing, name))}
    assert names >= OWN_PARAMETERS[name].keys()


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"CheckpointType"}))
def test_constructor(name: str) -> None:
    assert_same_signature(getattr(checkpointing, name), CLASSES[name], {})


@pytest.mark.parametrize("class_name", ["CheckpointManager", "DefaultCheckpointManager"])
@pytest.mark.parametrize("method", ["save", "load", "finalize_async_saves"])
def test_manager_method(class_name: str, method: str) -> None:
    ours, theirs = getattr(checkpointing, class_name), CLASSES[class_name]
    assert_same_signature(getattr(ours, method), getattr(theirs, method), {})


def test_managers_context_is_a_property() -> None:
    found = inspect.getattr_static(checkpointing.DefaultCheckpointManager, "checkpointing_context")
    assert isinstance(found, property)
    assert found.fset is None


def test_manager_is_a_protocol() -> None:
    protocol: Any = checkpointing.CheckpointManager
    assert protocol._is_protocol
    assert not checkpointing.DefaultCheckpointManager.__dict__.get("_is_protocol", False)


def test_checkpoint_types() -> None:
    assert issubclass(checkpointing.CheckpointType, enum.Enum)
    ours = {member.name: member.value for member in checkpointing.CheckpointType}
    assert list(ours.items()) == [(member.name, member.value) for member in documented.CheckpointType]


@pytest.mark.parametrize("name", ["CheckpointSaveContext", "CheckpointLoadContext"])
def test_contexts_are_dataclasses_that_code_may_fill_in(name: str) -> None:
    context: Any = getattr(checkpointing, name)
    assert dataclasses.is_dataclass(context)
    assert not context.__dataclass_params__.frozen
    fields = [field.name for field in dataclasses.fields(context)]
    assert fields == [each.name for each in parameters(CLASSES[name])]


@pytest.mark.parametrize("name", sorted(documented.DATA.keys() - {"_CHECKPOINT_VERSION"}))
def test_data(name: str) -> None:
    assert getattr(checkpointing, name) == documented.DATA[name]
    assert type(getattr(checkpointing, name)) is type(documented.DATA[name])


def test_logger_is_the_modules_own() -> None:
    assert isinstance(checkpointing.logger, logging.Logger)
    assert checkpointing.logger is logging.getLogger("ckpt_fast.checkpointing")


def test_checkpoint_version_starts_unset_and_follows_its_setter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "_CHECKPOINT_VERSION", documented.DATA["_CHECKPOINT_VERSION"])
    assert checkpointing._CHECKPOINT_VERSION is None
    checkpointing.set_checkpoint_version(3.0)
    assert checkpointing._CHECKPOINT_VERSION == 3.0
    assert checkpointing.get_checkpoint_version() == 3.0
