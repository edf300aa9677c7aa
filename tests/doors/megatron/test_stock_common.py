# SPDX-License-Identifier: Apache-2.0
"""Who saves a common state that Megatron-Core itself cannot load is told, and nobody else."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from ckpt_fast import FastSaveStrategy
from ckpt_fast.doors.megatron import stock_common, torch_dist
from tests.everyday import VALUES
from tests.helpers import run_ranks
from tests.models import megatron_on_cpu


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def save_all(rank: int, root: str) -> dict[str, tuple[list[str], str]]:
    """Save each value twice; return the warnings, and what Megatron-Core's load says."""
    os.environ["CKPT_FAST_FSYNC"] = "0"
    found = {}
    lines = Lines()
    stock_common.logger.addHandler(lines)
    try:
        for name, value in VALUES.items():
            directory = os.path.join(root, name)
            stock_common._told.clear()
            lines.texts = []
            for number in range(2):
                state = {"values": {"plain": 1, "o": value()}, "t": tensor()}
                job = torch_dist.start_save(state, f"{directory}-{number}", FastSaveStrategy())
                job.write()
                job.commit()
            found[name] = lines.texts, stock_load(f"{directory}-1")
    finally:
        stock_common.logger.removeHandler(lines)
    return found


def tensor() -> ShardedTensor:
    return ShardedTensor.from_rank_offsets("t", torch.ones(2))


def stock_load(directory: str) -> str:
    with megatron_on_cpu():
        try:
            dist_checkpointing.load({"t": tensor()}, directory)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_warning_for_each_value_that_megatron_core_refuses(tmp_path: Path) -> None:
    (found,) = run_ranks(save_all, 1, str(tmp_path))
    for name, (warnings, refusal) in found.items():
        assert len(warnings) == bool(refusal), (name, warnings, refusal)
        assert all("the common state['values']['o']" in text for text in warnings), warnings
    told = {name for name, (warnings, _) in found.items() if warnings}
    assert {"date", "array", "nested enum"} <= told
    assert not told & {"dict", "tensor", "NumPy float"}
    assert "datetime.date" in found["date"][0][0]
