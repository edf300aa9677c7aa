# SPDX-License-Identifier: Apache-2.0
"""Report of one save: what it did, and how long each step took."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from ckpt_fast.format.types import FileRecord, readable
from ckpt_fast.jobs import metrics, trace
from ckpt_fast.once import first_time

logger = logging.getLogger(__name__)
# When the call began, and whether it logs the save itself.
_call: ContextVar[tuple[float | None, bool]] = ContextVar("call", default=(None, False))


@contextlib.contextmanager
def counted_from(begin: float, *, is_announced: bool = False) -> Iterator[None]:
    """A block of a call that began at ``begin`` (``time.perf_counter``): reports made in it count from it.

    Args:
        is_announced: the caller says that the checkpoint is saved, once it is selected.
    """
    token = _call.set((begin, is_announced))
    try:
        yield
    finally:
        _call.reset(token)


@dataclass
class SaveReport:
    """One save as its user sees it. Times in seconds, on this rank, all from the beginning of the call.

    Attributes:
        directory: the checkpoint.
        nbytes: bytes this rank wrote.
        files: files this rank wrote.
        stall_s: how long training waited.
        written_s: from the call until this rank's bytes were durable.
        seconds: from the call until the checkpoint was published.
        staged_nbytes: bytes copied to host memory; 0 if all were written from where they were.
        host_memory_allocated: bytes of host buffers that were new in this save; later saves use them again.
        waves: in how many parts the state was staged, because its copies exceed the bound on host memory.
        host_memory_bound: that bound, in bytes; None if all was staged at once.
        steps: seconds spent in each step of the pipeline, by name.
        error: why the save failed, if training goes on in spite of it; None otherwise.
    """

    directory: str
    nbytes: int = 0
    files: int = 0
    stall_s: float = 0.0
    written_s: float = 0.0
    seconds: float = 0.0
    staged_nbytes: int = 0
    host_memory_allocated: int = 0
    waves: int = 1
    host_memory_bound: int | None = None
    steps: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def __post_init__(self) -> None:
        # No fields: they mean something in this process only.
        begin, self._is_announced = _call.get()
        self._begin = time.perf_counter() if begin is None else begin

    def count_from(self, begin: float) -> None:
        """The call began at ``begin`` (``time.perf_counter``)."""
        self._begin = begin

    @property
    def is_announced(self) -> bool:
        """Whether the caller says that the checkpoint is saved."""
        return self._is_announced

    def since_call(self) -> float:
        """Seconds since the call that saves began."""
        return time.perf_counter() - self._begin

    @contextlib.contextmanager
    def timed(self, step: str, **facts: object) -> Iterator[None]:
        """Add the time that the block takes to the step's; ``facts`` are shown in a timeline."""
        begin = time.perf_counter()
        try:
            with trace.span(step, **facts), metrics.range_of(step):
                yield
        finally:
            self.steps[step] = self.steps.get(step, 0.0) + time.perf_counter() - begin

    def count(self, files: Sequence[FileRecord]) -> None:
        """Add files that this rank wrote."""
        self.files += len(files)
        self.nbytes += sum(file.nbytes for file in files)

    def note_waves(self, waves: int, bound: int, *, is_default: bool) -> None:
        """Note that the state is staged in waves; ``is_default``: the bound is what the machine can spare."""
        self.waves, self.host_memory_bound = waves, bound
        if is_default and first_time("throttled"):
            logger.warning(
                "the save to %s is throttled: this rank can spare %s of host memory for copies, and stages "
                "them in %d waves. Training waits until the last is copied, and so for most of them to be "
                "written. CKPT_FAST_HOST_BUFFER sets another bound.",
                self.directory,
                readable(bound),
                waves,
            )

    @property
    def gb_per_s(self) -> float:
        """This rank's bytes over the time until they were durable, in 10^9 bytes per second."""
        return self.nbytes / self.written_s / 1e9 if self.written_s else 0.0

    @property
    def staged_gb_per_s(self) -> float:
        """Copy rate to host memory, in 10^9 bytes per second."""
        seconds = self.steps.get("stage", 0.0) + self.steps.get("drain", 0.0)
        return self.staged_nbytes / seconds / 1e9 if seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{readable(self.nbytes)} of this rank, training held up {self.stall_s:.3f} s, durable after "
            f"{self.written_s:.3f} s ({self.gb_per_s:.2f} GB/s)"
        )

    @property
    def details(self) -> str:
        """What the text of the report leaves out: how the state was copied."""
        facts = [f"published after {self.seconds:.3f} s"]
        if self.staged_nbytes:
            facts.append(f"{readable(self.staged_nbytes)} staged at {self.staged_gb_per_s:.1f} GB/s")
        if self.host_memory_bound is not None:
            facts.append(f"in {self.waves} waves through {readable(self.host_memory_bound)} of host memory")
        if self.host_memory_allocated:
            facts.append(f"{readable(self.host_memory_allocated)} of host buffers allocated for it")
        return ", ".join(facts)
