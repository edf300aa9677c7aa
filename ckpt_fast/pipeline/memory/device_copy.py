# SPDX-License-Identifier: Apache-2.0
"""Copies from GPUs to host memory that run while Python and the GPU do other work.

When may training change a tensor that is being copied? It depends on the mode:

blocking    when the call returns: the host has waited for the copies.
overlapped  when the call returns, as far as *unprotected* tensors go: those are read in the order of the
            stream that training computes on. *Protected* ones are read on a side stream; their owner promises
            to call ``order_behind`` before changing them, which makes the GPU wait and not the host.
device      when the call returns: the tensors are first copied within the device's memory, in the order of
            the stream that training computes on. That takes the memory, until the copy to the host is done.

Small tensors are gathered into one block on the device, in the order of the current stream, so that thousands
of them take a few launches and one transfer. That makes them safe in every mode.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_fast import settings
from ckpt_fast.jobs import trace
from ckpt_fast.once import first_time
from ckpt_fast.pipeline.memory import gpu

logger = logging.getLogger(__name__)

# From here on a transfer takes longer than starting it.
SMALL_NBYTES = 128 << 10
# Device memory for gathering; the small tensors beyond it are copied one by one.
_BLOCK_NBYTES = 256 << 20
# Part of a device's memory that its own copy of the state must leave free.
_MARGIN = 0.1


@dataclass(frozen=True)
class StagingPolicy:
    """How the GPU tensors of a snapshot are copied.

    Attributes:
        mode: "auto" is overlapped with ``is_protected``, else "device" if memory allows, else blocking.
        is_protected: whether whoever changes the tensor calls ``order_behind`` first; None: nobody does,
            unless the mode "overlapped" was asked for by name, which promises it for all.
    """

    mode: settings.StagingMode = "auto"
    is_protected: Callable[[torch.Tensor], bool] | None = None

    @staticmethod
    def chosen(is_protected: Callable[[torch.Tensor], bool] | None = None) -> StagingPolicy:
        """The mode that ``CKPT_FAST_STAGING`` names."""
        return StagingPolicy(settings.staging_mode(), is_protected)


BLOCKING = StagingPolicy("blocking")


class DeviceCopies:
    """Copies on their way; thread-safe once they are enqueued."""

    def __init__(self) -> None:
        self._events: list[tuple[gpu.Gpu, Any]] = []
        self._kept: list[torch.Tensor] = []
        # For a timeline: device, row, beginning and end of a batch of copies, bytes.
        self._shown: list[tuple[gpu.Gpu, str, Any, Any, int]] = []

    def enqueue(
        self,
        tensors: Sequence[torch.Tensor],
        slots: Sequence[torch.Tensor],
        gathered: int,
        policy: StagingPolicy,
    ) -> None:
        """Copy tensors of one device into slots of host memory, each of its tensor's bytes.

        Args:
            tensors: those that are to be gathered come first.
            slots: uint8 views of one block of memory; those of gathered tensors follow each other in it.
            gathered: how many are to be gathered; ``choose_gathered`` chose them.
            policy: for the others.
        """
        device = gpu.gpu_of(tensors[0].device)
        if gathered and not self._gather(device, tensors[:gathered], slots[:gathered]):
            gathered = 0
        large, large_slots = list(tensors[gathered:]), slots[gathered:]
        mode = _decide(policy, device, large)
        if mode == "device":
            try:
                large = device.clone(large)
            except torch.OutOfMemoryError:
                if first_time("no device memory"):
                    logger.warning(
                        "no device memory for a snapshot of the state: training waits for the copies"
                    )
                mode = "blocking"
        ordered = [mode == "overlapped" and not _is_protected(policy, tensor) for tensor in large]
        for in_order in (True, False):
            chosen = [i for i, each in enumerate(ordered) if each == in_order]
            self._copy(device, [large[i] for i in chosen], [large_slots[i] for i in chosen], in_order)
        if mode == "blocking":
            self.wait()

    def wait(self) -> None:
        """The host waits until all is copied."""
        with contextlib.ExitStack() as each:  # goes on with the others behind an error
            for device, event in self._events:
                each.callback(device.wait_for, event)
        self._kept.clear()
        self._show()

    def _show(self) -> None:
        timeline = trace.current() if self._shown else None
        with contextlib.suppress(IndexError):  # another thread may do the same
            while timeline is not None:
                device, row, begin, end, nbytes = self._shown.pop()
                times = device.time_of(begin), device.time_of(end)
                timeline.add(row, "copy to host memory", *times, {"nbytes": nbytes})

    @property
    def are_done(self) -> bool:
        """Whether all is copied."""
        return all(device.is_done(event) for device, event in self._events)

    def order_behind(self) -> None:
        """Order all that the calling thread enqueues on its current streams from now on after the copies."""
        for device, event in self._events:
            if not device.is_done(event):
                device.order_behind(device.current, event)

    def _gather(
        self, device: gpu.Gpu, tensors: Sequence[torch.Tensor], slots: Sequence[torch.Tensor]
    ) -> bool:
        base = slots[0].data_ptr()
        nbytes = slots[-1].data_ptr() + slots[-1].numel() - base
        try:
            block = device.empty(nbytes)
        except torch.OutOfMemoryError:
            return False
        device.gather(tensors, block, [slot.data_ptr() - base for slot in slots])
        self._copy(device, [block], [slots[0].as_strided((nbytes,), (1,))], in_order=False)
        return True

    def _copy(
        self, device: gpu.Gpu, tensors: Sequence[torch.Tensor], slots: Sequence[torch.Tensor], in_order: bool
    ) -> None:
        """On the stream of training, or on the side stream, which begins where that one is now."""
        if not tensors:
            return
        stream = device.current if in_order else device.side
        if not in_order:
            device.order_behind(device.side, device.record(device.current))
        begin = device.mark(stream) if trace.current() is not None else None
        # A tensor's memory goes back to torch's allocator with its last reference, whatever still reads it.
        self._kept.extend(tensors)
        try:
            device.copy_to_host(tensors, slots, stream)
            if begin is not None:
                row = f"{tensors[0].device}, {'stream of training' if in_order else 'side stream'}"
                nbytes = sum(slot.numel() for slot in slots)
                self._shown.append((device, row, begin, device.mark(stream), nbytes))
        finally:  # if one cannot be enqueued, those before it are under way
            self._events.append((device, device.record(stream)))


def choose_gathered(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Which of a device's tensors are to be gathered: the small ones, as far as the block suffices."""
    chosen, total = [], 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.dtype.itemsize
        chosen.append(nbytes < SMALL_NBYTES and total + nbytes <= _BLOCK_NBYTES and gpu.can_gather(tensor))
        total += nbytes if chosen[-1] else 0
    return chosen


def _decide(policy: StagingPolicy, device: gpu.Gpu, tensors: Sequence[torch.Tensor]) -> settings.StagingMode:
    if policy.mode != "auto":
        return policy.mode
    if policy.is_protected is not None:
        return "overlapped"
    free, total = device.free_nbytes()
    needed = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
    return "device" if needed + _MARGIN * total <= free else "blocking"


def _is_protected(policy: StagingPolicy, tensor: torch.Tensor) -> bool:
    return policy.is_protected is None or policy.is_protected(tensor)
