# SPDX-License-Identifier: Apache-2.0
"""The items of one rank, or of all, in columns: what ``.metadata`` says of them, in one row for each.

A rank encodes its own. The coordinator joins the bytes of all ranks; nothing is made for a single item.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ckpt_fast.format.columns.lists import Ints, Lists
from ckpt_fast.format.types import BlockDigests, ItemRecord

# Bytes of the texts; number of lists, of numbers in them, of rows; bytes of the paths.
_HEAD = struct.Struct("<5I")
_COUNT = struct.Struct("<I")

ROW = np.dtype(
    [
        ("name", "<u4"),  # index into the names
        ("dtype", "<u4"),  # index into the dtypes; 0 for an object
        ("shape", "<u4"),  # index into the lists: of the whole tensor,
        ("place", "<u4"),  # where the piece begins in it,
        ("sizes", "<u4"),  # and its extents
        ("file", "<u4"),  # index into the paths
        ("offset", "<i8"),  # of the item in its file
        ("nbytes", "<i8"),  # its length
        ("payload", "<i8"),  # where its checksums begin in the file,
        ("payload_nbytes", "<i8"),  # and of how many bytes they are
    ]
)


class Items(NamedTuple):
    """Items in columns, those of the first rank before those of the second.

    Attributes:
        names: of the tensors and objects, in the order in which they first occur.
        dtypes: of the tensors; the first is None and means an object.
        paths: of the data files.
        lists: shapes, places and extents, none of them twice.
        rows: [items] of ``ROW``.
    """

    names: list[str]
    dtypes: list[torch.dtype | None]
    paths: list[str]
    lists: Lists
    rows: npt.NDArray[np.void]

    @property
    def are_objects(self) -> npt.NDArray[np.bool_]:
        """For each row, whether it is an object."""
        are_objects: npt.NDArray[np.bool_] = self.rows["dtype"] == 0
        return are_objects

    def with_object_nbytes(self, nbytes: Ints) -> Items:
        """The same with objects of these lengths, in the order of the rows."""
        rows = self.rows.copy()
        objects = np.flatnonzero(self.are_objects)
        rows["nbytes"][objects] = rows["payload_nbytes"][objects] = nbytes
        return self._replace(rows=rows)


def encode_items(records: Sequence[ItemRecord], digests: Sequence[BlockDigests]) -> bytes:
    """A rank's items in the columns that ``join_items`` reads. The lengths of objects are left out.

    Args:
        records: in the order of the digests.
        digests: their checksums; none, if they have none.
    """
    names: dict[str, int] = {}
    dtypes: dict[torch.dtype | None, int] = {None: 0}
    paths: dict[str, int] = {}
    lists: dict[tuple[int, ...], int] = {}
    columns: list[tuple[int, ...]] = []
    for fqn, (path, offset, nbytes), dtype, place, sizes, shape in records:
        columns.append(
            (
                names.setdefault(fqn, len(names)),
                dtypes.setdefault(dtype, len(dtypes)),
                lists.setdefault(shape, len(lists)),
                lists.setdefault(place, len(lists)),
                lists.setdefault(sizes, len(lists)),
                paths.setdefault(path, len(paths)),
                offset,
                nbytes if dtype is not None else 0,
                0,
                0,
            )
        )
    rows = np.array(columns, dtype=ROW)
    if digests:
        rows["payload"] = np.concatenate([each.offset for each in digests])
        rows["payload_nbytes"] = np.concatenate([each.nbytes for each in digests])
        rows["payload_nbytes"][rows["dtype"] == 0] = 0
    texts = _encode_texts([_text(dtype) for dtype in dtypes], list(names))
    path_text = "\0".join(paths).encode("utf-8", "surrogatepass")
    numbers = array("q", [number for each in lists for number in each])
    return b"".join(
        [
            _HEAD.pack(len(texts), len(lists), len(numbers), len(rows), len(path_text)),
            texts,
            bytes(map(len, lists)),
            numbers.tobytes(),
            rows.tobytes(),
            path_text,
        ]
    )


def row_count(encoded: bytes) -> int:
    """How many items a rank has encoded."""
    count: int = _HEAD.unpack_from(encoded)[3]
    return count


def join_items(encoded: Sequence[bytes]) -> Items:
    """The items of all ranks.

    Most ranks have the same names. Those are read once: the rest of a rank costs a few slices.

    Args:
        encoded: of each rank in rank order.
    """
    texts = _Texts()
    lengths, numbers, rows, counts = [], [], [], []
    name_base, dtype_base, list_base, path_base = [], [], [], []
    paths: list[str] = []
    list_count = 0
    for content in encoded:
        text_nbytes, lists, number_count, row_count, path_nbytes = _HEAD.unpack_from(content)
        view = memoryview(content)
        ends = list(
            accumulate(
                (text_nbytes, lists, 8 * number_count, ROW.itemsize * row_count, path_nbytes),
                initial=_HEAD.size,
            )
        )
        names_at, dtypes_at = texts.add(content[ends[0] : ends[1]])
        lengths.append(view[ends[1] : ends[2]])
        numbers.append(view[ends[2] : ends[3]])
        rows.append(view[ends[3] : ends[4]])
        counts.append(row_count)
        name_base.append(names_at)
        dtype_base.append(dtypes_at)
        list_base.append(list_count)
        path_base.append(len(paths))
        list_count += lists
        if row_count:
            paths += str(view[ends[4] : ends[5]], "utf-8", "surrogatepass").split("\0")
    all_lists = Lists(
        np.frombuffer(b"".join(lengths), np.uint8).astype(np.int64),
        np.frombuffer(b"".join(numbers), np.int64),
    )
    unique, same = all_lists.unique()
    known_paths: dict[str, int] = {}
    path_number = np.array([known_paths.setdefault(path, len(known_paths)) for path in paths], np.int64)
    joined = np.frombuffer(bytearray().join(rows), ROW)
    for field, bases, number in (
        ("name", name_base, texts.name_numbers()),
        ("dtype", dtype_base, texts.dtype_numbers()),
        ("shape", list_base, same),
        ("place", list_base, same),
        ("sizes", list_base, same),
        ("file", path_base, path_number),
    ):
        joined[field] = number[joined[field] + np.repeat(np.array(bases, np.int64), counts)]
    return Items(list(texts.names), list(texts.dtypes), list(known_paths), unique, joined)


class _Texts:
    """The names and dtypes of all ranks, each once, and what number each of a rank's has among them."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.dtypes: dict[torch.dtype | None, int] = {None: 0}
        self._known: dict[bytes, tuple[int, int]] = {}
        self._names, self._dtypes = array("q"), array("q")

    def add(self, encoded: bytes) -> tuple[int, int]:
        """Where the numbers of a rank's names begin in ``name_numbers``, and of its dtypes likewise."""
        known = self._known.get(encoded)
        if known is None:
            known = self._known[encoded] = (len(self._names), len(self._dtypes))
            dtypes, names = _decode_texts(encoded)
            self._names.extend([self.names.setdefault(name, len(self.names)) for name in names])
            for text in dtypes:
                dtype = getattr(torch, text) if text else None
                self._dtypes.append(self.dtypes.setdefault(dtype, len(self.dtypes)))
        return known

    def name_numbers(self) -> Ints:
        return np.array(self._names, np.int64)

    def dtype_numbers(self) -> Ints:
        return np.array(self._dtypes, np.int64)


