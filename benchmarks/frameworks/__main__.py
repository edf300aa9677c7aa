# SPDX-License-Identifier: Apache-2.0
"""Measure saves as frameworks make them, with ckpt_fast installed and without, in one run.

    torchrun --nproc-per-node 2 benchmarks/frameworks --framework "TorchTitan, async" --path DIR

A model of 250 parameters under FSDP2 is trained with AdamW, which keeps three tensors for each, so 1 000 are
saved. "held up" is how long the call takes, and by how much the steps until the end of the save take longer
than usual; "durable" is from the call to the end of the save. Times are those of the slowest rank.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import shutil
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import ckpt_fast

sys.path.append(str(Path(__file__).resolve().parents[1]))
import harness
import savers

HELD_UP, DURABLE = "held up", "durable"
KINDS = {"torch": False, "ckpt_fast": True}


class Training:
    """A model that is trained, and saved by a framework."""

    def __init__(self, saver: savers.Saver, root: Path) -> None:
        self._saver, self._root = saver, root
        self._saves = 0
        for _ in range(3):
            self.step()

    def step(self) -> float:
        """Collective. Take a step; returns its seconds."""
        begin = time.perf_counter()
        loss = self._saver.model()
        self._saver.backward(loss)
        self._saver.optimizer.step()
        self._saver.optimizer.zero_grad()
        dist.all_reduce(torch.zeros(1))
        return time.perf_counter() - begin

    def save(self) -> dict[str, float]:
        """Collective. Save, and train until that is over; returns the seconds of the slowest rank."""
        self._saves += 1
        path = self._root / str(self._saves)
        usual = median(self.step() for _ in range(5))
        dist.barrier()
        begin = time.perf_counter()
        futures = self._saver.save(path)
        held_up = time.perf_counter() - begin
        while not _all_ranks(all(future.done() for future in futures)):
            held_up += self.step() - usual
        durable = time.perf_counter() - begin
        for future in futures:
            future.result()
        figures = torch.tensor([held_up, durable])
        dist.all_reduce(figures, dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            shutil.rmtree(path)
        dist.barrier()
        return dict(zip((HELD_UP, DURABLE), figures.tolist(), strict=True))


def _all_ranks(value: bool) -> bool:
    number = torch.tensor(int(value))
    dist.all_reduce(number, dist.ReduceOp.MIN)
    return bool(number)


def contestant(name: str, is_installed: bool, training: Training) -> harness.Contestant:
    installed: list[Any] = []

    def before() -> None:
        installed.append(ckpt_fast.install(megatron=False, torch_dcp=is_installed))

    def after() -> None:
        with installed.pop():
            pass

    return harness.Contestant(name, training.save, before, after)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--framework", choices=savers.SAVERS, required=True)
        parser.add_argument("--tensors", type=int, default=250, help="parameters of the model (250)")
        parser.add_argument("--rows", type=int, default=512, help="of each, with 64 columns (512)")

    options = harness.parse_arguments(__doc__, more)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    kind = savers.SAVERS[options.framework]
    if not kind.starts_itself:
        dist.init_process_group("gloo")
    saver = kind(savers.Model(options.tensors, options.rows))
    shared = [options.path]
    dist.broadcast_object_list(shared)
    report = harness.Report(options)
    training = Training(saver, shared[0])
    contestants = [contestant(name, is_installed, training) for name, is_installed in KINDS.items()]
    times = harness.measure(contestants, options.rounds)
    nbytes = 3 * sum(parameter.numel() * parameter.itemsize for parameter in saver.model.parameters())
    title = (
        f"{options.framework} ({kind.package} {importlib.metadata.version(kind.package)}), "
        f"{dist.get_world_size()} ranks, {4 * options.tensors} tensors, "
        f"{nbytes / 1e9:.2f} GB, {options.rounds} rounds"
    )
    figures = {figure: times[figure] for figure in (HELD_UP, DURABLE)}
    lines, tables = harness.side_by_side(title, figures, [each.name for each in contestants], nbytes)
    report.add(lines)
    report.record(tables)
    if dist.get_rank() == 0:
        report.finish()
    saver.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
