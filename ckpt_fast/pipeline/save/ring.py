# SPDX-License-Identifier: Apache-2.0
"""A ring of host memory: copies go through it while files are written from it.

Copies come in batches: the bytes that belong to one window of the files that are written at the same time.
The ring has a few slabs, each for one batch; a slab is used again when its batch is written. The copies are
made by the thread that saves, so in the order of its GPU streams, and the writing thread asks for them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from queue import Empty, SimpleQueue
from typing import NamedTuple

import torch

from ckpt_fast import native
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.archive import ALIGNMENT, PAGE
from ckpt_fast.pipeline.memory.copies import copy_tensors, nbytes_of, offsets_of, slot_nbytes
from ckpt_fast.pipeline.memory.device_copy import DeviceCopies, StagingPolicy
from ckpt_fast.settings import Settings

# One slab is written while the next one is filled; a batch may reach into the window behind its own.
_SLABS = 4
SLAB_NBYTES = 128 << 20

# The thread that saves changes no tensor while it makes copies: only the writer waits for one.
_IN_NO_ORDER = StagingPolicy("overlapped", lambda tensor: True)
# Signals are handled in between.
_LOOK_AGAIN_S = 0.1


class Source(NamedTuple):
    """A tensor to copy, and the place of its bytes in a file.

    Attributes:
        tensor: plain.
        file: number of the file.
        offset: in the file.
    """

    tensor: torch.Tensor
    file: int
    offset: int


class Part(NamedTuple):
    """Bytes of a source, and their place in the ring.

    Attributes:
        source: number of the source.
        begin: first byte, in the source's own order.
        nbytes: how many.
        offset: in the ring.
        batch: with which they come.
    """

    source: int
    begin: int
    nbytes: int
    offset: int
    batch: int


class Ring:
    """Which bytes are copied when, and to where; holds no tensor. Decided by sizes and places alone.

    Args:
        sources: by file and offset.
        threads: number of files that are written at the same time.
        chunk_nbytes: pieces in which they are written, smaller ones if slabs are too small for them.
        slab_nbytes: of host memory for a batch, roughly; more if a row of a tensor that is not contiguous
            needs more.

    Attributes:
        threads, chunk_nbytes: what whoever writes must use.
        batch_nbytes: int64 [batches].
        nbytes: host memory of all slabs.
        copied_nbytes: host memory that the copies would take without a ring.
    """

    def __init__(
        self, sources: Sequence[Source], threads: int, chunk_nbytes: int, slab_nbytes: int = SLAB_NBYTES
    ) -> None:
        together = min(threads, len({source.file for source in sources}) or 1)
        row = max((_row_nbytes(source.tensor) for source in sources), default=0)
        # The last row of a window may reach into the next one.
        room = slab_nbytes // together - (row + ALIGNMENT if row else 0)
        chunk_nbytes = min(chunk_nbytes, max(room // PAGE, 1) * PAGE)
        window = max(room // chunk_nbytes, -(-row // chunk_nbytes), 1) * chunk_nbytes
        self.threads, self.chunk_nbytes = threads, chunk_nbytes
        batches: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for number, source in enumerate(sources):
            for place, begin, end in _cut(source, window):
                batches.setdefault((source.file // threads, place), []).append((number, begin, end))
        layouts = []
        for _, cut in sorted(batches.items()):
            offsets, nbytes = offsets_of([_part_of(sources[n].tensor, begin, end) for n, begin, end in cut])
            layouts.append((cut, offsets, nbytes))
        self.copied_nbytes = sum(slot_nbytes(source.tensor) for source in sources)
        self._slab_nbytes = max((nbytes for _, _, nbytes in layouts), default=0)
        self.nbytes = self._slab_nbytes * min(_SLABS, len(layouts))
        self._batches: list[list[Part]] = [
            [
                Part(number, begin, end - begin, batch % _SLABS * self._slab_nbytes + offset, batch)
                for (number, begin, end), offset in zip(cut, offsets, strict=True)
            ]
            for batch, (cut, offsets, _) in enumerate(layouts)
        ]
        self.batch_nbytes = array("q", (sum(part.nbytes for part in parts) for parts in self._batches))

    def parts(self) -> Iterator[Part]:
        """The parts of all sources, by batch; so those of each source are in order."""
        return chain.from_iterable(self._batches)

    def copy(
        self,
        tensors: Sequence[torch.Tensor],
        memory: torch.Tensor,
        supply: native.Supply,
        wait: Callable[[int], bool],
    ) -> bool:
        """Copy the tensors, as their writer makes room; returns whether all are copied.

        Args:
            tensors: those of the sources.
            memory: uint8 [nbytes], page-locked if they are on a GPU.
            supply: is told what has arrived.
            wait: returns whether all batches up to one are written, once they are or will not be.
        """
        under_way: deque[DeviceCopies] = deque()
        try:
            for batch, parts in enumerate(self._batches):
                if batch >= _SLABS and not wait(batch - _SLABS):
                    return False
                begin = batch % _SLABS * self._slab_nbytes
                slab = memory[begin : begin + self._slab_nbytes]
                chosen = [_part_of(tensors[p.source], p.begin, p.begin + p.nbytes) for p in parts]
                offsets = [part.offset - begin for part in parts]
                under_way.append(DeviceCopies())
                copy_tensors(chosen, slab, under_way[-1], _IN_NO_ORDER, offsets)
                if len(under_way) > 1:
                    under_way[0].wait()
                    under_way.popleft()
                    supply.arrive(batch)
            for copies in under_way:
                copies.wait()
            supply.arrive(len(self._batches))
            return True
        finally:
            # Nothing may be on its way to memory that is given back.
            for copies in under_way:
                with contextlib.suppress(RuntimeError):
                    copies.wait()


class Feed:
    """Copies of one save, made through a ring by the thread that saves while another one writes.

    Args:
        ring: of these tensors.
        tensors: to copy.
        memory: uint8 [ring.nbytes], page-locked if they are on a GPU.

    Attributes:
        is_closed: whether the thread that saves knows that nothing more is to be made.
        has_left: whether it makes no more copies.
    """

    def __init__(self, ring: Ring, tensors: Sequence[torch.Tensor], memory: torch.Tensor) -> None:
        self.ring = ring
        self._tensors = tensors
        self._memory: torch.Tensor | None = memory
        self._asked: SimpleQueue[native.Supply | None] = SimpleQueue()
        self._copying = threading.Lock()
        self.is_closed = False
        self.has_left = False

    @contextlib.contextmanager
    def asked(self) -> Iterator[native.Supply]:
        """In the writing thread: the copies, from the first one on. Again, too, until ``leave``."""
        supply = native.Supply(self.ring.batch_nbytes)
        self._asked.put(supply)
        if self.has_left:
            supply.end()
        try:
            yield supply
        finally:
            supply.end()

    def close(self) -> None:
        """In the writing thread: nothing more is asked for, and nobody may touch the memory any more."""
        self._asked.put(None)
        with self._copying:
            self._tensors, self._memory = (), None

    def serve(self, late: Callable[[], CheckpointError], timeout_s: float | None = None) -> bool:
        """In the thread that saves: make the copies that the writer asks for, once.

        Args:
            late: makes the error to raise if the writer makes no room in time.
            timeout_s: how long it may take to make room for a batch, or to ask.

        Returns:
            Whether all were made. If not, the writer has closed, or did not ask in time.
        """
        while not self.is_closed:
            try:
                supply = self._asked.get(timeout=timeout_s)
            except Empty:
                return False
            if supply is None:
                self.is_closed = True
                return False
            try:
                with self._copying:
                    if self._memory is not None and self._copy(self._memory, supply, late, timeout_s):
                        return True
            except BaseException:
                supply.end()
                raise
        return False

    def leave(self) -> None:
        """In the thread that saves: the tensors may change from now on, no copy is made again."""
        self.has_left = self.is_closed = True
        with contextlib.suppress(Empty):
            while True:
                supply = self._asked.get_nowait()
                if supply is not None:
                    supply.end()

    def _copy(
        self,
        memory: torch.Tensor,
        supply: native.Supply,
        late: Callable[[], CheckpointError],
        timeout_s: float | None,
    ) -> bool:
        def wait(batch: int) -> bool:
            begin = time.monotonic()
            while not supply.wait_written(batch, _LOOK_AGAIN_S):
                if supply.ended:
                    return False
                if timeout_s is not None and time.monotonic() - begin > timeout_s:
                    raise late()
            return True

        return self.ring.copy(self._tensors, memory, supply, wait)


def ring_for(sources: Sequence[Source], settings: Settings, bound: int | None, snapshot: bool) -> Ring | None:
    """A ring for copies that exceed what may be allocated, or are of a save whose caller waits; else None.

    Args:
        sources: by file and offset.
        settings: of the save.
        bound: bytes of host buffers that may be in use; None: as many as are needed.
        snapshot: the caller goes on when all copies are made: so all are, if there is room.
    """
    total = sum(slot_nbytes(source.tensor) for source in sources)
    if not is_worth_it(total, bound, snapshot):
        return None
    limit = _SLABS * SLAB_NBYTES
    if bound is not None:
        limit = bound if snapshot else min(bound, limit)
    ring = Ring(sources, settings.io_threads, settings.chunk_bytes, limit // _SLABS)
    return ring if ring.nbytes < total else None


def is_worth_it(nbytes: int, bound: int | None, snapshot: bool) -> bool:
    """Whether so many bytes of copies are more than may be taken, or much more than a ring has."""
    return (bound is not None and nbytes > bound) or (not snapshot and nbytes > 2 * _SLABS * SLAB_NBYTES)


def can_be_fed() -> bool:
    """Whether the process starts threads now. While it ends, Python 3.12 and later start none."""
    thread = threading.Thread(target=lambda: None, name="ckpt_fast-try", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return False
    thread.join()
    return True


def _cut(source: Source, window: int) -> Iterator[tuple[int, int, int]]:
    """(window, begin, end) of the parts of a source: by windows, or by the rows that begin in them."""
    nbytes, begin = nbytes_of(source.tensor), 0
    row = _row_nbytes(source.tensor) or 1
    while begin < nbytes:
        place = (source.offset + begin) // window
        rest = (place + 1) * window - source.offset - begin
        end = min(begin + -(-rest // row) * row, nbytes)
        yield place, begin, end
        begin = end


def _row_nbytes(tensor: torch.Tensor) -> int:
    """What a tensor can be cut into: bytes of a row along its first axis, or 0: anywhere between elements."""
    if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        return 0
    return nbytes_of(tensor) // max(tensor.shape[_first_axis(tensor)] if tensor.dim() else 1, 1)


def _first_axis(tensor: torch.Tensor) -> int:
    return next((axis for axis, size in enumerate(tensor.shape) if size > 1), 0)


def _part_of(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    if end - begin == nbytes_of(tensor):
        return tensor
    row = _row_nbytes(tensor)
    if row:
        return tensor.narrow(_first_axis(tensor), begin // row, (end - begin) // row)
    # Items begin at multiples of ALIGNMENT, which is one of every element's size.
    assert begin % ALIGNMENT == 0
    itemsize = tensor.dtype.itemsize
    return tensor.view(-1)[begin // itemsize : end // itemsize]
