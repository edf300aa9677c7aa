# SPDX-License-Identifier: Apache-2.0
"""Measure the coordinator's work for many ranks, and what a rank of many does to load its part.

    python benchmarks/bench_plan.py --rounds 3

Ranks are simulated: what they send is built here, byte for byte as they would send it. The coordinator's part
is real: join, check, encode. Every rank has a shard of each of as many tensors.

First, ours and Megatron-Core's coordinators and loads are compared, in turn. Then ours grows, phase by phase;
times there are CPU seconds, the least of the rounds. The transport is a model: the coordinator receives one
message after the other, and a broadcast goes down a binary tree. ``--latency-us`` and ``--gigabits`` are the
latency of a message and the bandwidth of a port.
"""

from __future__ import annotations

import argparse
import gc
import math
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import rivals
from scaling import ours, stock

from ckpt_fast.format.names import METADATA_FILE

SIZES = ((512, 100), (4096, 25))
LOADS = ((512, 100), (4096, 100))
RANKS = (64, 256, 1024, 4096, 16384)
TENSORS = (100, 1000, 10_000, 50_000)
# A shard takes about a kilobyte while all ranks are simulated in one process.
MOST_SHARDS = 2_000_000
PHASES = (
    "rank: encode",
    "gather",
    "join",
    "check and write",
    "frame",
    "gather, known",
    "known",
    "broadcast",
    "load",
)


def coordinators(ranks: int, count: int, only: str) -> tuple[list[harness.Contestant], list[str]]:
    """Return our and the stock coordinator over the same shards, and a line on the bytes of each."""
    contestants, lines = [], []
    later = ours.Coordinator()
    later.save(ours.messages(ranks, count))
    for name, received, work in (
        ("ckpt_fast", ours.messages(ranks, count), ours.Coordinator().save),
        ("ckpt_fast, later", ours.messages(ranks, count, is_known=True), later.save),
        ("mcore", stock.messages(ranks, count), stock.coordinator),
    ):
        if only and only not in name:
            continue
        metadata = work(received)  # type: ignore[operator]
        gathered = sum(len(part) for m in received for part in ([m] if isinstance(m, bytes) else m))
        contestants.append(harness.Contestant(name, _discarding(work, received), nbytes=len(metadata)))
        sizes = f"{gathered / 1e6:7.1f} MB gathered, {len(metadata) / 1e6:7.1f} MB of .metadata"
        lines.append(f"  {name.ljust(16)} {sizes}")
    return contestants, lines


