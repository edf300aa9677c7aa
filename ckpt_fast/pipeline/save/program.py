# SPDX-License-Identifier: Apache-2.0
"""Save programs: what the structure of a rank's shards decides, computed once and executed at every save.

The structure is everything about shards but their values: names, places, shapes, dtypes, strides, devices.
It decides which bytes go where, in the host buffer and in the files. Addresses, and the bytes of objects, are
filled in when a program is executed, a column at a time.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import itertools
import marshal
import pickle
import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from ckpt_fast import native, settings
from ckpt_fast.format.columns.items import encode_items
from ckpt_fast.format.columns.records import token_of
from ckpt_fast.format.types import BlockDigests, ItemRecord, ObjectShard, Shard, TensorShard
from ckpt_fast.pipeline.memory import strided
from ckpt_fast.pipeline.memory.available import default_bound
from ckpt_fast.pipeline.memory.copies import copy_tensors, needs_copy
from ckpt_fast.pipeline.memory.device_copy import StagingPolicy
from ckpt_fast.pipeline.memory.forms import describe
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.memory.host_buffer import host_buffers
from ckpt_fast.pipeline.save.encode import WriteProgram
from ckpt_fast.pipeline.save.plan import FilePlan, item_records, object_room
from ckpt_fast.pipeline.save.ring import can_be_fed
from ckpt_fast.pipeline.save.sealed import SealedMetadata
from ckpt_fast.pipeline.save.stage import Staged

V = TypeVar("V")


@without_collections
def structure_of(shards: Sequence[Shard], options: tuple[Any, ...]) -> bytes | None:
    """A digest of everything that decides a program; None if these shards have none.

    Args:
        shards: in the order to save them.
        options: what else decides where bytes go.
    """
    described = describe([shard.tensor for shard in shards if isinstance(shard, TensorShard)])
    # Sparse and quantized tensors, and those inside subclasses, are stored by torch itself.
    if bool((described.forms < 0).any()) or any(form.is_quantized for form in described.table):
        return None
    rows = [shard.fqn if isinstance(shard, ObjectShard) else (shard.fqn, *shard[2:]) for shard in shards]
    try:
        return digest_of((options, rows, described.keys()))
    except ValueError:  # sizes that are more than plain integers
        return None


def digest_of(values: Any) -> bytes:
    """A digest of plain values.

    Raises:
        ValueError: they are more than plain values.
    """
    return hashlib.blake2b(marshal.dumps(values, 2), digest_size=16).digest()


class Prepared:
    """Shards of one rank whose program is known.

    Args:
        program: of their structure.
        pointers: int64 [tensors]: addresses of the tensor shards' first elements, in the order of the shards.
        payloads: the bytes of each object shard, in the order of the shards.
        tensors: the tensors themselves. Called only if the program needs them to copy, before staging ends.
        owners: keep the memory behind ``pointers`` alive until it is written, if it is read in place.
    """

    def __init__(
        self,
        program: SaveProgram,
        pointers: torch.Tensor,
        payloads: Sequence[bytes],
        tensors: Callable[[], Sequence[torch.Tensor]],
        owners: Sequence[torch.Tensor] = (),
    ) -> None:
        self.program = program
        self.pointers = pointers
        self.payloads = payloads
        self.tensors = tensors
        self.owners = owners

    def let_go(self) -> None:
        """All bytes are copied: the tensors are not needed any more."""
        self.tensors, self.owners = _no_tensors, ()

    @property
    def nbytes(self) -> int:
        """Bytes of all shards' values."""
        nbytes: int = self.program.tensor_nbytes
        return nbytes + sum(map(len, self.payloads))


def _no_tensors() -> Sequence[torch.Tensor]:
    return ()


@dataclass
class _CopyColumns:
    """Copies of CPU tensors into the host buffer, in the columns of ``native.copy_runs``.

    ``tensor`` says which tensor a row copies from; ``source`` and ``destination`` are relative to its address
    and to that of the buffer.
    """

    tensor: torch.Tensor
    source: torch.Tensor
    destination: torch.Tensor
    nbytes: array[int]
    number: array[int]
    pitch: array[int]


