# SPDX-License-Identifier: Apache-2.0
"""Mutations of files: blind ones, and ones that know what the fields of a file mean."""

from __future__ import annotations

import pickletools
import random
import re
import struct
from collections.abc import Callable

# What a mutation gets beside the content: other files of the checkpoint, and the same file of another save.
Content = bytes
Others = list[bytes]
Mutation = Callable[[random.Random, Content, Others], Content]

_ZIP_RECORDS = re.compile(rb"PK(?:\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07|\x07\x08)")
_ZIP_RECORD_NBYTES = 64
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 40)
_LARGEST = ((1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_LONGEST_RANGE = 4096


def flip_a_bit(chosen: random.Random, content: Content, others: Others) -> Content:
    return _replaced(
        content, at := chosen.randrange(len(content)), bytes([content[at] ^ 1 << chosen.randrange(8)])
    )


def flip_bits(chosen: random.Random, content: Content, others: Others) -> Content:
    for _ in range(chosen.randint(2, 16)):
        content = flip_a_bit(chosen, content, others)
    return content


def set_a_byte(chosen: random.Random, content: Content, others: Others) -> Content:
    return _replaced(
        content, chosen.randrange(len(content)), bytes([chosen.choice((0, 255, chosen.randrange(256)))])
    )


def overwrite(chosen: random.Random, content: Content, others: Others) -> Content:
    begin, end = _range(chosen, content)
    filling = chosen.choice((bytes(end - begin), b"\xff" * (end - begin), chosen.randbytes(end - begin)))
    return _replaced(content, begin, filling)


def cut(chosen: random.Random, content: Content, others: Others) -> Content:
    return content[: chosen.choice((0, 1, len(content) - 1, chosen.randrange(len(content))))]


def extend(chosen: random.Random, content: Content, others: Others) -> Content:
    return content + chosen.choice((b"\0", chosen.randbytes(chosen.randint(1, 5000)), content))


def leave_out(chosen: random.Random, content: Content, others: Others) -> Content:
    begin, end = _range(chosen, content)
    return content[:begin] + content[end:]


def repeat(chosen: random.Random, content: Content, others: Others) -> Content:
    begin, end = _range(chosen, content)
    return content[:end] + content[begin:]


def exchange_ranges(chosen: random.Random, content: Content, others: Others) -> Content:
    """Of one length, as two sectors that were written to each other's place."""
    begin, end = _range(chosen, content)
    other = chosen.randrange(len(content) - (end - begin) + 1)
    first, second = content[begin:end], content[other : other + end - begin]
    return _replaced(_replaced(content, begin, second), other, first)


def stale_range(chosen: random.Random, content: Content, others: Others) -> Content:
    """Bytes of another file, at their own place: a write that was lost."""
    other = chosen.choice(others)
    begin, end = _range(chosen, content)
    return _replaced(content, begin, other[begin:end])


def other_file(chosen: random.Random, content: Content, others: Others) -> Content:
    return chosen.choice(others)


def extreme_number(chosen: random.Random, content: Content, others: Others) -> Content:
    """Anywhere, in either order of bytes: lengths, counts and offsets."""
    size, code = chosen.choice(((2, "H"), (4, "I"), (8, "Q")))
    number = chosen.choice((*_EXTREMES, *_LARGEST, len(content))) & ((1 << 8 * size) - 1)
    begin = chosen.randrange(max(len(content) - size, 1))
    return _replaced(content, begin, struct.pack(chosen.choice("<>") + code, number))[
        : max(len(content), begin + size)
    ]


def near_number(chosen: random.Random, content: Content, others: Others) -> Content:
    """A number that is a little larger or smaller than it was."""
    size, code = chosen.choice(((4, "<I"), (8, "<Q")))
    if len(content) < size:
        return content + b"\0"
    begin = chosen.randrange(len(content) - size + 1)
    (number,) = struct.unpack_from(code, content, begin)
    changed = (number + chosen.choice((-8, -4, -1, 1, 4, 8))) % (1 << 8 * size)
    return _replaced(content, begin, struct.pack(code, changed))


def archive_record(chosen: random.Random, content: Content, others: Others) -> Content:
    """A byte of a record of a ZIP archive: names, lengths, offsets, checksums, flags."""
    records = [found.start() for found in _ZIP_RECORDS.finditer(content)]
    if not records:
        return flip_a_bit(chosen, content, others)
    at = chosen.choice(records) + chosen.randrange(_ZIP_RECORD_NBYTES)
    return _replaced(content, min(at, len(content) - 1), bytes([chosen.randrange(256)]))


def pickle_operation(chosen: random.Random, content: Content, others: Others) -> Content:
    """An operation of a pickle left out, repeated, replaced by another or with another argument."""
    places = _operations(content)
    if len(places) < 3:
        return set_a_byte(chosen, content, others)
    number = chosen.randrange(len(places) - 1)
    begin, end = places[number], places[number + 1]
    operation = content[begin:end]
    other = chosen.randrange(len(places) - 1)
    change = chosen.choice(("left out", "repeated", "replaced", "argument", "code"))
    if change == "left out":
        operation = b""
    elif change == "repeated":
        operation *= chosen.randint(2, 50)
    elif change == "replaced":
        operation = content[places[other] : places[other + 1]]
    elif change == "argument" and len(operation) > 1:
        operation = _replaced(operation, chosen.randrange(1, len(operation)), bytes([chosen.randrange(256)]))
    else:
        operation = bytes([ord(chosen.choice(pickletools.opcodes).code)]) + operation[1:]
    return content[:begin] + operation + content[end:]


MUTATIONS: tuple[Mutation, ...] = (
    flip_a_bit,
    flip_bits,
    set_a_byte,
    overwrite,
    cut,
    extend,
    leave_out,
    repeat,
    exchange_ranges,
    stale_range,
    other_file,
    extreme_number,
    near_number,
    archive_record,
    pickle_operation,
)


def _replaced(content: bytes, at: int, part: bytes) -> bytes:
    """The content with other bytes at a place; longer if they reach beyond its end."""
    return content[:at] + part + content[at + len(part) :]


def _range(chosen: random.Random, content: bytes) -> tuple[int, int]:
    begin = chosen.randrange(len(content))
    return begin, chosen.randint(begin + 1, min(begin + _LONGEST_RANGE, len(content)))


def _operations(content: bytes) -> list[int]:
    """Where the operations of the pickle at the beginning of a file are."""
    places = []
    try:
        for _, _, position in pickletools.genops(content):
            assert position is not None
            places.append(position)
    except Exception:  # what follows is no pickle
        pass
    return places
