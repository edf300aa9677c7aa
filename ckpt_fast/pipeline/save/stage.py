# SPDX-License-Identifier: Apache-2.0
"""Stage: every shard's bytes at an address in host memory.

CPU tensors are read where they are, unless they lie in too short runs or a snapshot is wanted. Everything
else is copied into a host buffer: from the GPU in a batch of asynchronous copies, from the CPU by the
engine's threads.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ckpt_fast import native
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.archive import ALIGNMENT
from ckpt_fast.format.types import TensorShard
from ckpt_fast.pipeline.memory import strided
from ckpt_fast.pipeline.memory.available import is_tight
from ckpt_fast.pipeline.memory.copies import as_tensor, copy_tensors, nbytes_of, needs_copy, slot_nbytes
from ckpt_fast.pipeline.memory.device_copy import BLOCKING, DeviceCopies, StagingPolicy
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.memory.host_buffer import HostBuffer, host_buffers
from ckpt_fast.pipeline.save.plan import FilePlan, PlannedItem
from ckpt_fast.pipeline.save.ring import Feed, Part, Ring, Source, is_worth_it, ring_for
from ckpt_fast.settings import Settings


@dataclass
class Staged:
    """The location of the planned items' raw data.

    Attributes:
        addresses: one entry per item, in plan order; 0 for items without raw data.
        runs: by position in ``addresses``, for items that are not in one stretch: where each of their runs
            begins, and how long one is.
        parts: by position in ``addresses``, for items that go through a ring: their parts, in order.
        owners: tensors that own memory read in place.
        buffer: host buffer that holds the copies, until ``release``.
        device_copies: those from GPUs, which may be on their way.
        buffer_nbytes: length of the part of it that is used.
        copied_nbytes: bytes copied into it, or yet to be.
        allocated_nbytes: host memory that was new for it.
        feed: makes the copies that go through a ring; None: there are none.
    """

    addresses: list[int] = field(default_factory=list)
    runs: dict[int, tuple[array[int], int]] = field(default_factory=dict)
    parts: dict[int, list[Part]] = field(default_factory=dict)
    owners: list[torch.Tensor] = field(default_factory=list)
    buffer: HostBuffer | None = None
    device_copies: DeviceCopies = field(default_factory=DeviceCopies)
    buffer_nbytes: int = 0
    copied_nbytes: int = 0
    allocated_nbytes: int = 0
    feed: Feed | None = None

    def go_through(self, ring: Ring, sources: Sequence[torch.Tensor], bound: int | None) -> None:
        """Copy these through a ring, when they are written; whoever stages serves ``feed`` then.

        Args:
            ring: of such tensors.
            sources: stay as they are until the feed has been served.
            bound: bytes of host buffers that may be in use.

        Raises:
            CheckpointError: the host memory cannot be had.
        """
        self.buffer = host_buffers.take(ring.nbytes, bound)
        self.buffer_nbytes = ring.nbytes
        self.copied_nbytes = sum(ring.batch_nbytes)
        self.allocated_nbytes = self.buffer.nbytes if self.buffer.is_new else 0
        self.feed = Feed(ring, sources, self.buffer.memory)

    @contextlib.contextmanager
    def supply(self) -> Iterator[native.Supply | None]:
        """What a write needs for bytes that come while it runs; None if all are there.

        May be entered again, to write all of it again, until ``has_left``.
        """
        if self.feed is None:
            yield None
            return
        with self.feed.asked() as supply:
            yield supply

    @property
    def ring(self) -> Ring | None:
        """The order in which bytes go through the buffer; None: all are there once ``wait`` returns."""
        return self.feed.ring if self.feed is not None else None

    @property
    def has_left(self) -> bool:
        """Whether whoever staged has gone on, and bytes that came through a ring do not come again."""
        return self.feed is not None and self.feed.has_left

    def wait(self) -> None:
        """Wait until every byte is at its address."""
        self.device_copies.wait()

    def release(self) -> None:
        """The bytes are written, or never will be: give the memory back."""
        # A device that has failed copies no more; whoever waited for it has the error.
        with contextlib.suppress(RuntimeError):
            self.wait()
        self.owners.clear()
        if self.feed is not None:
            self.feed.close()
        if self.buffer is not None:
            host_buffers.give_back(self.buffer, keep=not is_tight())
            self.buffer = None


@without_collections
def stage(
    files: Sequence[FilePlan],
    snapshot: bool = False,
    bound: int | None = None,
    policy: StagingPolicy = BLOCKING,
    ring: Ring | None = None,
) -> Staged:
    """Make the raw bytes of every planned item readable by the engine, once ``wait`` has returned.

    On return the tensors may change, if there is a snapshot, as far as ``policy`` allows.

    Args:
        files: the plan.
        snapshot: copy contiguous CPU tensors too.
        bound: bytes of host buffers that may be in use; waits for other saves' buffers if need be.
        policy: whether this waits for copies from GPUs.
        ring: of ``find_ring``, for what is copied.

    Raises:
        CheckpointError: the host memory cannot be had.
    """
    tensors = [_tensor_of(item) for file in files for item in file.items]
    is_copied = [tensor is not None and needs_copy(tensor, snapshot) for tensor in tensors]
    copied = [t for t, wanted in zip(tensors, is_copied, strict=True) if wanted and t is not None]
    staged = Staged()
    try:
        copies: Iterator[int] = iter(())
        if ring is not None:
            staged.go_through(ring, copied, bound)
            positions = [position for position, wanted in enumerate(is_copied) if wanted]
            staged.parts = {position: [] for position in positions}
            for part in ring.parts():
                staged.parts[positions[part.source]].append(part)
            copies = iter([0] * len(copied))
        elif copied:
            staged.buffer_nbytes = nbytes = sum(slot_nbytes(tensor) for tensor in copied)
            staged.buffer = host_buffers.take(nbytes, bound)
            staged.copied_nbytes = sum(nbytes_of(tensor) for tensor in copied)
            staged.allocated_nbytes = staged.buffer.nbytes if staged.buffer.is_new else 0
            copies = iter(copy_tensors(copied, staged.buffer.memory, staged.device_copies, policy))
        for tensor, wanted in zip(tensors, is_copied, strict=True):
            if tensor is None:
                staged.addresses.append(0)
            elif wanted:
                staged.addresses.append(next(copies))
            else:
                if not tensor.is_contiguous():
                    staged.runs[len(staged.addresses)] = _runs(tensor)
                staged.addresses.append(tensor.data_ptr())
                staged.owners.append(tensor)
    except BaseException:
        staged.release()
        raise
    return staged


def find_ring(
    files: Sequence[FilePlan], settings: Settings, bound: int | None, snapshot: bool
) -> Ring | None:
    """A ring for what staging copies; None if all of it may as well be copied at once.

    Args:
        files: the plan.
        settings: of the save.
        bound: bytes of host buffers that may be in use; None: as many as are needed.
        snapshot: as for ``stage``.
    """
    # Looking at every tensor takes as long as staging small ones.
    most = sum(item.raw_nbytes + ALIGNMENT for file in files for item in file.items)
    if not is_worth_it(most, bound, snapshot):
        return None
    sources = [
        Source(tensor, number, item.offset + len(item.archive.head))
        for number, file in enumerate(files)
        for item in file.items
        if item.archive is not None
        and (tensor := _tensor_of(item)) is not None
        and needs_copy(tensor, snapshot)
    ]
    return ring_for(sources, settings, bound, snapshot)


def copy_to_host(
    tensors: Sequence[torch.Tensor],
    bound: int | None = None,
    when_unused: Callable[[], None] = lambda: None,
    device_copies: DeviceCopies | None = None,
    policy: StagingPolicy = BLOCKING,
) -> tuple[HostBuffer | None, list[torch.Tensor]]:
    """Contiguous copies of plain tensors in one host buffer.

    Those that ``policy`` lets go on are complete once ``device_copies.wait`` returns, the others on return.

    Each copy has a storage of its own. The caller gives the buffer back, after which the copies' values are
    undefined; None if there are no bytes to copy.

    Args:
        tensors: plain, on any device.
        bound: bytes of host buffers that this and all saves in flight may use together; None: no bound.
        when_unused: called when the last copy in the buffer is gone, with every view of it.
        device_copies: gets those from GPUs; None: nobody waits for them, and ``policy`` is to be BLOCKING.
        policy: whether this waits for copies from GPUs.

    Raises:
        CheckpointError: the host memory cannot be had, or not within the bound now.
    """
    tensors = [tensor.detach() for tensor in tensors]
    nbytes = sum(slot_nbytes(tensor) for tensor in tensors)
    if not nbytes:
        return None, [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    if bound is not None and nbytes > bound:
        raise CheckpointError(
            f"a snapshot of {nbytes} bytes exceeds the {bound} that CKPT_FAST_HOST_BUFFER allows. Raise the "
            "bound, or save synchronously: that goes through a smaller buffer in waves."
        )
    buffer = host_buffers.take(nbytes, bound, wait_s=0.0)
    device_copies = device_copies or DeviceCopies()
    try:
        base = buffer.memory.data_ptr()
        addresses = copy_tensors(tensors, buffer.memory, device_copies, policy)
        with buffer.watched(when_unused):
            return buffer, [
                as_tensor(tensor, buffer.slot(address - base, nbytes_of(tensor)))
                for tensor, address in zip(tensors, addresses, strict=True)
            ]
    except BaseException:
        Staged(buffer=buffer, device_copies=device_copies).release()
        raise


def _tensor_of(item: PlannedItem) -> torch.Tensor | None:
    """The tensor whose raw bytes the item needs; None for ready-made and empty items."""
    if item.archive is None or not item.raw_nbytes or not isinstance(item.shard, TensorShard):
        return None
    return item.shard.tensor.detach()


def _runs(tensor: torch.Tensor) -> tuple[array[int], int]:
    """The start of each run of a CPU tensor, and the length of one run."""
    if tensor.is_contiguous():
        return array("q", [tensor.data_ptr()]), nbytes_of(tensor)
    return strided.column(strided.run_addresses(tensor)), strided.run_nbytes(tensor)
