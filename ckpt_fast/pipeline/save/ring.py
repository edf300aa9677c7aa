# SPDX-License-Identifier: Apache-2.0
"""A ring of host memory: copies go through it while files are written from it.

A synchronous save copies tensors on a GPU, and others that it cannot read in place, while its caller waits.
So the copies need not all be there at once. They come in batches: the bytes that belong to one window of the
files that are written at the same time. The ring has a few slabs, each for one batch; a slab is used again
when its batch is written.
"""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from ckpt_fast import native
from ckpt_fast.format.archive import ALIGNMENT
from ckpt_fast.pipeline.memory import gpu
from ckpt_fast.pipeline.memory.copies import copy_tensors, offsets_of, slot_nbytes
from ckpt_fast.pipeline.memory.device_copy import DeviceCopies, StagingPolicy
from ckpt_fast.ranks.devices import on_this_gpu
from ckpt_fast.settings import Settings

# One slab is written while the next one is filled; a batch may reach into the window behind its own.
_SLABS = 4
SLAB_NBYTES = 128 << 20

# The tensors do not change before all is written: nobody needs to wait for a copy but the writer.
_IN_NO_ORDER = StagingPolicy("overlapped", lambda tensor: True)


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
        chunk_nbytes: pieces in which they are written.
        slab_nbytes: of host memory for a batch, roughly; more if ``threads`` chunks need more.

    Attributes:
        threads, chunk_nbytes: as given; whoever writes must use them.
        batch_nbytes: int64 [batches].
        nbytes: host memory of all slabs.

    Raises:
        ValueError: a tensor that can only be copied whole is too large for a window.
    """

    def __init__(
        self, sources: Sequence[Source], threads: int, chunk_nbytes: int, slab_nbytes: int = SLAB_NBYTES
    ) -> None:
        self.threads, self.chunk_nbytes = threads, chunk_nbytes
        together = min(threads, len({source.file for source in sources}) or 1)
        window = max(slab_nbytes // together // chunk_nbytes, 1) * chunk_nbytes
        batches: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for number, source in enumerate(sources):
            for place, begin, end in _cut(source, window):
                batches.setdefault((source.file // threads, place), []).append((number, begin, end))
        layouts = []
        for _, cut in sorted(batches.items()):
            offsets, nbytes = offsets_of([_part_of(sources[n].tensor, begin, end) for n, begin, end in cut])
            layouts.append((cut, offsets, nbytes))
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

    @contextlib.contextmanager
    def fed(
        self, tensors: Sequence[torch.Tensor], memory: torch.Tensor, ready: Sequence[tuple[gpu.Gpu, object]]
    ) -> Iterator[native.Supply]:
        """Within it, a thread copies the tensors, as their writer makes room.

        Args:
            tensors: those of the sources.
            memory: uint8 [nbytes], page-locked if they are on a GPU.
            ready: for each GPU, the event behind which their values are what is to be saved.

        Yields:
            What the writer is to be given. If a copy fails, that is raised when the writer has ended.
        """
        supply = native.Supply(self.batch_nbytes)
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self._feed(tensors, memory, ready, supply)
            except BaseException as error:
                errors.append(error)
                supply.end()

        thread = threading.Thread(target=on_this_gpu(run), name="ckpt_fast-stage", daemon=True)
        thread.start()
        try:
            yield supply
        finally:
            supply.end()
            thread.join()
            if errors:
                raise errors[0]

    def _feed(
        self,
        tensors: Sequence[torch.Tensor],
        memory: torch.Tensor,
        ready: Sequence[tuple[gpu.Gpu, object]],
        supply: native.Supply,
    ) -> None:
        for device, event in ready:
            device.order_behind(device.current, event)
        under_way: deque[DeviceCopies] = deque()
        try:
            for batch, parts in enumerate(self._batches):
                if batch >= _SLABS and not supply.wait_written(batch - _SLABS):
                    return
                begin = batch % _SLABS * self._slab_nbytes
                slab = memory[begin : begin + self._slab_nbytes]
                chosen = [_part_of(tensors[p.source], p.begin, p.begin + p.nbytes) for p in parts]
                under_way.append(DeviceCopies())
                offsets = [part.offset - begin for part in parts]
                copy_tensors(chosen, slab, under_way[-1], _IN_NO_ORDER, offsets)
                if len(under_way) > 1:
                    under_way[0].wait()
                    under_way.popleft()
                    supply.arrive(batch)
            for copies in under_way:
                copies.wait()
            supply.arrive(len(self._batches))
        finally:
            # Nothing may be on its way to memory that is given back.
            for copies in under_way:
                with contextlib.suppress(RuntimeError):
                    copies.wait()


def ring_for(sources: Sequence[Source], settings: Settings, bound: int | None) -> Ring | None:
    """A ring for sources of much more bytes than it has, or of more than may be taken; else None.

    Args:
        sources: by file and offset.
        settings: of the save.
        bound: bytes of host buffers that may be in use; None: as many as are needed.
    """
    if not is_worth_it(sum(slot_nbytes(source.tensor) for source in sources), bound) or not can_be_fed():
        return None
    try:
        ring = Ring(sources, settings.io_threads, settings.chunk_bytes, _limit(bound) // _SLABS)
    except ValueError:
        return None
    return None if bound is not None and ring.nbytes > bound else ring


def is_worth_it(nbytes: int, bound: int | None) -> bool:
    """Whether so many bytes of copies are much more than a ring has, or more than may be taken."""
    return nbytes > 2 * _limit(bound) or (bound is not None and nbytes > bound)


def _limit(bound: int | None) -> int:
    return _SLABS * SLAB_NBYTES if bound is None else min(_SLABS * SLAB_NBYTES, bound)


def can_be_fed() -> bool:
    """Whether the process starts threads now. While it ends, Python 3.12 and later start none."""
    thread = threading.Thread(target=lambda: None, name="ckpt_fast-stage", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return False
    thread.join()
    return True


def _cut(source: Source, window: int) -> Iterator[tuple[int, int, int]]:
    """(window, begin, end) of the parts of a source; those of one that must stay whole begin in the first."""
    nbytes = source.tensor.numel() * source.tensor.dtype.itemsize
    if not _may_be_cut(source.tensor):
        if nbytes > window:
            raise ValueError(f"a tensor of {nbytes} bytes that is not contiguous needs a larger slab")
        yield source.offset // window, 0, nbytes
        return
    begin = 0
    while begin < nbytes:
        place = (source.offset + begin) // window
        end = min((place + 1) * window - source.offset, nbytes)
        yield place, begin, end
        begin = end


def _may_be_cut(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _part_of(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    nbytes = tensor.numel() * tensor.dtype.itemsize
    if end - begin == nbytes:
        return tensor
    # Items begin at multiples of ALIGNMENT, which is one of every element's size.
    assert begin % ALIGNMENT == 0
    itemsize = tensor.dtype.itemsize
    return tensor.view(-1)[begin // itemsize : end // itemsize]
