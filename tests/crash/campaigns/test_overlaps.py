# SPDX-License-Identifier: Apache-2.0
"""Overlapping saves: a reported checkpoint holds its own values, and every other save was refused."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.crash.campaigns.overlaps import Overlaps
from tests.crash.campaigns.overlaps_of_runs import RunOverlaps
from tests.helpers import run_ranks


def overlap(_: int, root: str, seeds: range, saves: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        schedule = Overlaps(f"{root}/{seed}", seed)
        schedule.run(saves)
        counts += schedule.counts
    return counts


def run(root: Path, seeds: range, saves: int, timeout_s: float = 120) -> Counter[str]:
    counts: Counter[str] = run_ranks(overlap, 1, str(root), seeds, saves, fresh=True, timeout_s=timeout_s)[0]
    assert counts["published"] > saves and counts["refused"] and counts["looked at"]
    return counts


@pytest.mark.parametrize("native", ["1", pytest.param("0", marks=pytest.mark.long)])
def test_random_overlaps(
    tmp_path: Path, no_fsync: None, monkeypatch: pytest.MonkeyPatch, native: str
) -> None:
    monkeypatch.setenv("CKPT_FAST_NATIVE", native)
    monkeypatch.setenv("CKPT_FAST_TIMEOUT", "1")
    run(tmp_path, range(2), 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("native", ["1", "0"])
def test_thousands_of_random_overlaps(
    tmp_path: Path, no_fsync: None, monkeypatch: pytest.MonkeyPatch, native: str
) -> None:
    monkeypatch.setenv("CKPT_FAST_NATIVE", native)
    monkeypatch.setenv("CKPT_FAST_TIMEOUT", "1")
    counts = run(tmp_path, range(100, 120), 50, timeout_s=1700)
    sys.stdout.write(f"{dict(counts)}\n")


def overlap_runs(_: int, root: str, seeds: range, saves: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        schedule = RunOverlaps(f"{root}/{seed}", seed)
        schedule.run(saves)
        counts += schedule.counts
    return counts


@pytest.mark.long
def test_random_overlaps_of_runs(tmp_path: Path, no_fsync: None) -> None:
    counts: Counter[str] = run_ranks(overlap_runs, 1, str(tmp_path), range(1), 40, fresh=True)[0]
    assert counts["begun"] > 20 and counts["looked at"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_random_overlaps_of_runs(tmp_path: Path, no_fsync: None) -> None:
    arguments = (overlap_runs, 1, str(tmp_path), range(100, 120), 60)
    counts: Counter[str] = run_ranks(*arguments, fresh=True, timeout_s=1700)[0]
    assert counts["begun"] > 600 and counts["skipped"] and counts["looked at"]
    sys.stdout.write(f"{dict(counts)}\n")
