# SPDX-License-Identifier: Apache-2.0
"""What a load has read, and the line that says so."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from ckpt_fast.format.types import readable

logger = logging.getLogger(__name__)

_current: ContextVar[LoadReport | None] = ContextVar("load", default=None)


@dataclass
class LoadReport:
    """One load, or one reading of it, on this rank.

    Attributes:
        directory: the checkpoint.
        nbytes: bytes of the data files that were read.
        seconds: how long it took.
        verified, unverified: pieces of tensors whose checksums were compared, and those whose were not.
    """

    directory: str
    nbytes: int = 0
    seconds: float = 0.0
    verified: int = 0
    unverified: int = 0

    def add(self, other: LoadReport) -> None:
        """Count what another has read as well."""
        self.nbytes += other.nbytes
        self.verified += other.verified
        self.unverified += other.unverified

    def __str__(self) -> str:
        rate = self.nbytes / self.seconds / 1e9 if self.seconds else 0.0
        return f"{readable(self.nbytes)} of this rank in {self.seconds:.3f} s ({rate:.2f} GB/s)"


@contextlib.contextmanager
def one_load(directory: str, rank: int, *, is_announced: bool = False) -> Iterator[LoadReport]:
    """A block whose readings are one load to the user; rank 0 says at its end that it is done.

    Args:
        directory: the checkpoint.
        rank: this one.
        is_announced: the caller says so itself, as blocks outside of this one do.

    Yields:
        The report; its seconds are known at the end of the block.
    """
    begin, outer = time.perf_counter(), _current.get()
    report = LoadReport(directory)
    token = _current.set(report)
    try:
        yield report
    finally:
        _current.reset(token)
        report.seconds = time.perf_counter() - begin
        if outer is not None:
            outer.add(report)
    if outer is None and not is_announced and rank == 0:
        logger.info("loaded %s: %s", directory, report)


def count(report: LoadReport) -> None:
    """A reading is done."""
    logger.debug("read %s", report)
    load = _current.get()
    if load is not None:
        load.add(report)
