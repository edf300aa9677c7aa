# SPDX-License-Identifier: Apache-2.0
"""The demo end to end at a small size, and that its parts would notice errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import stock_reader  # noqa: E402

SMALL = (
    "--use-distributed-optimizer",
    "--num-layers=2",
    "--hidden-size=64",
    "--ffn-hidden-size=128",
    "--num-attention-heads=4",
    "--seq-length=32",
)


@pytest.mark.long
def test_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    """With background saves, unlike ``make demo``, and with bf16 parameters."""
    command = [sys.executable, EXAMPLES / "demo.py", f"--directory={tmp_path / 'run'}"]
    command += ["--train-iters=9", "--save-interval=3", "--", *SMALL, "--bf16", "--async-save"]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=env)

    assert result.returncode == 0, result.stdout + result.stderr
    rows = result.stdout.split("\n\n")[-1].strip().splitlines()
    table = {name.strip(): value.strip() for name, _, value in (row.partition(":") for row in rows)}
    assert table["identical"] == "yes"
    # The save of step 6 may or may not have become durable before the kill.
    assert table["resumed step"].startswith(("6, then 3 steps", "3, then 6 steps"))
    assert {"steps", "stall per save", "GB/s", "files written"} <= table.keys()


class RecordedRun(demo.Run):
    """A run that has already happened."""

    def __init__(self, name: str, records: list[demo.Record]) -> None:
        self.name = name
        self.records = records


def steps(first: int, last: int) -> list[demo.Record]:
    return [{"step": n, "loss": float(n).hex(), "grad_norm": (n / 3).hex()} for n in range(first, last + 1)]


def test_one_bit_of_one_loss_is_a_difference() -> None:
    whole = RecordedRun("whole", steps(1, 9))
    killed = RecordedRun("killed", [*steps(1, 7), {"saved": 6}])
    resumed = RecordedRun("resumed", [{"start": 6}, *steps(7, 9)])
    assert demo.differences(whole, killed, resumed) == []

    resumed.records[-1]["loss"] = (9.0 + 2.0**-49).hex()
    (difference,) = demo.differences(whole, killed, resumed)
    assert "step 9 of the run 'resumed'" in difference


def test_resuming_from_an_older_save_is_a_difference() -> None:
    whole = RecordedRun("whole", steps(1, 9))
    killed = RecordedRun("killed", [*steps(1, 7), {"saved": 3}, {"saved": 6}])
    resumed = RecordedRun("resumed", [{"start": 3}, *steps(4, 9)])
    assert demo.differences(whole, killed, resumed) == [
        "the resumed run started after step 3, though step 6 was saved"
    ]


def test_process_tree_covers_other_sessions() -> None:
    script = "import subprocess, sys; subprocess.run(['sleep', '60'], start_new_session=True)"
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        while len(tree := demo.process_tree(parent.pid)) < 2:
            assert parent.poll() is None
    finally:
        for pid in demo.process_tree(parent.pid):
            subprocess.run(["kill", "-9", str(pid)], check=True)
        parent.wait()
    assert tree[0] == parent.pid
    assert not demo.is_running(parent.pid)


def test_damaged_item_is_found(tmp_path: Path) -> None:
    tensors = {name: torch.arange(1000) for name in ("a", "b")}
    dcp.save(tensors, checkpoint_id=tmp_path)
    assert stock_reader.damaged_items(tmp_path) == (2, [])

    extents = dcp.FileSystemReader(tmp_path).read_metadata().storage_data
    index, extent = next(iter(extents.items()))
    with (tmp_path / extent.relative_path).open("r+b") as file:
        file.seek(extent.offset + extent.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert stock_reader.damaged_items(tmp_path) == (2, [index.fqn])
