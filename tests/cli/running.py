# SPDX-License-Identifier: Apache-2.0
"""The command in a pipe and on a pseudo-terminal, and checkpoints of all kinds to run it on."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pty
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import ckpt_fast
from ckpt_fast import compat
from ckpt_fast.cli import main
from tests.helpers import run_ranks
from tests.interop.saved import save_with_stock
from tests.models import Run, Setup, megatron_on_cpu

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Ran:
    """What a command did: its exit status, and what it printed; on a terminal all of it is in ``out``."""

    status: int
    out: str
    err: str = ""

    @property
    def value(self) -> Any:
        return json.loads(self.out)

    @property
    def text(self) -> str:
        """The output without the control sequences of a terminal."""
        return _CONTROL.sub("", self.out).replace("\r\n", "\n")


def in_pipe(*arguments: str | Path) -> Ran:
    """Run the command with its output going elsewhere than to a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(each) for each in arguments])
    return Ran(status, out.getvalue(), err.getvalue())


def on_terminal(*arguments: str | Path) -> Ran:
    """Run the command with output and errors going to a pseudo-terminal of 120 columns."""
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while chunk := os.read(ours, 65536):
                chunks.append(chunk)

    before = {name: os.environ.get(name) for name in ("TERM", "COLUMNS")}
    os.environ.update(TERM="xterm-256color", COLUMNS="120")
    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
            assert terminal.isatty()
            with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
                status = main([str(each) for each in arguments])
    finally:
        reader.join()
        os.close(ours)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return Ran(status, b"".join(chunks).decode())


def state() -> dict[str, Any]:
    """Return a nested state dict of several dtypes, with an optimizer."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(60, 50, generator=generator)
    return {
        "model": {
            "weight": weight,
            "half": weight[:3, :5].bfloat16(),
            "scale": torch.tensor(0.5),
            "empty": torch.empty(0, 4),
        },
        "optimizer": {"state": {"weight": {"exp_avg": weight * 2}}, "groups": [{"lr": 0.1}, {"lr": 0.2}]},
        "step": 7,
    }


def save_dcp(root: Path) -> dict[str, Path]:
    """Save one state with ckpt_fast and with torch, and as fsdp_dtensor checkpoints look."""
    places = {name: root / name for name in ("ours", "stock", "fsdp")}
    ckpt_fast.save(state(), places["ours"], no_dist=True)
    for name in ("stock", "fsdp"):
        dcp.save(state(), storage_writer=dcp.FileSystemWriter(places[name]), no_dist=True)
    (places["fsdp"] / "run_config.yaml").write_text("checkpoint:\n  ckpt_format: fsdp_dtensor\n")
    return places


@functools.cache
def megatron_setup() -> Setup:
    return Setup(tp=2, bf16=True, distributed=True)


def save_run(rank: int, root: str, steps: int) -> None:
    """Train, and save every step with ckpt_fast, and the last state with stock Megatron-Core as well."""
    with Run(megatron_setup(), save=os.path.join(root, "ours")) as run:
        for _ in range(steps):
            run.train(1)
            run.save()
        save_with_stock(run, os.path.join(root, "stock"), None)


def save_megatron(root: Path, steps: int = 3) -> dict[str, Path]:
    """The directories of a run's checkpoints, by ckpt_fast and by stock Megatron-Core."""
    run_ranks(save_run, 2, str(root), steps)
    return {name: root / name for name in ("ours", "stock")}


def save_local_state(rank: int, root: str) -> None:
    """Save a local checkpoint of this rank."""
    kind = compat.import_tensor_aware_state_dict()
    with Run(Setup()) as run, megatron_on_cpu():
        group = compat.get_pg_collection(run.model).dp_cp
        values = kind.from_state_dict(
            run.sharded_state_dict(), algo="fully_parallel", parallelization_group=group
        )[0]
        ckpt_fast.FastLocalCheckpointManager(root).save(values, iteration=4, is_async=False)


def save_local(root: Path) -> Path:
    """The directory of a local checkpoint."""
    run_ranks(save_local_state, 1, str(root))
    (path,) = (each for each in root.rglob("iter_0000004_0_local"))
    return path