def loads(ranks: int, count: int, path: Path, only: str) -> list[harness.Contestant]:
    """Return what finds one rank's part of what all have saved: by the table, or by unpickling."""
    path.mkdir()
    (path / METADATA_FILE).write_bytes(ours.Coordinator().save(ours.messages(ranks, count)))
    handed, theirs = ours.handed_over(path), stock.metadata(ranks, count)
    contestants = [
        harness.Contestant("ckpt_fast, reading", lambda: ours.load(path, ranks // 2, ranks, count)),
        harness.Contestant("ckpt_fast, handed", lambda: ours.load(path, ranks // 2, ranks, count, handed)),
        harness.Contestant("mcore", _discarding(pickle.loads, theirs)),
    ]
    return harness.selected(contestants, only)


def _discarding(work: Callable[[Any], object], received: Any) -> Callable[[], None]:
    def run() -> None:
        work(received)

    return run


def growth(ranks: int, count: int, options: argparse.Namespace) -> tuple[dict[str, float], str]:
    """Return seconds by phase for one size, and what its bytes are."""
    latency, rate = options.latency_us * 1e-6, options.gigabits * 1e9 / 8
    first, path = ours.messages(ranks, count), options.path / f"{ranks}-{count}"
    coordinator, later = ours.Coordinator(), ours.Coordinator()
    for _ in range(options.rounds):
        metadata = coordinator.save(first)
    gathered = sum(map(len, first))
    del first
    later.sealed, coordinator.sealed = coordinator.sealed, None
    known = ours.messages(ranks, count, is_known=True)
    for _ in range(options.rounds):
        later.save(known)
    path.mkdir()
    (path / METADATA_FILE).write_bytes(metadata)
    handed = ours.handed_over(path)
    hops = math.ceil(math.log2(ranks))
    seconds = {
        "rank: encode": _least(lambda: ours.encode_record(ours.record(1, ranks, count)), options.rounds),
        "gather": ranks * latency + gathered / rate,
        **coordinator.seconds,
        "gather, known": ranks * latency + sum(map(len, known)) / rate,
        "known": sum(later.seconds.values()),
        "broadcast": hops * (latency + len(handed) / rate),
        "load": _least(lambda: ours.load(path, 1, ranks, count, handed), options.rounds),
    }
    sizes = [gathered, sum(map(len, known)), len(metadata), len(handed)]
    return seconds, "  ".join(f"{nbytes / 1e6:9.2f}" for nbytes in sizes)


def _least(action: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        begin = time.process_time()
        action()
        taken.append(time.process_time() - begin)
    return min(taken)


def _row(label: str, cells: Sequence[str]) -> str:
    return "  " + "  ".join([label.rjust(19), *(cell.rjust(15) for cell in cells)])


def add_growth(report: harness.Report, sizes: Sequence[tuple[int, int]], options: argparse.Namespace) -> None:
    """Measure our coordinator at sizes that grow."""
    times: harness.Times = {phase: {} for phase in PHASES}
    rows, lines, left_out = [], [], []
    for ranks, count in sizes:
        if ranks * count > MOST_SHARDS:
            left_out.append(f"{ranks} x {count}")
            continue
        seconds, nbytes = growth(ranks, count, options)
        label = f"{ranks} x {count}"
        for phase, value in seconds.items():
            times[phase][label] = [value]
        rows.append(_row(label, [f"{seconds[phase] * 1e3:.1f}" for phase in PHASES]))
        lines.append(f"  {label.rjust(14)}  {nbytes}")
        gc.collect()
    title = (
        f"ranks x tensors: CPU time by phase; gather and broadcast modelled with {options.latency_us:g} us a "
        f"message and {options.gigabits:g} Gb/s"
    )
    _, tables = harness.side_by_side(title, times, list(times["join"]), 0, by="ranks x tensors")
    report.record(tables)
    report.add([title, _row("ranks x tensors, ms", PHASES), *rows])
    report.add(["MB gathered first and later, of .metadata, and handed over to each rank that loads", *lines])
    if left_out:
        report.add([f"left out, for the memory of one machine: {', '.join(left_out)}"])


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--latency-us", type=float, default=20.0, help="of a message (20)")
        parser.add_argument("--gigabits", type=float, default=25.0, help="per second, of a port (25)")

    options = harness.parse_arguments(__doc__, rounds=3, more=add)
    rivals.start_process_group()
    report = harness.Report(options)
    # --gigabytes 1 is the full size; less, for a test, means fewer ranks.
    scale = min(options.gigabytes, 1.0)
    for full, count in SIZES:
        ranks = max(2, round(full * scale))
        contestants, lines = coordinators(ranks, count, options.only)
        times = harness.measure(contestants, options.rounds, warm_ups=0)[harness.TOTAL]
        title = f"{ranks} ranks with {count} shards each, on the coordinator, {options.rounds} rounds"
        report.add(harness.table(title, times, contestants, 0, "mcore"))
        report.add(lines)
        del contestants
    for full, count in LOADS:
        ranks = max(2, round(full * scale))
        contestants = loads(ranks, count, options.path / f"load-{ranks}-{count}", options.only)
        times = harness.measure(contestants, options.rounds)[harness.TOTAL]
        title = f"finding one rank's part of {ranks} ranks' {count} shards each, {options.rounds} rounds"
        report.add(harness.table(title, times, contestants, 0, "mcore"))
        del contestants
    # Garbage of the stock coordinator must not be walked while ours is measured.
    gc.collect()
    sizes = [(max(2, round(ranks * scale)), max(2, round(n * scale))) for n in TENSORS for ranks in RANKS]
    add_growth(report, list(dict.fromkeys(sizes)), options)
    report.finish()


if __name__ == "__main__":
    main()
