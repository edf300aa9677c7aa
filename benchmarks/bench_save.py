# SPDX-License-Identifier: Apache-2.0
"""Measure durable saves, from the call until the checkpoint would survive a power loss.

    python benchmarks/bench_save.py --gigabytes 1 --rounds 5 --path DIR

For rivals that do not sync, the sync is included in their time. The limit is a raw direct write of the same
number of bytes with the same number of threads; on an in-memory file system (--path /dev/shm/x) it is a plain
pwrite. With --page-cache nobody syncs, so only writing to the page cache is measured.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import harness
import rivals
import states
from hardware import limits, machine

from ckpt_fast import settings


def contestant(rival: rivals.Rival, state: states.State, path: Path, sync: bool) -> harness.Contestant:
    """Return a contestant that saves to a fresh directory, which is removed afterwards."""
    wrapped: list[Any] = []

    def before() -> None:
        wrapped[:] = [rival.wrap(state)]

    def run() -> None:
        rival.save(wrapped[0], path)
        if sync and not rival.durable:
            rivals.sync_tree(path)

    def after() -> None:
        wrapped.clear()
        shutil.rmtree(path)

    return harness.Contestant(rival.name, run, before, after)


def limit_of(state: states.State, path: Path, sync: bool) -> list[harness.Contestant]:
    """Return the fewest operations that write the same number of bytes; the first is the limit."""
    threads = limits.Threads(settings.io_threads())
    nbytes = states.total_nbytes(state)
    tensors = list(state.values())
    if machine.file_system(path) == "tmpfs" or not sync:
        runs = {"limit: pwrite": limits.buffered_writer(path / "raw", tensors, threads)}
    else:
        runs = {
            "limit: direct write + fsync": lambda: limits.write_direct(path / "raw", nbytes, threads),
            "limit: pwrite + fsync": limits.buffered_writer(path / "raw", tensors, threads, sync=True),
        }

    def remove() -> None:
        for file in path.glob("raw.*"):
            file.unlink()

    return [harness.Contestant(name, run, after=remove) for name, run in runs.items()]


def main() -> None:
    options = harness.parse_arguments(__doc__)
    sync = not options.page_cache
    if not sync:
        os.environ.update(CKPT_FAST_FSYNC="0", CKPT_FAST_DIRECT="0")
    rivals.start_process_group()
    report = harness.Report(options)
    state = states.chosen(options)
    present, absent = rivals.all_rivals(sync)
    raw = limit_of(state, options.path, sync)
    contestants = [*raw, *(contestant(r, state, options.path / "checkpoint", sync) for r in present)]
    contestants = harness.selected(contestants, options.only)
    times = harness.measure(contestants, options.rounds)
    nbytes = states.total_nbytes(state)
    what = "durable save" if sync else "save to the page cache"
    title = f"{what}, {len(state)} tensors, {nbytes / 1e9:.2f} GB, {options.rounds} rounds"
    report.add(
        harness.table(
            title,
            times[harness.TOTAL],
            contestants,
            nbytes,
            "mcore" if sync else "DCP, 1 thread",
            raw[0].name,
        )
    )
    report.add(absent)
    report.finish()


if __name__ == "__main__":
    main()