class SaveProgram:
    """The save of one structure by one rank, in one wave. Holds no tensor and no memory of the caller.

    Args:
        structure: as ``structure_of`` gave it.
        shards: the first save's, still alive.
        files, staged, written: its plan, its staged bytes (not yet released) and its write program.
        snapshot: whether all tensors were copied; otherwise most are read where they are.

    Attributes:
        token: the digest of the items; ranks name programs by it.
        tensor_nbytes: bytes of all tensor shards.
        staged_nbytes: host buffer that staging takes.
        objects: which of the ``items`` are objects.
        is_known: whether the coordinator has, in a save that was committed, received ``items``.
        sealed: on the coordinator, the ``.metadata`` of that save.
        ring: what is copied goes through it; None: all is copied at once.

    Raises:
        ValueError: there is something among the shards that only their plan can describe.
    """

    def __init__(
        self,
        structure: bytes,
        shards: Sequence[Shard],
        files: Sequence[FilePlan],
        staged: Staged,
        written: WriteProgram,
        snapshot: bool,
    ) -> None:
        self.structure = structure
        self._snapshot = snapshot
        self.is_known = False
        self.sealed: SealedMetadata | None = None
        self.staged_nbytes = staged.buffer_nbytes
        self._copied_nbytes = staged.copied_nbytes
        records = item_records(files)
        self._items = zlib.compress(pickle.dumps(records, 5), 1)
        place = (written.paths, written.payload_file, written.payload_offset, written.payload_nbytes)
        self.token = token_of(encode_items(records, [BlockDigests(*place, b"")]))
        self.objects = array("q", [number for number, each in enumerate(records) if each.dtype is None])
        self._compile(shards, [item for file in files for item in file.items], staged, written)

    def items(self) -> list[ItemRecord]:
        """What ``.metadata`` needs of each item, in the order of the digests."""
        records: list[ItemRecord] = pickle.loads(zlib.decompress(self._items))
        return records

    def suits(self, snapshot: bool, bound: int | None) -> bool:
        """Whether it is a program for such a save.

        Args:
            snapshot: whether tensors may change while they are written.
            bound: bytes of host buffers that the save may take; None: what is available.
        """
        if self.ring is not None and not can_be_fed():
            return False
        nbytes = self.staged_nbytes if self.ring is None else self.ring.copied_nbytes
        bound = default_bound(nbytes) if bound is None else bound
        if self._snapshot != snapshot or (bound is not None and self.staged_nbytes > bound):
            return False
        # A background save goes through a ring only if it must: training waits for most of it to be written.
        return self.ring is None or not snapshot or (bound is not None and nbytes > bound)

    def holds(self, payloads: Sequence[bytes]) -> bool:
        """Whether objects of these bytes have room."""
        return len(payloads) == len(self._rooms) and all(
            len(payload) <= room for payload, room in zip(payloads, self._rooms, strict=True)
        )

    def stage(self, prepared: Prepared, bound: int | None, policy: StagingPolicy) -> Staged:
        """As ``stage.stage`` of this structure.

        Args:
            prepared: its ``program`` is this.
            bound: bytes of host buffers that may be in use; waits for other saves' buffers if need be.
            policy: whether this waits for copies from GPUs.

        Raises:
            CheckpointError: the host memory cannot be had.
        """
        staged = Staged(owners=list(prepared.owners))
        if not self.staged_nbytes:
            return staged
        if self.ring is not None:
            tensors = prepared.tensors()
            staged.go_through(self.ring, [tensors[number].detach() for number in self._copied], bound)
            return staged
        staged.buffer = buffer = host_buffers.take(self.staged_nbytes, bound)
        try:
            staged.copied_nbytes = self._copied_nbytes
            staged.allocated_nbytes = buffer.nbytes if buffer.is_new else 0
            if self._copies is None:
                tensors = prepared.tensors()
                copied = [tensors[number].detach() for number in self._copied]
                staged.addresses = copy_tensors(copied, buffer.memory, staged.device_copies, policy)
                return staged
            copies = self._copies
            native.copy_runs(
                strided.column(copies.destination + buffer.memory.data_ptr()),
                strided.column(prepared.pointers[copies.tensor] + copies.source),
                copies.nbytes,
                copies.number,
                copies.pitch,
                settings.io_threads(),
            )
        except BaseException:
            staged.release()
            raise
        return staged

    def written(self, prepared: Prepared, staged: Staged) -> WriteProgram:
        """The columns to write for shards that are staged.

        Args:
            prepared: ``holds`` its payloads.
            staged: by ``stage``; complete.
        """
        program = copy.copy(self._written)
        addresses = self._constant_addresses.clone()
        if staged.addresses:
            addresses[self._staged_pieces] = torch.tensor(staged.addresses, dtype=torch.int64)
        elif staged.buffer is not None:
            addresses[self._staged_pieces] = self._staged_offsets + staged.buffer.memory.data_ptr()
        addresses[self._read_pieces] = prepared.pointers[self._read_tensors] + self._read_offsets
        if self._rooms:
            blob = ctypes.create_string_buffer(b"".join(prepared.payloads))
            lengths = torch.tensor([len(payload) for payload in prepared.payloads])
            addresses[self._object_pieces] = ctypes.addressof(blob) + lengths.cumsum(0) - lengths
            program.keep(blob)
            program.piece_nbytes = _replaced(program.piece_nbytes, self._object_pieces, lengths)
            program.payload_nbytes = _replaced(program.payload_nbytes, self._object_items, lengths)
        program.piece_address = strided.column(addresses)
        return program

    @without_collections
    def _compile(
        self, shards: Sequence[Shard], items: Sequence[Any], staged: Staged, written: WriteProgram
    ) -> None:
        tensors = [shard for shard in shards if isinstance(shard, TensorShard)]
        objects = [shard for shard in shards if isinstance(shard, ObjectShard)]
        number = {id(shard): n for n, shard in itertools.chain(enumerate(tensors), enumerate(objects))}
        if any(item.archive is None and isinstance(item.shard, TensorShard) for item in items):
            raise ValueError("a tensor is stored by torch itself")
        self.tensor_nbytes = sum(item.raw_nbytes for item in items)
        self._rooms = [object_room(len(shard.payload)) for shard in objects]
        base = staged.buffer.memory.data_ptr() if staged.buffer is not None else 0
        pieces: dict[str, list[tuple[int, ...]]] = {"staged": [], "read": [], "object": []}
        constants = list(written.piece_address)
        for piece, digest in enumerate(written.piece_digest):
            if digest < 0:
                continue
            item, address, constants[piece] = items[digest], constants[piece], 0
            if isinstance(item.shard, ObjectShard):
                pieces["object"].append((number[id(item.shard)], piece, digest))
            elif base <= address < base + self.staged_nbytes:
                pieces["staged"].append((piece, address - base))
            else:
                start = item.shard.tensor.data_ptr()
                pieces["read"].append((piece, number[id(item.shard)], address - start))
        self._constant_addresses = torch.tensor(constants, dtype=torch.int64)
        self._staged_pieces, self._staged_offsets = _columns(pieces["staged"], 2)
        self._read_pieces, self._read_tensors, self._read_offsets = _columns(pieces["read"], 3)
        _, self._object_pieces, self._object_items = _columns(sorted(pieces["object"]), 3)
        if len(self._object_pieces) != len(objects):
            raise ValueError("an object is empty")
        # The first save's objects and plan are not needed any more.
        self._written = written.without(set(self._object_pieces.tolist()))
        # Through a ring, an item may come in several pieces.
        copied = dict.fromkeys(written.piece_digest[piece] for piece, _ in pieces["staged"])
        self._copied = [number[id(items[digest].shard)] for digest in copied]
        self.ring, self._copies = staged.ring, None
        if self.ring is None:
            slots = [offset for _, offset in pieces["staged"]]
            self._copies = _copy_columns([tensors[n].tensor for n in self._copied], self._copied, slots)


