# SPDX-License-Identifier: Apache-2.0
"""Measure background saves where a user waits for them: in a training loop of Megatron-Core.

    python benchmarks/bench_loop.py --rounds 3
    torchrun --nproc-per-node 2 benchmarks/bench_loop.py --layers 12 --hidden-size 512

The model is that of examples/train_gpt.py, in bf16 with a distributed Adam: 200 thin layers by default, for
thousands of tensors and objects; few large ones with the options above. In a round, each contestant saves
``--saves`` times: some steps, the save, and steps until it is durable. The saves of the first round do not
count, so every other one may reuse what was planned before. Times are those of the slowest rank:

held up   the call of the save
later     how much longer the steps after it take in all, up to the one that finds the checkpoint durable;
          without a save, what ten steps take longer than the ones before them: the noise
durable   from the call until a step finds the checkpoint durable

The call includes building the state dict, as in a training loop. ``ckpt_fast.async_save`` and
``dcp.async_save`` get what users of torch have: the state dicts of the model and of torch's Adam.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import harness
import torch
import torch.distributed as dist
from hardware import limits

from ckpt_fast import settings

if TYPE_CHECKING:
    from training.loop import Loop
    from training.savers import Saver

HELD_UP, LATER, DURABLE = "held up", "later", "durable"
NO_SAVE, MEMCPY = "limit: no save", "limit: memcpy of the same bytes"
_REFERENCE = "mcore async, temporary writer"
_STEPS_BEFORE, _STEPS_WITHOUT = 3, 10


def contestant(saver: Saver, loop: Loop, path: Path, saves: int) -> harness.Contestant:
    """Return a contestant that trains, saves, trains on until the checkpoint is durable, and starts again."""

    def once() -> dict[str, float]:
        usual = median(loop.step() for _ in range(_STEPS_BEFORE))
        dist.barrier()
        begin = time.perf_counter()
        saver.save(loop, path)
        held_up, later, is_durable = time.perf_counter() - begin, 0.0, False
        while not is_durable:
            seconds, before = loop.step(), time.perf_counter()
            is_durable = saver.poll()
            later += seconds + time.perf_counter() - before - usual
        durable = time.perf_counter() - begin
        dist.barrier()
        if dist.get_rank() == 0:
            if not any(path.rglob(".metadata")):
                raise RuntimeError(f"{saver.name} has left no checkpoint")
            shutil.rmtree(path)
        dist.barrier()
        return slowest({HELD_UP: held_up, LATER: later, DURABLE: durable})

    def run() -> dict[str, list[float]]:
        each = [once() for _ in range(saves)]
        return {figure: [seconds[figure] for seconds in each] for figure in (HELD_UP, LATER, DURABLE)}

    return harness.Contestant(saver.name, run)


def no_save(loop: Loop, saves: int) -> harness.Contestant:
    """Return a contestant that only trains."""

    def once() -> float:
        usual = median(loop.step() for _ in range(_STEPS_BEFORE))
        later = sum(loop.step() - usual for _ in range(_STEPS_WITHOUT))
        return slowest({LATER: later})[LATER]

    return harness.Contestant(NO_SAVE, lambda: {LATER: [once() for _ in range(saves)]})


def memcpy(loop: Loop, saves: int) -> harness.Contestant:
    """Return a contestant that copies the bytes of the state into reused memory."""
    move = limits.to_host(loop.tensors(), limits.Threads(settings.io_threads()))

    def once() -> float:
        loop.step()
        dist.barrier()
        begin = time.perf_counter()
        move()
        return slowest({HELD_UP: time.perf_counter() - begin})[HELD_UP]

    return harness.Contestant(MEMCPY, lambda: {HELD_UP: [once() for _ in range(saves)]})


def slowest(seconds: dict[str, float]) -> dict[str, float]:
    """Return each figure's maximum over all ranks."""
    figures = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    return dict(zip(seconds, figures.tolist(), strict=True))


def measure(options: argparse.Namespace, report: harness.Report) -> None:
    """Collective. Train and save with every contestant; the report is complete afterwards."""
    from training import loop as training_loop
    from training import savers

    device = training_loop.start()
    shared = [options.path]
    dist.broadcast_object_list(shared)
    loop = training_loop.Loop(options.layers, options.hidden_size, device)
    everyone = savers.everyone()
    reasons = {saver.name: saver.available() for saver in everyone}
    present = [saver for saver in everyone if not reasons[saver.name]]
    contestants = [no_save(loop, options.saves), memcpy(loop, options.saves)]
    contestants += [contestant(saver, loop, shared[0] / "checkpoint", options.saves) for saver in present]
    contestants = harness.selected(contestants, options.only)
    times = harness.measure(contestants, options.rounds)
    for saver in present:
        saver.close()
    ranks = dist.get_world_size()
    rounds = f"{options.rounds} rounds of {options.saves} saves, {settings.io_threads()} I/O threads"
    title = f"{loop.describe()}, {ranks} rank{'s' * (ranks > 1)}, {rounds}"
    figures = {figure: times[figure] for figure in (HELD_UP, LATER, DURABLE)}
    names = [contestant.name for contestant in contestants]
    lines, tables = harness.side_by_side(
        title, figures, names, loop.nbytes, (HELD_UP, _REFERENCE) if _REFERENCE in names else None
    )
    report.add(lines)
    report.record(tables)
    report.add([f"not measured: {name} ({reason})" for name, reason in reasons.items() if reason])
    dist.barrier()


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--layers", type=int, default=200)
        parser.add_argument("--hidden-size", type=int, default=64)
        parser.add_argument("--saves", type=int, default=2, help="saves per round and contestant (2)")

    options = harness.parse_arguments(__doc__, more=add, rounds=3)
    report = harness.Report(options)
    # Saves, warnings of Megatron-Core and the processes of rivals would drown the table.
    with harness.quiet(options.path / "printed"):
        measure(options, report)
        is_coordinator = dist.get_rank() == 0
        dist.destroy_process_group()
    if is_coordinator:
        report.finish()


if __name__ == "__main__":
    main()
