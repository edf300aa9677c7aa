# SPDX-License-Identifier: Apache-2.0
"""Values that programs keep in checkpoints, and what they keep by mistake."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import pathlib
import random
import signal
import types
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch


class Phase(enum.Enum):
    WARMUP = "warmup"
    TRAIN = "train"


class Level(enum.IntEnum):
    LOW = 1


class Parts(enum.Flag):
    MODEL = 1
    OPTIMIZER = 2


class Point(NamedTuple):
    x: int
    y: float


@dataclasses.dataclass
class Progress:
    step: int
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class Frozen:
    step: int


@dataclasses.dataclass(slots=True)
class Slotted:
    step: int


class Custom:
    """A class that is on no list."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and other.step == self.step

    __hash__ = None  # type: ignore[assignment]


@dataclasses.dataclass
class WithCode:
    """A dataclass whose code would run."""

    step: int

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("code of the class was run")


class Outer:
    """A class that is on no list, around some that need none."""

    def __init__(self, step: int) -> None:
        self.step = step

    class Mode(enum.Enum):
        SLOW = 1

    @dataclasses.dataclass
    class Progress:
        step: int

        class Phase(enum.Enum):
            LATE = "late"

    class Point(NamedTuple):
        x: int

    class Custom:
        """On no list either."""


def _io_with(content: bytes) -> io.BytesIO:
    stream = io.BytesIO(content)
    stream.seek(2)
    return stream


VALUES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "bool": lambda: True,
    "int": lambda: 3,
    "large int": lambda: 1 << 100,
    "float": lambda: 1.5,
    "complex": lambda: 1 + 2j,
    "str": lambda: "text",
    "bytes": lambda: b"\x00\xff",
    "bytearray": lambda: bytearray(b"ab"),
    "list": lambda: [1, [2]],
    "tuple": lambda: (1, ("a", 2.5)),
    "dict": lambda: {"a": 1, "b": {"c": 2}},
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset({1, 2}),
    "OrderedDict": lambda: collections.OrderedDict(a=1),
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "Counter": lambda: collections.Counter("aab"),
    "deque": lambda: collections.deque([1, 2], maxlen=3),
    "named tuple": lambda: Point(1, 2.5),
    "range": lambda: range(1, 9, 2),
    "slice": lambda: slice(1, None),
    "Ellipsis": lambda: ...,
    "tensor": lambda: (torch.arange(4), "beside it"),
    "size": lambda: torch.Size([2, 3]),
    "torch dtype": lambda: torch.bfloat16,
    "torch device": lambda: torch.device("cpu"),
    "NumPy float": lambda: np.float32(2.5),
    "NumPy int": lambda: np.int64(3),
    "NumPy bool": lambda: np.bool_(True),
    "array": lambda: np.arange(6, dtype="f4").reshape(2, 3),
    "array of texts": lambda: np.array(["a", "bc"]),
    "NumPy datetime": lambda: np.datetime64("2024-02-29T12:00", "ms"),
    "NumPy RNG": lambda: np.random.RandomState(3).get_state(),
    "NumPy generator state": lambda: np.random.default_rng(3).bit_generator.state,
    "Python RNG": lambda: random.Random(3).getstate(),
    "NumPy dtype": lambda: np.dtype([("a", "i4"), ("b", "f8", (2,))]),
    "Namespace": lambda: argparse.Namespace(lr=0.1, dtype=torch.float16, phase=Phase.TRAIN),
    "SimpleNamespace": lambda: types.SimpleNamespace(a=1),
    "enum": lambda: Phase.TRAIN,
    "IntEnum": lambda: Level.LOW,
    "Flag": lambda: Parts.MODEL | Parts.OPTIMIZER,
    "signal": lambda: signal.SIGTERM,
    "nested enum": lambda: [Outer.Mode.SLOW, Outer.Mode.SLOW, Outer.Progress.Phase.LATE],
    "nested dataclass": lambda: Outer.Progress(3),
    "nested named tuple": lambda: Outer.Point(3),
    "dataclass": lambda: Progress(3, [1.5]),
    "frozen dataclass": lambda: Frozen(3),
    "dataclass with slots": lambda: Slotted(3),
    "datetime": lambda: datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
    "date": lambda: datetime.date(2024, 2, 29),
    "time": lambda: datetime.time(12, 30),
    "timedelta": lambda: datetime.timedelta(days=1, microseconds=5),
    "path": lambda: pathlib.Path("a/b"),
    "Decimal": lambda: decimal.Decimal("1.50"),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "UUID": lambda: uuid.UUID(int=5),
    "BytesIO": lambda: _io_with(b"abcd"),
}

# What a save refuses, with a part of the error.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "class": (lambda: np.float64, r"numpy\.float64"),
    "partial": (lambda: functools.partial(print, 1), r"functools\.partial"),
    "lambda": (lambda: lambda: 3, r"lambda"),
    "function": (lambda: len, r"builtins\.len"),
    "method": (lambda: pathlib.Path.cwd, r"pathlib\.Path"),
    "generator": (lambda: random.Random(3), r"random\.Random"),
    "own class": (lambda: Custom(3), r"tests\.everyday\.Custom"),
    "class around others": (lambda: Outer(3), r"tests\.everyday\.Outer'"),
    "class inside another": (Outer.Custom, r"tests\.everyday\.Outer\.Custom"),
    "nested class itself": (lambda: Outer.Mode, r"tests\.everyday\.Outer\.Mode"),
    "dataclass with code": (lambda: WithCode(3), r"tests\.everyday\.WithCode.*__setstate__"),
    "array of objects": (lambda: np.array([None, {}]), "an array of objects"),
    "deep nesting": (lambda: functools.reduce(lambda value, _: [value], range(300), []), "nested too deep"),
}


def same(first: Any, second: Any) -> bool:
    """Whether two values are of the same types and equal throughout."""
    return type(first) is type(second) and _content(first) == _content(second)


def _content(value: Any) -> Any:
    """Return what two values of one type have in common if they are equal, as something to compare."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return str(value.dtype), value.tolist()
    if isinstance(value, (tuple, list)):
        return [(type(each), _content(each)) for each in value]
    if isinstance(value, dict):
        return {key: (type(each), _content(each)) for key, each in value.items()}
    if isinstance(value, io.BytesIO):
        return value.getvalue(), value.tell()
    if isinstance(value, collections.deque):
        return value.maxlen, list(value)
    return value
