# SPDX-License-Identifier: Apache-2.0
"""Classes of the program: enums, named tuples and dataclasses that run no code, and those that are allowed.

They are looked up among the modules that the process has imported. No module is imported for a checkpoint.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import enum
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ckpt_fast.format.inert.kinds import Kind, attributes, refuse, require, set_attributes

_Class = TypeVar("_Class", bound=type)

# What a class may define to run code when an instance is unpickled, changed or dropped.
_HOOKS = {
    "__del__",
    "__delattr__",
    "__getattribute__",
    "__getnewargs__",
    "__getnewargs_ex__",
    "__getstate__",
    "__new__",
    "__post_init__",
    "__reduce__",
    "__reduce_ex__",
    "__setattr__",
    "__setstate__",
}
_HOOKS_OF_TUPLES = _HOOKS - {"__new__"} | {"__eq__", "__hash__"}
# What collections.namedtuple defines: it gives the values of the fields.
_GIVES_FIELDS = collections.namedtuple("_GivesFields", "").__getnewargs__.__code__  # type: ignore[attr-defined]
# What dataclasses define themselves: for frozen ones, and for frozen ones with slots.
_FROZEN_HOOKS = {"__setattr__", "__delattr__"}
_FROZEN_SLOTS_HOOKS = {"__getstate__": "_dataclass_getstate", "__setstate__": "_dataclass_setstate"}
_WITHOUT_CODE: tuple[Any, ...] = (object, abc.ABC, typing.Generic)
# Their states are made of dataclasses and dictionaries with such words in their names.
_ENERGON = "megatron.energon."
_ENERGON_NAMES = ("State", "Checkpoint")
# Dataclasses whose __post_init__ only checks what the program itself has configured.
_KNOWN_DATACLASSES = {
    ("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
}

_allowed: set[type] = set()


def allow_class(cls: _Class) -> _Class:
    """Let checkpoints hold instances of ``cls``, when they are saved and when they are loaded.

    For classes whose own code (``__new__``, ``__setstate__``, ``__reduce__``) may run on what a checkpoint
    says. Enums, named tuples and plain dataclasses need no permission. Can be used as a decorator.

    Raises:
        TypeError: ``cls`` is no class.
    """
    if not isinstance(cls, type):
        raise TypeError(f"allow_class takes a class, not {cls!r}")
    _allowed.add(cls)
    return cls


def class_named(module: str, name: str) -> type | None:
    """The class of that name in an imported module; None if there is none."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        # Not getattr, for which modules may import others.
        found = vars(found).get(part) if isinstance(found, (types.ModuleType, type)) else None
    return found if isinstance(found, type) else None


def trusted(module: str, name: str) -> Any:
    """The class or function of that name that the program has allowed; None if it has not."""
    found = class_named(module, name)
    return found if found in _allowed else _safe_globals().get(f"{module}.{name}")


def is_trusted(cls: type) -> bool:
    """Whether the program has allowed the class."""
    return cls in _allowed or cls in _safe_globals().values()


def _safe_globals() -> dict[str, Any]:
    """What the program has allowed with ``torch.serialization.add_safe_globals``, by its name in a pickle."""
    entries: list[Any] = torch.serialization.get_safe_globals()
    named = (entry if isinstance(entry, tuple) else (entry, _name_of(entry)) for entry in entries)
    return {name: value for value, name in named}


