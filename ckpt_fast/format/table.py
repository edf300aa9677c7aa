# SPDX-License-Identifier: Apache-2.0
"""The table: what ``.metadata`` says of each payload, in columns that a reader need not unpickle.

It follows the columns of the manifest and has a row for each payload. docs/format.md draws the layout.
"""

from __future__ import annotations

import struct
import zlib
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ckpt_fast.format.columns.items import Items
from ckpt_fast.format.columns.lists import Lists

Numbers = npt.NDArray[np.uint32]

_VERSION = 1
# Version; CRC-32 of the pickle; payloads, names, lists, numbers in them; bytes of dtypes, of names.
_HEAD = struct.Struct("<8I")
_PICKLE_CRC_AT = 4
_LARGEST = 1 << 56
# No kind of tensor has more; to multiply endless lists would take forever.
_MOST_DIMENSIONS = 64

# What a payload is.
NOTHING, RAW, ITEM = 0, 1, 2


class Table(NamedTuple):
    """The table of contents of a checkpoint.

    Attributes:
        names: of tensors and objects.
        dtypes: of the tensors; None for an object. One for each name, as are ``shapes``.
        shapes: index into ``lists`` of the shape of the whole tensor.
        kinds: for each payload: ``RAW``: the elements of one piece of a tensor, inside an item of our layout;
            ``ITEM``: a whole item, of an object or a piece that torch stored; ``NOTHING``: an empty piece
            that is not in the table of contents. One for each payload, as are the following.
        name: index into ``names``.
        offsets, sizes: index into ``lists`` of where the piece begins in the tensor, and of its extents.
        lists: offsets and sizes.
    """

    names: list[str]
    dtypes: list[torch.dtype | None]
    shapes: Numbers
    kinds: npt.NDArray[np.uint8]
    name: Numbers
    offsets: Numbers
    sizes: Numbers
    lists: Lists


def encode_table(items: Items, is_left_out: npt.NDArray[np.bool_]) -> bytes:
    """The table of these items, of no pickle yet; empty if names or shapes cannot be stored.

    Args:
        items: with a payload each.
        is_left_out: for each, whether ``.metadata`` does not mention it.
    """
    rows, lists = items.rows, items.lists
    if any("\0" in name for name in items.names) or lists.lengths.max(initial=0) > _MOST_DIMENSIONS:
        return b""
    are_items = items.are_objects | (rows["offset"] == rows["payload"])
    kinds = np.where(is_left_out, NOTHING, np.where(are_items, ITEM, RAW)).astype(np.uint8)
    first = np.zeros(len(items.names), np.int64)
    first[rows["name"][::-1]] = np.arange(len(rows))[::-1]
    dtypes = "\0".join("" if each is None else str(each).removeprefix("torch.") for each in items.dtypes)
    names = "\0".join(items.names).encode("utf-8", "surrogatepass")
    columns = [rows["dtype"][first], rows["shape"][first], rows["name"], rows["place"], rows["sizes"]]
    counts = (len(rows), len(items.names), len(lists), len(lists.numbers))
    return b"".join(
        [
            _HEAD.pack(_VERSION, 0, *counts, len(dtypes), len(names)),
            *(column.astype("<u4").tobytes() for column in (*columns, lists.lengths)),
            lists.numbers.astype("<i8").tobytes(),
            kinds.tobytes(),
            dtypes.encode(),
            names,
        ]
    )


def bound_to(table: bytes, pickled: bytes) -> bytes:
    """An encoded table as that of this pickle."""
    crc = struct.pack("<I", zlib.crc32(pickled))
    return table[:_PICKLE_CRC_AT] + crc + table[_PICKLE_CRC_AT + 4 :]


def is_bound_to(table: bytes, pickled: bytes) -> bool:
    """Whether an encoded table is that of this pickle: another program may have replaced it."""
    crc = table[_PICKLE_CRC_AT : _PICKLE_CRC_AT + 4]
    return len(table) >= _HEAD.size and crc == struct.pack("<I", zlib.crc32(pickled))


def decode_table(content: bytes) -> Table | None:
    """A table as ``encode_table`` makes it; None if it is of a later version.

    Raises:
        ValueError: it contradicts itself.
        struct.error: it is cut short.
    """
    version, _, rows, name_count, list_count, number_count, dtype_nbytes, name_nbytes = _HEAD.unpack_from(
        content
    )
    if version != _VERSION:
        return None
    counts = (name_count, name_count, rows, rows, rows, list_count, number_count, rows)
    kinds_of_columns = [*["<u4"] * 6, "<i8", "u1"]
    nbytes = [count * np.dtype(kind).itemsize for count, kind in zip(counts, kinds_of_columns, strict=True)]
    begins = list(accumulate([*nbytes, dtype_nbytes, name_nbytes], initial=_HEAD.size))
    if begins[-1] != len(content):
        raise ValueError("its table is cut short")
    dtype, shape, name, offsets, sizes, lengths, numbers, kinds = (
        np.frombuffer(content, kind, count, begin)
        for kind, count, begin in zip(kinds_of_columns, counts, begins, strict=False)
    )
    texts = [content[begin:end] for begin, end in pairwise(begins[-3:])]
    dtypes = [_dtype(text) for text in texts[0].decode().split("\0")]
    names = texts[1].decode("utf-8", "surrogatepass").split("\0") if name_count else []
    for what, column, count in (
        ("name", name, name_count),
        ("dtype", dtype, len(dtypes)),
        *(("list", each, list_count) for each in (shape, offsets, sizes)),
        ("kind", kinds, ITEM + 1),
    ):
        if column.max(initial=0) >= max(count, 1) or (len(column) and not count):
            raise ValueError(f"its table has no {what} {column.max()}")
    if len(names) != name_count or len(set(names)) != name_count:
        raise ValueError(f"its table has {len(set(names))} names instead of {name_count}")
    if lengths.sum() != number_count or numbers.min(initial=0) < 0:
        raise ValueError("its table makes no sense")
    if lengths.max(initial=0) > _MOST_DIMENSIONS:
        raise ValueError(f"its table has a tensor of {lengths.max()} dimensions")
    lists = Lists(lengths.astype(np.int64), numbers)
    if lists.products.max(initial=0) > _LARGEST:
        raise ValueError("its table has a tensor that no memory holds")
    return Table(names, [dtypes[each] for each in dtype], shape, kinds, name, offsets, sizes, lists)


def _dtype(text: str) -> torch.dtype | None:
    if not text:
        return None
    # Looked up without getattr, for which torch imports modules.
    dtype = vars(torch).get(text)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"its table names the dtype {text}, which this version of torch does not have")
    return dtype
