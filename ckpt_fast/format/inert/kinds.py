# SPDX-License-Identifier: Apache-2.0
"""What the reader knows how to make: values of Python and its standard library.

Each kind checks the arguments and the state that a pickle gives before anything is made of them. So nothing
takes more memory than the pickle has bytes for, and only the object just made is changed.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import io
import pathlib
import pickle
import re
import types
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ckpt_fast.errors import UnsafeCheckpointError

# Of the parts of a fraction: finding their common divisor takes quadratic time.
_MOST_BITS = 1 << 16
_FRACTION = re.compile(r"-?[0-9]{1,4000}(/[0-9]{1,4000})?")


class RefusedPickleError(UnsafeCheckpointError, pickle.UnpicklingError):
    """A pickle asks for something that is not on the list of what the reader makes."""


@dataclass(frozen=True)
class Kind:
    """What may be done with a class or function that a pickle names. None: it may not.

    Attributes:
        make: makes an object from the arguments of a call.
        new: makes one from the arguments of ``__new__``.
        build: gives state to an object that the same pickle has made.
        factory: makes the missing values of a defaultdict.
        members: of an enum, by name.
        takes_names: whether arguments may be names of other classes.
    """

    make: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None
    build: Callable[[Any, Any], None] | None = None
    factory: type | None = None
    members: Mapping[str, Any] | None = None
    takes_names: bool = False


@dataclass(frozen=True)
class Named:
    """Stands for a class or function that a pickle names; the pickle never gets hold of the real one.

    Attributes:
        name: its module and name.
        kind: what may be done with it.
        refusal: why that is nothing, of a class that is named for one inside it; otherwise empty.
    """

    name: str
    kind: Kind
    refusal: str = ""


# ``getattr``, which the reader answers itself: for a class inside a class, or a member of an enum.
ATTRIBUTE = Kind()


def refuse(reason: str) -> NoReturn:
    raise RefusedPickleError(reason)


def require(condition: bool, what: str) -> None:
    """Refuse a pickle that gives something else than Python's own pickles would."""
    if not condition:
        refuse(f"Restricted unpickler refused to make {what} of what the pickle says")


def are(values: Iterable[Any], *kinds: type) -> bool:
    """Whether each value is of exactly one of these classes."""
    return all(type(value) in kinds for value in values)


def attributes(state: Any, what: str) -> dict[str, Any]:
    """The state of an object that has only a ``__dict__``: names and values."""
    require(type(state) is dict and are(state, str), what)
    # Such names mean something to Python, and no attribute of data is called so.
    require(not any(name.startswith("__") and name.endswith("__") for name in state), what)
    return state  # type: ignore[no-any-return]


def set_attributes(made: Any, state: Any) -> None:
    """``build`` of objects that take any attributes."""
    vars(made).update(attributes(state, f"a {type(made).__name__}"))


def _of(cls: type, *kinds: type, count: tuple[int, ...] = (1,)) -> Kind:
    """Calls a class that only holds what it is given, with arguments of these classes."""

    def make(*args: Any) -> Any:
        require(len(args) in count and are(args, *kinds), f"a {cls.__name__}")
        return cls(*args)

    return Kind(make)


def _blank(cls: Callable[[], Any]) -> Callable[[], Any]:
    """Makes an object of nothing; there may be no arguments."""

    def make() -> Any:
        return cls()

    return make


def _bytes(*args: Any) -> bytes:
    require(not args or (len(args) == 1 and are(args, bytes, bytearray)), "bytes")
    return bytes(*args)


def _bytearray(*args: Any) -> bytearray:
    is_text = len(args) == 2 and type(args[0]) is str and args[1] in ("latin-1", "latin1")
    require(is_text or not args or (len(args) == 1 and are(args, bytes, bytearray)), "a bytearray")
    return bytearray(*args)


def _encode(text: Any, codec: Any) -> bytes:
    """How pickles of protocol 2 spell bytes."""
    if type(text) is not str or codec != "latin1":
        refuse(f"Restricted unpickler refused to use the codec {codec!r}")
    return text.encode("latin1")


def _of_keys(cls: type) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        require(not args or (len(args) == 1 and are(args, list, tuple, set)), f"a {cls.__name__}")
        for keys in args:
            require_keys(keys)
        return cls(*args)

    return make


def require_keys(keys: Iterable[Any]) -> None:
    """Refuse keys whose comparison would run code of the program on what the checkpoint says."""
    for key in keys:
        if isinstance(key, (tuple, frozenset)):
            require_keys(key)
        elif hasattr(key, "__dataclass_fields__"):
            refuse(f"Restricted unpickler refused a {type(key).__name__}, a dataclass, as a key")


def _counter(*args: Any) -> collections.Counter[Any]:
    require(not args or (len(args) == 1 and type(args[0]) is dict), "a Counter")
    return collections.Counter(*args)


def _deque(items: Any = (), maxlen: Any = None) -> collections.deque[Any]:
    require(are((items,), list, tuple) and are((maxlen,), int, types.NoneType), "a deque")
    return collections.deque(items, maxlen)


