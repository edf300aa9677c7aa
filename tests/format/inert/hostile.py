# SPDX-License-Identifier: Apache-2.0
"""Pickles as an attacker makes them, read by the reader alone and under watch.

The scan that comes before the reader refuses most of them already.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import enum
import io
import pickle
import resource
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ckpt_fast.format.inert.kinds import RefusedPickleError
from ckpt_fast.format.inert.reader import InertUnpickler

MOST_NBYTES = 256 << 20


class Color(enum.Enum):
    RED = 1


class Point(NamedTuple):
    x: int


@dataclasses.dataclass
class Plain:
    x: int

    def extend(self, values: Any) -> None:
        raise AssertionError("code of the class was run")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("code of the class was run")

    def __hash__(self) -> int:
        raise AssertionError("code of the class was run")


@dataclasses.dataclass(slots=True)
class Slotted:
    x: int


# Pickles, built from parts.


class Call:
    """Is pickled as a call, of a class or function by its name."""

    def __init__(
        self, name: tuple[str, str], args: tuple[Any, ...], new: bool = False, state: Any = None
    ) -> None:
        self.name, self.args, self.new, self.state = name, args, new, state


class Name:
    """Is pickled as the name of a class or function."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Storage:
    """Is pickled as a storage."""


class _Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Name):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Storage):
            self.write(pickle.NONE + pickle.BINPERSID)
        elif isinstance(obj, Call):
            self.save(Name(*obj.name))
            self.save(obj.args)
            self.write(pickle.NEWOBJ if obj.new else pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)

    def memoize(self, obj: Any) -> None:
        """Nothing occurs twice."""


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(value)
    return buffer.getvalue()


def meta_storage(pid: Any) -> Any:
    return torch.storage.TypedStorage(
        wrap_storage=torch.UntypedStorage(4), dtype=torch.float32, _internal=True
    )


def read(content: bytes) -> Any:
    return InertUnpickler(io.BytesIO(content), meta_storage).load()


# Watching.

_watched: list[str] | None = None
_EVENTS = (
    "import",
    "open",
    "exec",
    "compile",
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "code.",
)


def _note(event: str, args: Any) -> None:
    if _watched is not None and event.startswith(_EVENTS):
        _watched.append(f"{event} {args!r}"[:200])


sys.addaudithook(_note)
REAL: list[Any] = [
    *(collections.OrderedDict, collections.Counter, collections.deque, collections.defaultdict),
    *(argparse.Namespace, types.SimpleNamespace, datetime.datetime, datetime.timedelta, datetime.timezone),
    *(Color, Color.RED, Point, Plain, Slotted, np.ndarray, np.dtype, torch.Tensor, torch.nn.Parameter),
    *(torch.Size, torch.device, torch.dtype, io.BytesIO),
]


def attributes_of(thing: Any) -> set[str]:
    return set(vars(thing)) if hasattr(thing, "__dict__") else set()


@contextlib.contextmanager
def nothing_happens() -> Iterator[None]:
    """Assert that no file, module or process was touched, no class changed, and little memory taken."""
    global _watched
    before = [attributes_of(thing) for thing in REAL]
    byte_order = np.dtype("f8").str, np.dtype("M8").str
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _watched = []
    try:
        yield
    finally:
        events, _watched = _watched, None
    assert events == []
    assert [attributes_of(thing) for thing in REAL] == before
    assert (np.dtype("f8").str, np.dtype("M8").str) == byte_order
    assert Color.RED.value == 1 and Color(1) is Color.RED
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10 < MOST_NBYTES


def refused(value: Any) -> str:
    """Read what must be refused, without effect; return the reason."""
    content = value if isinstance(value, bytes) else pickled(value)
    with nothing_happens(), pytest.raises(RefusedPickleError) as caught:
        read(content)
    return str(caught.value)


HUGE = 1 << 40
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "nothing": (),
    "a size": (HUGE,),
    "two sizes": (HUGE, HUGE),
    "texts": ("../../etc/passwd", "rot13"),
    "a number as text": ("1e999999999",),
    "bytes": (b"x", HUGE),
    "a range": (range(HUGE),),
    "a list": ([1, HUGE], HUGE),
    "a dict": ({"a": HUGE, "__class__": 1},),
    "a name": (Name("os", "system"), ("touch PWNED",)),
    "known names": (Name("builtins", "list"), Name("torch", "Tensor"), (HUGE,), {"__class__": 1}),
    "dtype of objects": ("O8", False, True),
    "dtype": ("f8", False, False),
    "array": (Call(("numpy", "dtype"), ("f8", False, True)), b"12345678" * 2, (HUGE, HUGE), "C"),
    "tensor": (1, 0, (HUGE, HUGE), (1, 1), False, None),
    "meta": (torch.float32, (HUGE,), (1,), False),
    "layout": (Call(("torch.serialization", "_get_layout"), ("torch.sparse_coo",)), (1, 2, 3)),
}
STATES: dict[str, Any] = {
    "none": None,
    "attributes": {"x": 1, "__class__": 2, "__dict__": 3, "append": 4},
    "slots": (None, {"x": 1, "__class__": 2}),
    "array": (1, (HUGE,), Call(("numpy", "dtype"), ("f8",)), False, b"x"),
    "objects": (1, (1,), Call(("numpy", "dtype"), ("f8",)), False, [1]),
    "dtype": (3, ">", None, None, None, -1, -1, 0),
    "flags": (3, "|", None, None, None, HUGE, 1, 63),
    "list": [1, 2],
}
