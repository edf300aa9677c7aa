# SPDX-License-Identifier: Apache-2.0
"""Measure how the time for which a background save holds training up grows with the number of tensors.

    python benchmarks/bench_growth.py --gigabytes 0.2 --rounds 5

The bytes stay about the same, so copying them takes as long for few tensors as for many. What the call takes
beyond one memcpy of them is the work per tensor. Two calls are measured:

ckpt_fast.async_save   of a flat state dict
save_checkpoint        of the training run of bench_loop, with a constant structure. A layer has 40 tensors:
                       10 parameters, their master weights and moments (and 4 objects)

The first two saves of a structure do not count. Between saves, training changes every tensor.
"""

from __future__ import annotations

import argparse
import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import harness
import states
import torch
import torch.distributed as dist
from hardware import limits

from ckpt_fast import settings

COUNTS = (1_000, 3_000, 10_000, 20_000, 50_000)
MEMCPY, FUNCTION, LOOP = "limit: memcpy", "ckpt_fast.async_save", "save_checkpoint"
_TENSORS_PER_LAYER = 40
# Of a layer's weights, in units of the hidden size squared, and of a weight with its copies, in bytes.
_WEIGHTS_PER_LAYER, _BYTES_PER_WEIGHT = 10, 14
_HIDDEN_STEP = 4


def memcpy(nbytes: int) -> harness.Contestant:
    """Return a contestant that copies the bytes in one piece."""
    block = torch.ones(nbytes, dtype=torch.uint8)
    return harness.Contestant(MEMCPY, limits.to_host([block], limits.Threads(settings.io_threads())))


def contestant(
    name: str,
    save: Callable[[Path], None],
    finish: Callable[[], object],
    step: Callable[[], object],
    path: Path,
) -> harness.Contestant:
    """Return a contestant of which ``save`` is timed, after a ``step``; ``finish`` waits for its end."""

    def after() -> None:
        finish()
        shutil.rmtree(path)

    return harness.Contestant(name, lambda: save(path), step, after)


def function(count: int, nbytes: int, path: Path) -> harness.Contestant:
    """Return ``ckpt_fast.async_save`` of ``count`` tensors, in a process group of one rank."""
    import ckpt_fast

    state = states.many_tensors(nbytes / 1e9, nbytes // count)
    in_flight: list[Any] = []

    def save(path: Path) -> None:
        in_flight.append(ckpt_fast.async_save(state, path))

    def step() -> None:
        for tensor in state.values():
            tensor.view(torch.uint8).bitwise_not_()

    return contestant(FUNCTION, save, lambda: in_flight.pop().result(), step, path)


def training(count: int, nbytes: int, device: torch.device, path: Path) -> harness.Contestant:
    """Return ``save_checkpoint`` of a training run that has about ``count`` tensors."""
    from training.loop import Loop
    from training.savers import Fast

    layers = max(1, round(count / _TENSORS_PER_LAYER))
    hidden = math.sqrt(nbytes / (layers * _WEIGHTS_PER_LAYER * _BYTES_PER_WEIGHT))
    loop = Loop(layers, max(1, round(hidden / _HIDDEN_STEP)) * _HIDDEN_STEP, device)
    saver = Fast()

    def finish() -> None:
        while not saver.poll():
            time.sleep(0.01)

    return contestant(LOOP, lambda path: saver.save(loop, path), finish, loop.step, path)


def measure(options: argparse.Namespace) -> harness.Times:
    """Return seconds by contestant, number of tensors and round."""
    from training.loop import start

    device = start()
    nbytes, path = round(options.gigabytes * 1e9), options.path / "checkpoint"
    times: harness.Times = {name: {} for name in (MEMCPY, FUNCTION, LOOP)}
    for count in options.counts:
        contestants = [
            memcpy(nbytes),
            function(count, nbytes, path),
            training(count, nbytes, device, path),
        ]
        contestants = harness.selected(contestants, options.only)
        measured = harness.measure(contestants, options.rounds, warm_ups=2)[harness.TOTAL]
        for name, seconds in measured.items():
            times[name][str(count)] = seconds
        # The next size starts without the model of this one.
        del contestants
        gc.collect()
    dist.destroy_process_group()
    return times


def slopes(times: harness.Times) -> Iterator[str]:
    """Yield, for each call, what a tensor costs beyond the copy of its bytes."""
    for name in times:
        if name != MEMCPY and len(times[name]) > 1:
            beyond = {int(n): median(s) - median(times[MEMCPY][n]) for n, s in times[name].items()}
            slope, rest = linear_regression(list(beyond), list(beyond.values()))
            yield f"{name}: {slope * 1e6:.2f} us per tensor, and {rest * 1e3:.1f} ms"


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of tensors")

    options = harness.parse_arguments(__doc__, more=add, gigabytes=0.2)
    report = harness.Report(options)
    with harness.quiet(options.path / "printed"):
        times = measure(options)
    title = f"training is held up by a save of {options.gigabytes * 1e3:.0f} MB, {options.rounds} rounds"
    names = [str(count) for count in options.counts]
    lines, tables = harness.side_by_side(title, times, names, round(options.gigabytes * 1e9), by="tensors")
    report.add(lines)
    report.record(tables)
    report.add([f"beyond the memcpy, by least squares over the medians, {line}" for line in slopes(times)])
    report.finish()


if __name__ == "__main__":
    main()
