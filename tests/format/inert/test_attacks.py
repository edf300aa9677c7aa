# SPDX-License-Identifier: Apache-2.0
"""What a pickle made by an attacker can do with what the reader knows: nothing."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import io
import pickle
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_fast.format.inert.reader import _listed
from tests.format.inert import hostile
from tests.format.inert.hostile import (
    ARGUMENTS,
    STATES,
    Call,
    Name,
    Plain,
    Slotted,
    nothing_happens,
    pickled,
    read,
    refused,
)

# Every entry of the list, with everything at it.

CLASSES = [
    *((hostile.__name__, name) for name in ("Color", "Point", "Plain", "Slotted")),
    ("torch", "FloatStorage"),
    ("torch", "UntypedStorage"),
    ("torch", "float32"),
    ("builtins", "Ellipsis"),
]
INERT = (
    *(bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, slice),
    *(type(None), types.SimpleNamespace, collections.deque, np.generic, np.ndarray, np.dtype, io.BytesIO),
    *(argparse.Namespace, torch.Tensor, torch.device, torch.dtype, torch.layout, enum.Enum, Plain, Slotted),
)


def is_inert(value: Any) -> bool:
    module = type(value).__module__.split(".")[0]
    return isinstance(value, INERT) or module in ("datetime", "decimal", "fractions", "uuid", "pathlib")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*_listed(), *CLASSES], ids=".".join)
def test_anything_is_made_of_it(name: tuple[str, str]) -> None:
    """Whatever it is given, the result is data, or an error."""
    refusals = 0
    for args in ARGUMENTS.values():
        for new in (False, True):
            for state in STATES.values():
                content = pickled(Call(name, args, new, state))
                with nothing_happens():
                    try:
                        value = read(content)
                    except Exception:
                        refusals += 1
                    else:
                        assert is_inert(value), value
    assert refusals > len(ARGUMENTS) * len(STATES)


@pytest.mark.parametrize("name", [*_listed(), *CLASSES[:-2]], ids=".".join)
def test_names_are_no_values(name: tuple[str, str]) -> None:
    named = Name(*name)
    for value in (named, [named], {"a": named}, {named: 1}, (1, (named,)), [[named]]):
        assert "it is no data" in refused(value)
    assert refused(Call(("types", "SimpleNamespace"), (), state={"a": named}))
    assert refused(Call(("collections", "deque"), ([], named)))
    assert refused(Call(("builtins", "set"), ([named],)))


@pytest.mark.parametrize("name", [*_listed(), *CLASSES], ids=".".join)
@pytest.mark.parametrize("state", [{"hacked": 1}, (None, {"hacked": 1})], ids=["attributes", "slots"])
def test_classes_cannot_be_changed(name: tuple[str, str], state: Any) -> None:
    content = pickled(Name(*name))[:-1] + pickled(state)[2:-1] + pickle.BUILD + pickle.STOP
    assert "to change" in refused(content)


# Single members, of which there is one for the whole process.


@pytest.mark.parametrize(
    "shared",
    [
        Call((hostile.__name__, "Color"), (1,)),
        Call(("builtins", "getattr"), (Name(hostile.__name__, "Color"), "RED")),
        Call(("datetime", "timezone"), (Call(("datetime", "timedelta"), (0, 0, 0)),)),
        Call(("torch.serialization", "_get_layout"), ("torch.strided",)),
    ],
    ids=["enum", "enum by name", "time zone", "layout"],
)
def test_what_is_shared_cannot_be_changed(shared: Call) -> None:
    shared.state = {"_value_": 2, "hacked": 1}
    assert "to change" in refused(shared)


def test_a_dtype_that_is_shared_cannot_be_changed() -> None:
    with nothing_happens():
        made = read(pickled(Call(("numpy", "dtype"), ("f8", False, False), state=STATES["dtype"])))
    assert made.str == ">f8"


# Code of the program.


@pytest.mark.parametrize(
    "name",
    [
        *(("builtins", name) for name in ("eval", "type", "open", "object", "super")),
        *(("torch", "load"), ("torch.hub", "load"), ("torch._utils", "_import_dotted_name")),
        *(("numpy", "load"), ("numpy", "memmap"), ("collections", "namedtuple"), ("pathlib", "Path")),
        *(("os", "system"), ("operator", "attrgetter"), ("copyreg", "_reconstructor")),
        ("functools", "partial"),
    ],
    ids=".".join,
)
def test_functions_are_not_on_the_list(name: tuple[str, str]) -> None:
    assert ".".join(name) in refused(Call(name, ("x",)))
    assert ".".join(name) in refused(Call(name, ("x",), new=True))


def test_attributes_are_not_looked_up() -> None:
    for cls, attribute in (
        (("__main__", "x"), "y"),
        (("collections", "deque"), "append"),
        ((hostile.__name__, "Color"), "mro"),
    ):
        assert "refused to load" in refused(Call(("builtins", "getattr"), (Name(*cls), attribute)))
    assert "refused to load" in refused(Call(("builtins", "getattr"), ("text", "upper")))


class Holder:
    """Has what only ``getattr`` finds: attributes that are no data."""

    run = staticmethod(print)

    class Part(collections.Counter[str]):
        pass


def test_only_a_class_inside_a_class_is_looked_up() -> None:
    holder = (__name__, "Holder")
    for attribute in (
        "run",
        "__init__",
        "__class__",
        "__mro__",
        "Part",
        "mro",
        "Part.update",
        "unheard_of",
        3,
    ):
        nested = Call(("builtins", "getattr"), (Name(*holder), attribute))
        assert "refused to load" in refused(nested), attribute
        call = pickled(nested)[:-1] + pickled(("x",))[2:-1] + pickle.REDUCE + pickle.STOP
        assert "refused to load" in refused(call), attribute
    for arguments in ((), (Name(*holder),), (Name(*holder), "Part", None), (Name("os", "path"), "join")):
        assert "refused to load" in refused(Call(("builtins", "getattr"), arguments))


def test_no_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has not been imported" in refused(Call(("antigravity", "geohash"), ()))
    lazy = types.ModuleType("lazy")

    def look_up(name: str) -> Any:
        raise AssertionError("code of the module was run")

    lazy.__getattr__ = look_up  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    assert "it is no class" in refused(Call(("lazy", "Anything"), ()))
    assert "it is no class" in refused(Call(("lazy", "__getattr__.__call__"), ()))


def classes_with_code() -> dict[str, type]:
    """Return dataclasses and named tuples, each of which would run code of its own."""

    def fail(*args: Any) -> Any:
        raise AssertionError("code of the class was run")

    found = {}
    for hook in (
        "__setstate__", "__getstate__", "__reduce__", "__reduce_ex__", "__post_init__", "__del__", "__new__",
        "__setattr__", "__getattribute__", "__getnewargs__",
    ):  # fmt: skip
        found[hook] = dataclasses.make_dataclass("WithCode", ["x"], namespace={hook: fail})
        found[f"inherited {hook}"] = dataclasses.make_dataclass("WithCode", ["y"], bases=(found[hook],))
    field = property(fail, fail)
    found["property"] = dataclasses.make_dataclass("WithCode", ["x"])
    found["property"].x = field  # type: ignore[attr-defined]
    found["base"] = dataclasses.make_dataclass("WithCode", ["x"], bases=(type("Base", (), {}),))
    found["dict"] = dataclasses.make_dataclass("WithCode", ["x"], bases=(dict,))
    meta = type("Meta", (type,), {"__call__": fail})
    found["metaclass"] = dataclasses.dataclass(meta("WithCode", (), {"__annotations__": {"x": int}}))
    for hook in ("__eq__", "__hash__", "__del__", "__reduce__", "__setstate__", "__getnewargs__"):
        found[f"tuple {hook}"] = type("WithCode", (collections.namedtuple("WithCode", "x"),), {hook: fail})
    found["enum"] = enum.Enum("WithCode", {"_missing_": classmethod(fail), "A": 1})
    found["class"] = type("WithCode", (), {})
    return found


WITH_CODE = classes_with_code()


@pytest.mark.parametrize("kind", WITH_CODE)
def test_classes_with_code(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(hostile), "WithCode", WITH_CODE[kind])
    for new in (True, False):
        assert "WithCode" in refused(Call((hostile.__name__, "WithCode"), (1,), new=new))


def test_dataclasses_get_fields_only() -> None:
    name = (hostile.__name__, "Plain")
    for state in (
        {"y": 1},
        {"__class__": 1},
        {"x": 1, "__dict__": {}},
        (None, {"y": 1}),
        [1, 2],
        3,
        ({}, {}, {}),
    ):
        assert "Plain" in refused(Call(name, (), new=True, state=state))
        assert refused(Call((hostile.__name__, "Slotted"), (), new=True, state=state))
    with nothing_happens():
        assert read(pickled(Call(name, (), new=True, state={"x": 1}))).x == 1


def test_methods_of_dataclasses_are_not_called() -> None:
    made = pickled(Call((hostile.__name__, "Plain"), (), new=True, state={"x": 1}))[:-1]
    assert "append" in refused(made + b"K\x01a.")
    assert "append" in refused(made + b"(K\x01e.")
    assert "set items" in refused(made + b"K\x01K\x01s.")
    assert "as a key" in refused(b"\x80\x02}" + made[2:] + b"K\x01s.")
    assert "as a key" in refused(b"\x80\x02}" + made[2:] + b"\x85\x85K\x01s.")
    assert "as a key" in refused(b"\x80\x04(" + made[2:] + b"\x91.")
    assert "as a key" in refused(
        Call(("builtins", "set"), ([Call((hostile.__name__, "Plain"), (), new=True)],))
    )


def test_named_tuples_of_another_length() -> None:
    assert "Point" in refused(Call((hostile.__name__, "Point"), (1, 2), new=True))
    assert "to change" in refused(Call((hostile.__name__, "Point"), (1,), new=True, state={"y": 1}))


def test_enums_are_not_defined_anew() -> None:
    with nothing_happens(), pytest.raises((TypeError, ValueError)):
        read(pickled(Call((hostile.__name__, "Color"), ("Evil", "A B"))))
    with nothing_happens(), pytest.raises(ValueError, match="is not a valid Color"):
        read(pickled(Call((hostile.__name__, "Color"), (5,))))


@pytest.mark.parametrize(
    "factory",
    [("os", "system"), ("argparse", "Namespace"), ("collections", "deque"), (hostile.__name__, "Plain")],
)
def test_factories(factory: tuple[str, str]) -> None:
    content = pickled(Call(("collections", "defaultdict"), (Name(*factory),)))
    if factory == ("collections", "deque"):
        assert read(content)["missing"] == collections.deque()
    else:
        assert refused(content)
