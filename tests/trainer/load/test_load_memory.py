# SPDX-License-Identifier: Apache-2.0
"""How much host memory a load takes in addition to the state it fills."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers import run_ranks
from tests.models import Run, Setup, other

# 10.5 million parameters; with master weights and moments, 14 bytes each.
SETUP = Setup(bf16=True, distributed=True, layers=4, hidden=512)
STATE = 147 << 20


def save(rank: int, setups: dict[str, Setup], root: str) -> None:
    for name, setup in setups.items():
        with Run(setup, save=os.path.join(root, name)) as run:
            run.train(1)
            run.save()


def peaks_of_loads(rank: int, setups: dict[str, Setup], root: str) -> dict[str, int]:
    return {name: peak_of_load(setup, os.path.join(root, name)) for name, setup in setups.items()}


def peak_of_load(setup: Setup, root: str) -> int:
    """Return the peak increase in memory use during the load, in bytes."""
    with Run(other(setup), load=root) as run:
        run.train(1)
        run.optimizer.zero_grad()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        run.load()
        return status("VmHWM") - before


def status(name: str) -> int:
    """Return bytes from the kernel's accounting of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset")
def test_no_second_copy_of_the_state(tmp_path: Path) -> None:
    """Data is read straight into place, gated layers included; a new process adds about 35 MiB.

    For a fully reshardable state, Megatron-Core creates whole float32 tensors of master weights and moments,
    from which it extracts the rank's part: 120 MiB here.
    """
    setups = {
        "replicated": replace(SETUP, distributed=False),
        "reshardable": replace(SETUP, reshardable=True),
    }
    run_ranks(save, 1, setups, str(tmp_path))
    (peaks,) = run_ranks(peaks_of_loads, 1, setups, str(tmp_path), fresh=True)
    assert peaks["replicated"] < 0.4 * STATE
    assert peaks["reshardable"] < 1.2 * STATE
