# SPDX-License-Identifier: Apache-2.0
"""The calls that staging makes to a GPU: streams, events, copies. Nothing is decided here."""

from __future__ import annotations

import functools
import time
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from ckpt_fast import native
from ckpt_fast.pipeline.memory.device_rows import copy_across


class Gpu:
    """One CUDA device, on the calling thread's current stream and on a side stream for copies to the host.

    Everything is enqueued; only ``wait_for`` makes the host wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def current(self) -> Any:
        """The stream that the calling thread computes on."""
        return torch.cuda.current_stream(self._device)

    def record(self, stream: Any) -> Any:
        """An event behind what is enqueued on ``stream``."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def mark(self, stream: Any) -> Any:
        """``record``, for a timeline: ``time_of`` tells when the event came."""
        _ = self._reference
        event = torch.cuda.Event(blocking=True, enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def time_of(self, mark: Any) -> float:
        """When a mark that has come did so, on the clock of ``time.perf_counter``."""
        event, seconds = self._reference
        return float(seconds + event.elapsed_time(mark) / 1e3)

    @functools.cached_property
    def _reference(self) -> tuple[Any, float]:
        """One moment on both clocks. On a stream with nothing to do, so that nobody waits for long."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
        event.synchronize()
        return event, time.perf_counter()

    def order_behind(self, stream: Any, event: Any) -> None:
        """Make everything enqueued on ``stream`` from now on wait for the event."""
        stream.wait_event(event)

    def wait_for(self, event: Any) -> None:
        """The host waits for the event, without the GIL and without spinning."""
        event.synchronize()

    def is_done(self, event: Any) -> bool:
        """Whether the event has come."""
        return bool(event.query())

    def free_nbytes(self) -> tuple[int, int]:
        """(free, total) bytes of the device's memory."""
        return torch.cuda.mem_get_info(self._device)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialised device memory, usable in the order of the current stream.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def clone(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Contiguous copies on the device, enqueued on the current stream; raises as ``empty``."""
        copies = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        if copies:
            torch._foreach_copy_(copies, list(tensors))
        return copies

    def gather(self, tensors: Sequence[torch.Tensor], block: torch.Tensor, offsets: Sequence[int]) -> None:
        """Copy contiguous tensors into ``block``, at byte offsets, on the current stream."""
        base = block.data_ptr()
        kernels = native.cuda()
        assert kernels is not None, "nothing is gathered without the CUDA part"
        kernels.gather(
            array("q", (base + offset for offset in offsets)),
            *_sources(tensors),
            self._device.index,
            self.current.cuda_stream,
        )

    def copy_to_host(
        self, tensors: Sequence[torch.Tensor], slots: Sequence[torch.Tensor], stream: Any
    ) -> None:
        """Copy tensors into host memory on ``stream``; each slot has the bytes of its tensor.

        What is not contiguous is copied by rows, or made contiguous on the device first.
        """
        kernels = native.cuda()
        memcpy_ok = [kernels is not None and _can_memcpy(tensor) for tensor in tensors]
        with torch.cuda.stream(stream):
            for tensor, slot, can_memcpy in zip(tensors, slots, memcpy_ok, strict=True):
                if not can_memcpy:
                    copy_across(slot.view(tensor.dtype).view(tensor.shape), tensor)
        chosen = [(t, s) for t, s, can_memcpy in zip(tensors, slots, memcpy_ok, strict=True) if can_memcpy]
        if chosen and kernels is not None:
            kernels.copy_to_host(
                array("q", (slot.data_ptr() for _, slot in chosen)),
                *_sources([tensor for tensor, _ in chosen]),
                self._device.index,
                stream.cuda_stream,
            )


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The device's Gpu; its side stream is made once."""
    return Gpu(device)


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is a GPU's."""
    return tensor.is_cuda


def can_gather(tensor: torch.Tensor) -> bool:
    """Whether ``Gpu.gather`` takes the tensor."""
    return native.cuda() is not None and _can_memcpy(tensor)


def _can_memcpy(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _sources(tensors: Sequence[torch.Tensor]) -> tuple[array[int], array[int]]:
    addresses = array("q", (tensor.data_ptr() for tensor in tensors))
    return addresses, array("q", (tensor.numel() * tensor.dtype.itemsize for tensor in tensors))
