# SPDX-License-Identifier: Apache-2.0
"""A GPU simulated with queues: work happens later, in any order that streams and events allow.

Its memory is the host's, so staging for GPUs can be tested, in random orders, without one.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ckpt_fast.pipeline.memory import copies, device_copy, gpu


class Stream:
    def __init__(self) -> None:
        self.work: deque[Event | Callable[[], None] | Wait] = deque()


class Event:
    done = False
    came = 0.0


class Wait:
    def __init__(self, event: Event) -> None:
        self.event = event


class SimulatedGpu:
    """Replaces ``Gpu``. ``seed`` shuffles the streams against each other."""

    def __init__(self, seed: int = 0, free_nbytes: int = 1 << 40) -> None:
        self.current, self.side = Stream(), Stream()
        self.free = free_nbytes
        self.launches: list[str] = []
        self._random = random.Random(seed)
        self._turn = threading.Lock()

    # Called by staging.

    def record(self, stream: Stream) -> Event:
        event = Event()
        stream.work.append(event)
        return event

    def mark(self, stream: Stream) -> Event:
        return self.record(stream)

    def time_of(self, mark: Event) -> float:
        assert mark.done
        return mark.came

    def order_behind(self, stream: Stream, event: Event) -> None:
        stream.work.append(Wait(event))

    def wait_for(self, event: Event) -> None:
        while not event.done:
            self.advance()

    def is_done(self, event: Event) -> bool:
        return event.done

    def free_nbytes(self) -> tuple[int, int]:
        return self.free, 1 << 40

    def empty(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.free:
            raise torch.OutOfMemoryError("simulated")
        return torch.full((nbytes,), 0xEE, dtype=torch.uint8)

    def clone(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if sum(tensor.nbytes for tensor in tensors) > self.free:
            raise torch.OutOfMemoryError("simulated")
        clones = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        for clone, tensor in zip(clones, tensors, strict=True):
            self.compute(lambda clone=clone, tensor=tensor: clone.copy_(tensor))
        return clones

    def gather(self, tensors: Sequence[torch.Tensor], block: torch.Tensor, offsets: Sequence[int]) -> None:
        self.launches.append(f"gather {len(tensors)}")
        for tensor, offset in zip(tensors, offsets, strict=True):
            part = block[offset : offset + tensor.nbytes]
            self.compute(lambda part=part, tensor=tensor: fill(part, tensor))

    def copy_to_host(
        self, tensors: Sequence[torch.Tensor], slots: Sequence[torch.Tensor], stream: Stream
    ) -> None:
        self.launches.extend("copy" for _ in tensors)
        for tensor, slot in zip(tensors, slots, strict=True):
            stream.work.append(lambda slot=slot, tensor=tensor: fill(slot, tensor))

    # Called by training.

    def compute(self, action: Callable[[], Any]) -> None:
        """Run a kernel on the current stream."""
        self.current.work.append(action)

    def advance(self) -> bool:
        """Do one thing that may be done now; return False if there is none."""
        with self._turn:
            return self._advance()

    def _advance(self) -> bool:
        ready = [stream for stream in (self.current, self.side) if stream.work and not _blocked(stream)]
        if not ready:
            return False
        work = self._random.choice(ready).work.popleft()
        if isinstance(work, Event):
            work.came = time.perf_counter()
            work.done = True
        elif not isinstance(work, Wait):
            work()
        return True

    def finish(self) -> None:
        while self.advance():
            pass
        assert not self.current.work and not self.side.work, "the streams wait for each other"


def _blocked(stream: Stream) -> bool:
    first = stream.work[0]
    return isinstance(first, Wait) and not first.event.done


def fill(slot: torch.Tensor, tensor: torch.Tensor) -> None:
    assert slot.numel() == tensor.nbytes
    slot.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))


def install(monkeypatch: pytest.MonkeyPatch, simulated: SimulatedGpu) -> None:
    """From now on, treat CPU tensors as tensors of this GPU."""
    for module in (copies, gpu):
        monkeypatch.setattr(module, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(device_copy.gpu, "gpu_of", lambda device: simulated)
    monkeypatch.setattr(gpu, "can_gather", lambda tensor: tensor.is_contiguous())


class EagerGpu(SimulatedGpu):
    """A GPU whose current stream is the host itself: training's computations happen at once."""

    def compute(self, action: Callable[[], Any]) -> None:
        action()

    def order_behind(self, stream: Stream, event: Event) -> None:
        if stream is self.current:
            self.wait_for(event)
        else:
            super().order_behind(stream, event)

    def record(self, stream: Stream) -> Event:
        event = super().record(stream)
        if stream is self.current:
            self.wait_for(event)
        return event