def _text(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _encode_texts(dtypes: list[str], names: list[str]) -> bytes:
    """Compressed: names are most of what a rank sends, and much alike."""
    texts = [text.encode("utf-8", "surrogatepass") for text in (*dtypes, *names)]
    lengths = array("I", map(len, texts)).tobytes()
    return zlib.compress(b"".join([_COUNT.pack(len(dtypes)), _COUNT.pack(len(texts)), lengths, *texts]), 1)


def _decode_texts(encoded: bytes) -> tuple[list[str], list[str]]:
    content = zlib.decompress(encoded)
    dtype_count, count = (_COUNT.unpack_from(content, 4 * i)[0] for i in range(2))
    lengths = array("I")
    at = 8 + count * lengths.itemsize
    lengths.frombytes(content[8:at])
    ends = list(accumulate(lengths, initial=at))
    texts = [content[begin:end].decode("utf-8", "surrogatepass") for begin, end in pairwise(ends)]
    return texts[:dtype_count], texts[dtype_count:]


def items_of(records: Iterable[ItemRecord]) -> Items:
    """Items without checksums, from any number of ranks."""
    known = list(records)
    nbytes = [record.extent.nbytes for record in known if record.dtype is None]
    return join_items([encode_items(known, ())]).with_object_nbytes(np.array(nbytes, np.int64))