def _name_of(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def build_trusted(made: Any, state: Any) -> None:
    """Give an instance of an allowed class its state, as pickle does."""
    setter = getattr(made, "__setstate__", None)
    if setter is not None:
        setter(state)
        return
    values, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
    if values:  # with slots alone there is nowhere to put any
        vars(made).update(values)
    for name, value in (slots or {}).items():
        setattr(made, name, value)


def program_kind(module: str, name: str) -> Kind:
    """How instances of a class of the program are made.

    Raises:
        RefusedPickleError: the class is not loaded, or may run code. Says why.
    """
    found = class_named(module, name)
    kind: Kind | str
    if found is None:
        is_imported = module in sys.modules
        kind = "it is no class" if is_imported else "the module that defines it has not been imported"
    elif issubclass(found, enum.Enum):
        kind = _enum_kind(found)
    elif _is_named_tuple(found):
        kind = _reason(found, _HOOKS_OF_TUPLES, tuple) or Kind(new=_named_tuple(found))
    elif module.startswith(_ENERGON) and any(word in found.__name__ for word in _ENERGON_NAMES):
        kind = _energon_kind(found)
    elif dataclasses.is_dataclass(found):
        is_known = (module, name) in _KNOWN_DATACLASSES
        kind = _dataclass_kind(found, _HOOKS - {"__post_init__"} if is_known else _HOOKS)
    else:
        kind = "it is not on the list of what is loaded as data"
    if isinstance(kind, str):
        refuse(f"Restricted unpickler refused to load '{module}.{name}': {kind}")
    return kind


def _reason(cls: type, hooks: set[str], *without_code: type) -> str:
    """Why instances of the class cannot be made without running code of it; empty if they can."""
    if type(cls) not in (type, abc.ABCMeta):
        return "its metaclass may run code"
    for base in cls.__mro__:
        for hook in sorted(hooks & vars(base).keys()):
            if base not in (*_WITHOUT_CODE, *without_code) and not _is_generated(base, hook):
                return f"it has a {hook} of its own"
    return ""


def _is_generated(cls: type, hook: str) -> bool:
    """Whether ``namedtuple`` has defined the hook, or ``dataclass`` for classes of frozen instances."""
    if hook == "__getnewargs__" and getattr(vars(cls)[hook], "__code__", None) is _GIVES_FIELDS:
        return True
    parameters = vars(cls).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return False
    name = getattr(vars(cls)[hook], "__name__", "")
    return hook in _FROZEN_HOOKS or _FROZEN_SLOTS_HOOKS.get(hook) == name


def _enum_kind(cls: type[enum.Enum]) -> Kind | str:
    """Enums whose look-up by value is the standard one, and so runs no code of theirs."""
    functions = (type(cls).__call__, cls.__new__, cls._missing_.__func__)  # type: ignore[attr-defined]
    if any(function.__module__ != "enum" for function in functions):
        return "this enum looks its members up in its own way"

    def make(value: Any) -> Any:  # of one value: with more, an enum would be made
        return cls(value)

    return Kind(make, members=cls.__members__)


def _energon_kind(cls: type) -> Kind | str:
    if issubclass(cls, dict):
        return Kind(new=lambda: dict.__new__(cls), build=set_attributes)
    if not dataclasses.is_dataclass(cls):
        return "it is no data"
    # Energon gives some of them methods for being pickled.
    return Kind(new=lambda: object.__new__(cls), build=build_trusted)


def _is_named_tuple(cls: type) -> bool:
    fields = next((vars(base)["_fields"] for base in cls.__mro__ if "_fields" in vars(base)), None)
    return issubclass(cls, tuple) and type(fields) is tuple


def _named_tuple(cls: Any) -> Callable[..., Any]:
    def new(*values: Any) -> Any:
        require(len(values) == len(cls._fields), f"a {cls.__qualname__}")
        return tuple.__new__(cls, values)

    return new


def _dataclass_kind(cls: Any, hooks: set[str]) -> Kind | str:
    """Dataclasses without code: their instances are made, and their fields set, behind the class's back."""
    reason = _reason(cls, hooks)
    if reason:
        return reason
    if not all("__dataclass_fields__" in vars(base) or base in _WITHOUT_CODE for base in cls.__mro__):
        return "it derives from a class that is no dataclass"
    names = [field.name for field in dataclasses.fields(cls)]
    slots: dict[str, Any] = {}
    for name in names:
        held = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
        if isinstance(held, types.MemberDescriptorType):
            slots[name] = held
        elif hasattr(type(held), "__set__"):
            return f"its field {name} is set by code"

    def build(made: Any, state: Any) -> None:
        what = f"a {cls.__qualname__}"
        if type(state) is list:  # frozen, with slots: values in the order of the fields
            require(len(state) == len(names), what)
            state = dict(zip(names, state, strict=True))
        parts = state if type(state) is tuple else (state, None)
        require(len(parts) == 2, what)
        for part in parts:
            for name, value in attributes(part or {}, what).items():
                require(name in names, f"{what} with {name!r}, which is no field of it,")
                if name in slots:
                    slots[name].__set__(made, value)
                else:
                    vars(made)[name] = value

    return Kind(new=lambda: object.__new__(cls), build=build)
