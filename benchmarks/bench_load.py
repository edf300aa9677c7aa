# SPDX-License-Identifier: Apache-2.0
"""Measure loads into existing tensors: warm (in the page cache), cold (dropped from it), and slices of 1/8.

    python benchmarks/bench_load.py --gigabytes 1 --rounds 5 --path DIR

The limit of a warm load is a memcpy of the same bytes, that of a cold one a raw direct read. "Cold" is the
page cache of this machine: a host, or a disk's own cache, may still hold the bytes. For slices, as in loads
with a different parallelism, the bytes read are compared with the bytes requested.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import rivals
import states
import torch
from hardware import limits, machine

from ckpt_fast import settings
from ckpt_fast.doors.megatron import torch_dist

FRAGMENTS, FRAGMENT = 8, 3
# Which rivals can load a slice, and how.
SLICED = {"ckpt_fast": torch_dist.load, "mcore": rivals.compat.dist_checkpointing.load}
# A device reaches its peak with many readers, however many threads we use.
READERS = 8


class Files:
    """The checkpoints of one state by every rival, each written once."""

    def __init__(self, state: states.State, present: Sequence[rivals.Rival], path: Path) -> None:
        self.state, self.path = state, path
        self.nbytes = states.total_nbytes(state)
        self.into = states.empty_like(state)
        self.threads = limits.Threads(settings.io_threads())
        for rival in present:
            rival.save(rival.wrap(state), self.of(rival))
            rivals.sync_tree(self.of(rival))

    def of(self, rival: rivals.Rival) -> Path:
        return self.path / rival.name.replace(" ", "-").replace(",", "")


def contestant(rival: rivals.Rival, files: Files, cold: bool) -> harness.Contestant:
    """Return a contestant that loads the whole state the way this rival does."""
    wrapped: list[Any] = []

    def before() -> None:
        for tensor in files.into.values():
            tensor.zero_()
        wrapped[:] = [rival.wrap(files.into)]
        bring_to_temperature = rivals.drop_from_page_cache if cold else rivals.bring_into_page_cache
        bring_to_temperature(files.of(rival))

    return harness.Contestant(
        rival.name,
        lambda: rival.load(files.of(rival), wrapped[0]),
        before,
        check=lambda: states.assert_equal(files.into, files.state),
    )


def warm_limits(files: Files) -> list[harness.Contestant]:
    """Return a memcpy of the same bytes, with a load's thread count and with one, and cached reads."""
    into, source = list(files.into.values()), list(files.state.values())
    counts = dict.fromkeys([files.threads.count, 1])
    limits.buffered_writer(files.path / "warm", source, files.threads)()
    fresh: list[Any] = []

    def map_fresh() -> None:
        fresh[:] = [torch.empty_like(tensor) for tensor in into]

    def copy_to_fresh() -> None:
        limits.copier(fresh, source, files.threads)()

    return [
        *(
            harness.Contestant(
                f"limit: memcpy, {count} threads", limits.copier(into, source, limits.Threads(count))
            )
            for count in counts
        ),
        harness.Contestant("limit: memcpy to new memory", copy_to_fresh, map_fresh, fresh.clear),
        harness.Contestant("limit: preadv", limits.buffered_reader(files.path / "warm", into, files.threads)),
    ]


def cold_limits(files: Files) -> list[harness.Contestant]:
    """Return direct reads of the same number of bytes."""
    limits.write_direct(files.path / "raw", files.nbytes, files.threads)
    return [
        harness.Contestant(
            f"limit: direct read, {count} threads",
            partial(
                limits.read_direct,
                files.path / "raw",
                files.nbytes,
                limits.Threads(count),
                files.threads.count,
            ),
        )
        for count in dict.fromkeys([max(READERS, files.threads.count), files.threads.count])
    ]


def measure_slices(files: Files, present: Sequence[rivals.Rival], axis: int, rounds: int) -> list[str]:
    """Load one of eight fragments of every tensor along ``axis``; vectors have only one axis."""
    wanted = {
        name: tensor.chunk(FRAGMENTS, min(axis, tensor.dim() - 1))[FRAGMENT]
        for name, tensor in files.state.items()
    }
    into = states.empty_like(wanted)
    nbytes = states.total_nbytes(wanted)
    lines = [f"a slice of 1/{FRAGMENTS} along axis {axis}, {nbytes / 1e6:.1f} MB wanted, warm"]
    for rival in present:
        if rival.name in SLICED:
            rivals.bring_into_page_cache(files.of(rival))
            times = []
            for _ in range(rounds):
                request = rivals.sharded(into, axis, FRAGMENTS, FRAGMENT)
                before, begin = machine.bytes_read(), time.perf_counter()
                # Nobody requests the other seven fragments, so the check across ranks would complain.
                SLICED[rival.name](request, str(files.of(rival)), validate_access_integrity=False)
                times.append(time.perf_counter() - begin)
                read = machine.bytes_read() - before
            states.assert_equal(into, wanted)
            lines.append(
                f"  {rival.name.ljust(12)} {read / 1e6:9.1f} MB read, {read / nbytes:6.3f} x wanted, "
                f"{statistics.median(times) * 1e3:7.1f} ms"
            )
    return lines


def main() -> None:
    options = harness.parse_arguments(__doc__)
    rivals.start_process_group()
    report = harness.Report(options)
    present, absent = rivals.all_rivals()
    words = [word for word in options.only.split(",") if word]
    present = [rival for rival in present if not words or any(word in rival.name for word in words)]
    files = Files(states.chosen(options), present, options.path)
    what = f"{len(files.state)} tensors, {files.nbytes / 1e9:.2f} GB, {options.rounds} rounds"
    for temperature, cold, raw in (("warm", False, warm_limits(files)), ("cold", True, cold_limits(files))):
        contestants = [*raw, *(contestant(rival, files, cold) for rival in present)]
        times = harness.measure(contestants, options.rounds)[harness.TOTAL]
        title = f"{temperature} load, {what}"
        report.add(harness.table(title, times, contestants, files.nbytes, "mcore", raw[0].name))
    if not options.many:
        del files
        files = Files(
            states.wide_layer(options.gigabytes),
            [r for r in present if r.name in SLICED],
            options.path / "wide",
        )
        for axis in (0, 1):
            report.add(measure_slices(files, present, axis, options.rounds))
    report.add(absent)
    report.finish()


if __name__ == "__main__":
    main()
