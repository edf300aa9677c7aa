# SPDX-License-Identifier: Apache-2.0
"""Opcodes of a pickle, written without the objects they make: by hand for a few, in columns for many."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ckpt_fast.format.columns.lists import Ints

Bytes = npt.NDArray[np.uint8]

_U32 = struct.Struct("<I")


class Memo:
    """The parts of a pickle that are referred to again, in the order in which they are memoized.

    Attributes:
        content: the opcodes that make them, one after the other.
    """

    def __init__(self) -> None:
        self.content = bytearray()
        self.count = 0
        self._texts: dict[str, int] = {}

    def add(self, opcodes: bytes) -> bytes:
        """A part that these opcodes make; what gets it again."""
        self.content += opcodes + pickle.MEMOIZE
        self.count += 1
        return got(self.count - 1)

    def text(self, value: str) -> bytes:
        """What gets a text, which is a part from now on."""
        number = self._texts.get(value)
        if number is None:
            number = self._texts[value] = self.count
            self.add(text(value))
        return got(number)

    def name(self, module: str, name: str) -> bytes:
        """What gets a class or function."""
        return self.add(self.text(module) + self.text(name) + pickle.STACK_GLOBAL)

    def texts(self, values: list[str]) -> Ints:
        """The numbers of many texts; a column of them is for ``references``."""
        known, numbers, parts = self._texts, np.empty(len(values), np.int64), []
        for at, value in enumerate(values):
            number = known.get(value)
            if number is None:
                number = known[value] = self.count
                parts.append(text(value))
                self.count += 1
            numbers[at] = number
        self.content += b"".join([part + pickle.MEMOIZE for part in parts])
        return numbers

    def rows(self, rows: Bytes) -> int:
        """Parts, one for each row of opcodes; the number of the first."""
        first = self.count
        self.content += joined(rows, constant(pickle.MEMOIZE, len(rows))).tobytes()
        self.count += len(rows)
        return first


def got(number: int) -> bytes:
    """Get a part of this number."""
    return b"h" + bytes([number]) if number < 256 else b"j" + _U32.pack(number)


def text(value: str) -> bytes:
    """A text, not yet memoized."""
    encoded = value.encode("utf-8", "surrogatepass")
    if len(encoded) < 256:
        return b"\x8c" + bytes([len(encoded)]) + encoded
    return b"X" + _U32.pack(len(encoded)) + encoded


def integer(value: int) -> bytes:
    """A whole number of any length."""
    return pickle.dumps(value, 2)[2:-1]


def constant(opcodes: bytes, count: int) -> Bytes:
    """uint8 [count, opcodes]: the same in each row."""
    return np.broadcast_to(np.frombuffer(opcodes, np.uint8), (count, len(opcodes)))


def references(numbers: Ints) -> Bytes:
    """uint8 [rows, 5]: what gets a part, for each row."""
    return joined(constant(b"j", len(numbers)), _as_bytes(numbers, "<u4"))


def integers(values: Ints) -> Bytes:
    """uint8 [rows, width]: a whole number for each row, as short as the largest allows."""
    if values.min(initial=0) < 0:
        return long_integers(values)
    largest = values.max(initial=0)
    for limit, opcode, kind in ((1 << 8, b"K", "<u1"), (1 << 16, b"M", "<u2"), (1 << 31, b"J", "<u4")):
        if largest < limit:
            return joined(constant(opcode, len(values)), _as_bytes(values, kind))
    return long_integers(values)


def long_integers(values: Ints) -> Bytes:
    """uint8 [rows, 10]: a whole number for each row, in the last 8 bytes: any other can take its place."""
    return joined(constant(b"\x8a\x08", len(values)), _as_bytes(values, "<i8"))


def joined(*columns: Bytes) -> Bytes:
    """Rows of opcodes, the columns behind one another."""
    return np.concatenate(columns, axis=1)


def _as_bytes(values: Ints, kind: str) -> Bytes:
    return values.astype(kind).view(np.uint8).reshape(len(values), np.dtype(kind).itemsize)


def scattered(total: int, parts: list[tuple[Ints, Bytes]]) -> Bytes:
    """uint8 [total]: rows of opcodes that have different lengths, each at its place.

    Args:
        total: their lengths together.
        parts: where rows of one length begin, and the rows.
    """
    content = np.empty(total, np.uint8)
    for begin, rows in parts:
        content[begin[:, None] + np.arange(rows.shape[1])] = rows
    return content


def mapping(memo: Memo, values: Mapping[str, tuple[str | int, ...]]) -> bytes:
    """A dict of texts to tuples of texts and whole numbers."""
    keys = memo.texts(list(values)).tolist()
    content = []
    for key, value in zip(keys, values.values(), strict=True):
        steps = [memo.text(step) if isinstance(step, str) else integer(step) for step in value]
        content.append(b"".join([got(key), pickle.MARK, *steps, pickle.TUPLE]))
        content.append(pickle.SETITEM)
    return pickle.EMPTY_DICT + b"".join(content)
