# SPDX-License-Identifier: Apache-2.0
"""The pickle in ``.metadata``, written from columns, without the torch DCP objects that it makes.

Everything that occurs more than once (names, paths, shapes, pieces) stands at the beginning, in a tuple that
is the value of ``version`` until the real one replaces it. All that follows refers to it, and so has rows of
opcodes of the same few lengths, which NumPy fills in a column at a time.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from ckpt_fast.format.columns.complete import Kept
from ckpt_fast.format.columns.items import Items
from ckpt_fast.format.columns.lists import Ints
from ckpt_fast.format.columns.opcodes import (
    Bytes,
    Memo,
    constant,
    integer,
    integers,
    joined,
    long_integers,
    mapping,
    references,
    scattered,
    text,
)
from ckpt_fast.format.names import LAYOUT, LAYOUT_ATTRIBUTE

_METADATA = "torch.distributed.checkpoint.metadata"
_NEW = pickle.EMPTY_TUPLE + pickle.NEWOBJ
_WITH_STATE = _NEW + pickle.EMPTY_DICT + pickle.MARK
_STATE_ENDS = pickle.SETITEMS + pickle.BUILD


class PickledMetadata(NamedTuple):
    """A pickle, and where in it the lengths of objects stand, in the order of their rows: 8 bytes each."""

    pickled: bytes
    object_nbytes_at: Ints


def write_metadata(
    items: Items, kept: Kept, planner_data: Mapping[str, tuple[str | int, ...]] | None, version: str | None
) -> PickledMetadata:
    """The pickle of torch DCP's ``Metadata`` for these items.

    Args:
        items: of all ranks.
        kept: those that it is to mention.
        planner_data: of torch DCP; None for Megatron-Core.
        version: torch DCP's of its format, if the installed one has one.
    """
    writer = _Writer(items, kept)
    entries, (storage, at) = writer.entries(), writer.storage()
    planner = pickle.NONE if planner_data is None else mapping(writer.memo, planner_data)
    parts = [
        pickle.EMPTY_DICT,
        text("version"),
        pickle.MARK,
        bytes(writer.memo.content),
        pickle.TUPLE + pickle.SETITEM,
        text("state_dict_metadata") + pickle.EMPTY_DICT,
        entries,
        pickle.SETITEM + text("planner_data"),
        planner,
        pickle.SETITEM + text("storage_data") + pickle.EMPTY_DICT,
        storage,
        pickle.SETITEM + text("storage_meta") + pickle.NONE + pickle.SETITEM,
        text("version") + (pickle.NONE if version is None else text(version)) + pickle.SETITEM,
        # As it is in every version of ours: readers know it by these bytes.
        text(LAYOUT_ATTRIBUTE) + pickle.MEMOIZE + pickle.EMPTY_DICT,
        *(text(key) + integer(value) + pickle.SETITEM for key, value in LAYOUT.items()),
        pickle.SETITEM + pickle.BUILD + pickle.STOP,
    ]
    metadata = text(_METADATA) + text("Metadata") + pickle.STACK_GLOBAL + _NEW
    body = metadata + b"".join(parts)
    head = pickle.PROTO + b"\x04" + pickle.FRAME + len(body).to_bytes(8, "little")
    before = len(head) + len(metadata) + sum(map(len, parts[: parts.index(storage)]))
    return PickledMetadata(head + body, at + before)


class _Writer:
    """Attributes: memo: what is referred to."""

    def __init__(self, items: Items, kept: Kept) -> None:
        self.memo = memo = Memo()
        self._items, self._kept = items, kept
        rows = items.rows
        is_object = items.are_objects[kept.rows]
        # By name, as the pieces of a tensor stand in its entry.
        self._tensors, self._objects = kept.rows[~is_object], kept.rows[is_object]
        self._classes = {
            name: memo.name(_METADATA, name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "TensorProperties",
                "TensorStorageMetadata",
            )
        }
        self._info = memo.name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
        self._properties = np.array([0, *map(self._add_properties, items.dtypes[1:])], np.int64)
        self._names = memo.texts(items.names)
        self._paths = memo.texts(items.paths)
        self._sizes = self._add_sizes()
        pairs = (
            rows["place"][self._tensors].astype(np.int64) * len(items.lists) + rows["sizes"][self._tensors]
        )
        each, same = np.unique(pairs, return_inverse=True)
        self._chunks = self._add_chunks(each)[same.reshape(-1)]

    def _add_properties(self, dtype: torch.dtype | None) -> int:
        """Five fields: torch up to 2.14 reads exactly these, later versions accept them."""
        memo = self.memo
        layout = (
            memo.name("torch.serialization", "_get_layout")
            + memo.text("torch.strided")
            + pickle.TUPLE1
            + pickle.REDUCE
        )
        memory_format = (
            memo.name(_METADATA, "_MEM_FORMAT_ENCODING")
            + pickle.BININT1
            + b"\0"
            + pickle.TUPLE1
            + pickle.REDUCE
        )
        state = (
            pickle.MARK
            + memo.name("torch", str(dtype).removeprefix("torch."))
            + layout
            + pickle.NEWFALSE
            + memory_format
            + pickle.NEWFALSE
            + pickle.TUPLE
        )
        memo.add(self._classes["TensorProperties"] + _NEW + state + pickle.BUILD)
        return memo.count - 1

    def _add_sizes(self) -> Ints:
        """The parts of all lists, each a ``torch.Size``."""
        numbers = np.zeros(len(self._items.lists), np.int64)
        size = self.memo.name("torch", "Size")
        for length, which, matrix in self._items.lists.by_length():
            columns = [integers(matrix[:, dimension]) for dimension in range(length)]
            rows = joined(
                constant(size + pickle.MARK, len(which)),
                *columns,
                constant(pickle.TUPLE + pickle.TUPLE1 + pickle.REDUCE, len(which)),
            )
            numbers[which] = self.memo.rows(rows) + np.arange(len(which))
        return numbers

    def _add_chunks(self, pairs: Ints) -> Ints:
        """The parts of pieces, each given by two lists."""
        count = len(self._items.lists) or 1
        rows = joined(
            constant(
                self._classes["ChunkStorageMetadata"] + _WITH_STATE + self.memo.text("offsets"), len(pairs)
            ),
            references(self._sizes[pairs // count]),
            constant(self.memo.text("sizes"), len(pairs)),
            references(self._sizes[pairs % count]),
            constant(_STATE_ENDS, len(pairs)),
        )
        return self.memo.rows(rows) + np.arange(len(pairs))

    def entries(self) -> bytes:
        """What sets ``state_dict_metadata``: for each name a tensor in pieces, or an object."""
        items, kept, memo, classes = self._items, self._kept, self.memo, self._classes
        rows, numbers = items.rows, np.arange(len(items.names))
        is_tensor = rows["dtype"][kept.first] != 0
        tensors, objects = numbers[is_tensor], numbers[~is_tensor]
        first = kept.first[tensors]
        heads = joined(
            references(self._names[tensors]),
            constant(classes["TensorStorageMetadata"] + _WITH_STATE + memo.text("properties"), len(tensors)),
            references(self._properties[rows["dtype"][first]]),
            constant(memo.text("size"), len(tensors)),
            references(self._sizes[rows["shape"][first]]),
            constant(memo.text("chunks") + pickle.EMPTY_LIST + pickle.MARK, len(tensors)),
        )
        tails = constant(pickle.APPENDS + _STATE_ENDS + pickle.SETITEM, len(tensors))
        others = joined(
            references(self._names[objects]),
            constant(classes["BytesStorageMetadata"] + _NEW + pickle.SETITEM, len(objects)),
        )
        chunks = references(self._chunks)
        counts = (kept.begin[1:] - kept.begin[:-1])[tensors]
        nbytes = np.full(len(numbers), others.shape[1])
        nbytes[tensors] = heads.shape[1] + counts * chunks.shape[1] + tails.shape[1]
        begin = np.cumsum(nbytes) - nbytes
        own = begin[tensors] + heads.shape[1]
        in_entry = np.arange(len(chunks)) - np.repeat(np.cumsum(counts) - counts, counts)
        parts = [
            (begin[tensors], heads),
            (np.repeat(own, counts) + in_entry * chunks.shape[1], chunks),
            (own + counts * chunks.shape[1], tails),
            (begin[objects], others),
        ]
        return scattered(int(nbytes.sum()), parts).tobytes()

    def storage(self) -> tuple[bytes, Ints]:
        """What sets ``storage_data``, objects first; and where in it their lengths stand."""
        rows, memo = self._items.rows, self.memo
        objects, tensors = np.sort(self._objects), self._tensors
        fqn, index = memo.text("fqn"), memo.text("index")
        key = self._classes["MetadataIndex"] + _WITH_STATE + fqn
        of_objects = joined(
            constant(key, len(objects)),
            references(self._names[rows["name"][objects]]),
            constant(index + pickle.NONE + _STATE_ENDS, len(objects)),
            self._extents(objects, long_integers(rows["nbytes"][objects])),
        )
        name = rows["name"][tensors]
        is_first = np.concatenate([[True], name[1:] != name[:-1]])[: len(name)]
        starts = np.flatnonzero(is_first)
        in_entry = np.arange(len(name)) - starts[np.cumsum(is_first) - 1]
        of_tensors = joined(
            constant(key, len(tensors)),
            references(self._names[name]),
            constant(index, len(tensors)),
            integers(in_entry),
            constant(memo.text("offset"), len(tensors)),
            references(self._sizes[rows["place"][tensors]]),
            constant(_STATE_ENDS, len(tensors)),
            self._extents(tensors, integers(rows["nbytes"][tensors])),
        )
        width = of_objects.shape[1]
        at = np.arange(1, len(objects) + 1) * width - len(_STATE_ENDS + pickle.SETITEM) - 8
        return of_objects.tobytes() + of_tensors.tobytes(), at

    def _extents(self, which: Ints, nbytes: Bytes) -> Bytes:
        """The values of ``storage_data``, and what sets them."""
        rows, memo, count = self._items.rows, self.memo, len(which)
        return joined(
            constant(self._info + _WITH_STATE + memo.text("relative_path"), count),
            references(self._paths[rows["file"][which]]),
            constant(memo.text("offset"), count),
            integers(rows["offset"][which]),
            constant(memo.text("length"), count),
            nbytes,
            constant(_STATE_ENDS + pickle.SETITEM, count),
        )


def set_object_nbytes(pickled: bytes, at: Ints, nbytes: Ints) -> bytes:
    """The pickle with objects of other lengths.

    Args:
        pickled: as ``write_metadata`` made it.
        at: where it says the lengths stand.
        nbytes: of all objects, in the order of their rows.
    """
    if not len(at):
        return pickled
    content = np.frombuffer(bytearray(pickled), np.uint8)
    content[at[:, None] + np.arange(8)] = nbytes.astype("<i8").view(np.uint8).reshape(-1, 8)
    return content.tobytes()
