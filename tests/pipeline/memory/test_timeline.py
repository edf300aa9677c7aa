# SPDX-License-Identifier: Apache-2.0
"""Copies from GPUs in the timeline: one block for each batch, on a row of its stream, once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from ckpt_fast.pipeline.memory import device_copy
from ckpt_fast.pipeline.memory.device_copy import StagingPolicy
from tests.jobs.test_trace import events_of
from tests.pipeline.memory.simulated_gpu import SimulatedGpu
from tests.pipeline.memory.test_device_copy import staged_on


@pytest.mark.parametrize(
    ("mode", "stream"), [("blocking", "side stream"), ("overlapped", "stream of training")]
)
def test_copies_are_shown_when_they_ran(
    mode: str, stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAST_TRACE", str(tmp_path / "timeline.json"))
    monkeypatch.setattr(device_copy, "SMALL_NBYTES", 4096)
    tensors = {"large": torch.zeros(5000), "small": torch.zeros(10)}
    begin = time.time()
    policy = StagingPolicy(mode, (lambda _: False) if mode == "overlapped" else None)  # type: ignore[arg-type]
    finish = staged_on(SimulatedGpu(), tensors, policy)
    finish()
    shown = [event for event in events_of(tmp_path / "timeline.json") if event["ph"] == "X"]
    assert sorted(event["args"]["nbytes"] for event in shown) == [40, 20_000]
    assert all(begin <= event["ts"] / 1e6 <= time.time() and event["dur"] >= 0 for event in shown)
    rows = {
        event["tid"]: event["args"]["name"]
        for event in events_of(tmp_path / "timeline.json")
        if event["name"] == "thread_name"
    }
    assert (
        rows[next(event["tid"] for event in shown if event["args"]["nbytes"] == 20_000)] == f"cpu, {stream}"
    )


def test_without_a_timeline_the_gpu_marks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unmarked(SimulatedGpu):
        def mark(self, stream: object) -> None:  # type: ignore[override]
            raise AssertionError("an event was recorded")

    monkeypatch.delenv("CKPT_FAST_TRACE", raising=False)
    staged_on(Unmarked(), {"w": torch.zeros(5000)}, StagingPolicy("blocking"))()