def _copy_columns(
    tensors: Sequence[torch.Tensor], numbers: Sequence[int], slots: Sequence[int]
) -> _CopyColumns | None:
    """None if some are on a GPU, or have runs too short to copy one by one."""
    rows: list[tuple[int, ...]] = []
    for tensor, number, slot in zip(tensors, numbers, slots, strict=True):
        if needs_copy(tensor, snapshot=False):
            return None
        start, at = tensor.data_ptr(), slot
        for series in strided.as_rows(tensor):
            rows.append((number, series.address - start, at, series.nbytes, series.number, series.pitch))
            at += series.nbytes * series.number
    tensor, source, destination, nbytes, count, pitch = _columns(rows, 6)
    return _CopyColumns(
        tensor, source, destination, strided.column(nbytes), strided.column(count), strided.column(pitch)
    )


def _columns(rows: Sequence[tuple[int, ...]], width: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(rows, dtype=torch.int64).view(-1, width).t().contiguous().unbind())


def _replaced(column: array[int], at: torch.Tensor, values: torch.Tensor) -> array[int]:
    changed = torch.frombuffer(bytearray(column.tobytes()), dtype=torch.int64)
    changed[at] = values
    return strided.column(changed)


class StructureCache(Generic[V]):
    """What is known of a caller's latest structures. Thread-safe: threads that write saves use it, too.

    Args:
        size: of how many it is kept; the least recently used one goes.
    """

    def __init__(self, size: int = 1) -> None:
        self._size = size
        self._known: OrderedDict[bytes, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, structure: bytes) -> V | None:
        """What is known of the structure, if that is kept."""
        with self._lock:
            known = self._known.get(structure)
            if known is not None:
                self._known.move_to_end(structure)
            return known

    def keep(self, structure: bytes, known: V) -> None:
        """Keep what is known of a structure, from now on the latest."""
        with self._lock:
            self._known[structure] = known
            self._known.move_to_end(structure)
            while len(self._known) > self._size:
                self._known.popitem(last=False)


class ProgramCache(StructureCache[SaveProgram]):
    """The programs of a caller's latest structures."""


def prepare(program: SaveProgram, shards: Sequence[Shard]) -> Prepared | None:
    """Shards of the program's structure; None if their objects have outgrown it.

    Args:
        program: its structure is that of the shards.
        shards: to save.
    """
    payloads = [shard.payload for shard in shards if isinstance(shard, ObjectShard)]
    if not program.holds(payloads):
        return None
    tensors = [shard.tensor for shard in shards if isinstance(shard, TensorShard)]
    return Prepared(program, describe(tensors).addresses, payloads, lambda: tensors, tensors)
