# SPDX-License-Identifier: Apache-2.0
"""A short soak, and what a long one calls growth; `make soak` takes an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import run_ranks
from tests.soak.campaign import Plan, soak
from tests.soak.resources import MEASURES, Sample, growths, table

FLAT = Sample(
    steps=10,
    seconds=60.0,
    rss=400 << 20,
    heap=150 << 20,
    blocks=1_500_000,
    descriptors=94,
    threads=67,
    processes=0,
    buffers=0,
    left=0,
    files=60,
)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_short_soak(tmp_path: Path, ranks: int) -> None:
    plan = Plan(seed=1, steps=100, every_s=25)
    for outcome in run_ranks(soak, ranks, str(tmp_path), plan, timeout_s=240.0, fresh=True):
        assert outcome.problems == []
        assert (outcome.steps, len(outcome.samples)) == (100, 4)
        assert outcome.counts["saves"] > 40 and outcome.counts["loads"] > 15
        last = outcome.samples[-1]
        assert (last.processes, last.buffers, last.left) == (0, 0, 0)


def test_what_is_flat_has_not_grown() -> None:
    warming = [FLAT._replace(rss=(300 + 10 * number) << 20, descriptors=80 + number) for number in range(10)]
    assert growths([*warming, *[FLAT] * 30]) == []
    higher = FLAT._replace(rss=FLAT.rss + (9 << 20), blocks=FLAT.blocks + 9000, files=75)
    assert growths([*[FLAT] * 20, *[higher] * 20]) == []
    one_peak = [*[FLAT] * 35, FLAT._replace(rss=900 << 20, threads=90), *[FLAT] * 4]
    assert growths(one_peak) == []


@pytest.mark.parametrize(
    ("name", "a_step"),
    [
        *(("rss", 1 << 20), ("heap", 1 << 20), ("blocks", 2000)),
        *(("descriptors", 1), ("threads", 1), ("processes", 1), ("buffers", 1), ("left", 1), ("files", 3)),
    ],
)
def test_what_grows_is_named(name: str, a_step: int) -> None:
    samples = [FLAT._replace(**{name: getattr(FLAT, name) + number * a_step}) for number in range(60)]
    (text,) = growths(samples)
    assert text.startswith(f"{MEASURES[name].title}: from ")


def test_too_few_samples_are_no_proof() -> None:
    assert growths([FLAT] * 3) == ["3 samples are too few to judge"]


def test_the_table_has_the_first_and_the_last_sample() -> None:
    samples = [FLAT._replace(steps=number) for number in range(1, 101)]
    lines = table(samples).splitlines()
    assert len(lines) <= 26
    assert [line.split()[0] for line in (lines[0], lines[1], lines[-1])] == ["step", "1", "100"]
    assert lines[1].split()[1:] == ["1.0", "400.0", "150.0", "1500.0", "94", "67", "0", "0", "0", "60"]