def _defaultdict(factory: Any = None) -> collections.defaultdict[Any, Any]:
    known = factory.kind.factory if isinstance(factory, Named) else None
    require(factory is None or known is not None, "a defaultdict")
    return collections.defaultdict(known)


def _of_bytes(cls: Any, nbytes: int) -> Kind:
    """Dates and times: their bytes, and the time zone if they have one."""

    def make(content: Any, *zone: Any) -> Any:
        require(type(content) is bytes and len(content) == nbytes, f"a {cls.__name__}")
        require(len(zone) <= (cls is not datetime.date) and are(zone, datetime.timezone), f"a {cls.__name__}")
        return cls(content, *zone)

    return Kind(make)


def _timezone(offset: Any, name: Any = "") -> datetime.timezone:
    require(type(offset) is datetime.timedelta and type(name) is str, "a timezone")
    return datetime.timezone(offset, name) if name else datetime.timezone(offset)


def _fraction(*args: Any) -> fractions.Fraction:
    if len(args) == 1 and type(args[0]) is str and _FRACTION.fullmatch(args[0]):
        args = tuple(map(int, args[0].split("/")))
    require(len(args) in (1, 2) and are(args, int), "a Fraction")
    require(all(part.bit_length() <= _MOST_BITS for part in args), "a Fraction")
    return fractions.Fraction(*args)


def _build_uuid(made: uuid.UUID, state: Any) -> None:
    state = attributes(state, "a UUID")
    number, safe = state.get("int"), state.get("is_safe", uuid.SafeUUID.unknown.value)
    require(type(number) is int and 0 <= number < 1 << 128 and state.keys() <= {"int", "is_safe"}, "a UUID")
    require(safe in [member.value for member in uuid.SafeUUID], "a UUID")
    object.__setattr__(made, "int", number)
    object.__setattr__(made, "is_safe", uuid.SafeUUID(safe))


def _build_bytes_io(made: io.BytesIO, state: Any) -> None:
    require(type(state) is tuple and len(state) == 3, "a BytesIO")
    content, position, rest = state
    require(type(content) is bytes and type(position) is int and 0 <= position < 1 << 62, "a BytesIO")
    made.write(content)
    made.seek(position)
    set_attributes(made, rest or {})


def _slice(*args: Any) -> slice:
    require(len(args) == 3, "a slice")
    return slice(*args)


def standard_kinds() -> Mapping[tuple[str, str], Kind]:
    """Kinds by module and name."""
    factories = (list, dict, set, tuple, int, float, bool, str)
    kinds = {("builtins", cls.__name__): Kind(factory=cls) for cls in factories}
    kinds["builtins", "bytes"] = Kind(_bytes, factory=bytes)
    kinds["builtins", "bytearray"] = Kind(_bytearray, factory=bytearray)
    kinds["builtins", "set"] = Kind(_of_keys(set), factory=set)
    kinds["builtins", "frozenset"] = Kind(_of_keys(frozenset), factory=frozenset)
    kinds["builtins", "complex"] = _of(complex, int, float, count=(1, 2))
    kinds["builtins", "range"] = _of(range, int, count=(1, 2, 3))
    kinds["builtins", "slice"] = Kind(_slice)
    kinds["builtins", "getattr"] = ATTRIBUTE
    kinds["_codecs", "encode"] = Kind(_encode)
    kinds["collections", "OrderedDict"] = Kind(
        # The state dict of a module has the attribute ``_metadata``.
        _blank(collections.OrderedDict),
        build=set_attributes,
        factory=collections.OrderedDict,
    )
    kinds["collections", "Counter"] = Kind(_counter, factory=collections.Counter)
    kinds["collections", "deque"] = Kind(_deque, factory=collections.deque)
    kinds["collections", "defaultdict"] = Kind(_defaultdict, takes_names=True)
    kinds["types", "SimpleNamespace"] = Kind(_blank(types.SimpleNamespace), build=set_attributes)
    kinds["argparse", "Namespace"] = Kind(new=_blank(argparse.Namespace), build=set_attributes)
    kinds["datetime", "datetime"] = _of_bytes(datetime.datetime, 10)
    kinds["datetime", "date"] = _of_bytes(datetime.date, 4)
    kinds["datetime", "time"] = _of_bytes(datetime.time, 6)
    kinds["datetime", "timedelta"] = _of(datetime.timedelta, int, count=(3,))
    kinds["datetime", "timezone"] = Kind(_timezone)
    kinds["decimal", "Decimal"] = _of(decimal.Decimal, str)
    kinds["fractions", "Fraction"] = Kind(_fraction)
    kinds["uuid", "UUID"] = Kind(new=lambda: object.__new__(uuid.UUID), build=_build_uuid)
    kinds["_io", "BytesIO"] = Kind(new=_blank(io.BytesIO), build=_build_bytes_io)
    # Python has moved these between versions.
    for module in ("pathlib", "pathlib._local"):
        for cls in (pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path())):
            kinds[module, cls.__name__] = _of(cls, str, count=tuple(range(256)))
    return kinds
