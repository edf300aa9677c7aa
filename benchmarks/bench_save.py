# SPDX-License-Identifier: Apache-2.0
"""Durable saves: from the call until the checkpoint would survive a power loss.

    python benchmarks/bench_save.py --gigabytes 1 --rounds 5 --path DIR

Rivals that do not sync are synced within their time. The limit is a raw direct write of the same number of
bytes with the same number of threads; on a file system in memory (--path /dev/shm/x) it is a plain pwrite.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import harness
import limits
import machine
import rivals
import states

from ckpt_fast import settings


def contestant(rival: rivals.Rival, state: states.State, path: Path) -> harness.Contestant:
    """A rival's save to a fresh directory, removed afterwards."""
    wrapped: list[Any] = []

    def before() -> None:
        wrapped[:] = [rival.wrap(state)]

    def run() -> None:
        rival.save(wrapped[0], path)
        if not rival.durable:
            rivals.sync_tree(path)

    def after() -> None:
        wrapped.clear()
        shutil.rmtree(path)

    return harness.Contestant(rival.name, run, before, after)


def limit(state: states.State, path: Path) -> harness.Contestant:
    """The fewest operations that bring as many bytes to the file system."""
    threads = limits.Threads(settings.io_threads())
    nbytes = states.total_nbytes(state)
    if machine.file_system(path) == "tmpfs":
        name, run = "limit: pwrite", limits.buffered_writer(path / "raw", list(state.values()), threads)
    else:
        name, run = (
            "limit: direct write + fsync",
            lambda: limits.write_direct(path / "raw", nbytes, threads),
        )

    def remove() -> None:
        for file in path.glob("raw.*"):
            file.unlink()

    return harness.Contestant(name, run, after=remove)


def main() -> None:
    options = harness.parse_arguments(__doc__)
    rivals.start_process_group()
    report = harness.Report(options)
    state = states.chosen(options)
    present, absent = rivals.all_rivals()
    raw = limit(state, options.path)
    contestants = [raw, *(contestant(rival, state, options.path / "checkpoint") for rival in present)]
    contestants = harness.selected(contestants, options.only)
    times = harness.measure(contestants, options.rounds)
    nbytes = states.total_nbytes(state)
    title = f"durable save, {len(state)} tensors, {nbytes / 1e9:.2f} GB, {options.rounds} rounds"
    report.add(harness.table(title, times[harness.TOTAL], contestants, nbytes, "mcore", raw.name))
    report.add(absent)
    report.finish()


if __name__ == "__main__":
    main()
