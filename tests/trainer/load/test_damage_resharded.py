# SPDX-License-Identifier: Apache-2.0
"""Damaged files, loaded in another layout from parts of items: as saved, or the older checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest

from tests.helpers import run_ranks
from tests.models import Setup
from tests.trainer import training
from tests.trainer.load import damage
from tests.trainer.load.damage import Case, Damage

STEPS = (2, 1)
RESHARDABLE = Setup(distributed=True, reshardable=True)
# Items of several manifest blocks; the optimizer has float32 weights and whole moments on every rank.
LARGE = Setup(hidden=256)


class Layouts(NamedTuple):
    """(ranks, setup) of the run that saves and of the one that loads."""

    saved: tuple[int, Setup]
    loaded: tuple[int, Setup]


LAYOUTS = {
    "tp-2-to-1": Layouts((2, replace(RESHARDABLE, tp=2)), (1, RESHARDABLE)),
    "tp-2-to-dp-2": Layouts((2, replace(RESHARDABLE, tp=2)), (2, RESHARDABLE)),
    "dp-2-to-1": Layouts((2, RESHARDABLE), (1, RESHARDABLE)),
    "1-to-tp-2": Layouts((1, RESHARDABLE), (2, replace(RESHARDABLE, tp=2))),
    "large-1-to-tp-2": Layouts((1, LARGE), (2, replace(LARGE, tp=2))),
    "large-tp-2-to-1": Layouts((2, replace(LARGE, tp=2)), (1, LARGE)),
}


QUICK = ("tp-2-to-1",)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in LAYOUTS],
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Layouts, str]:
    """Return the layouts, and the root of iterations 1 and 2."""
    layouts = LAYOUTS[request.param]
    root = str(tmp_path_factory.mktemp("resharded") / "run")
    run_ranks(training.save_steps, *layouts.saved, root, 2, {}, True)
    return layouts, root


def outcomes(saved: tuple[Layouts, str], damages: list[Damage]) -> list[Case]:
    layouts, root = saved
    return damage.same_on_all(*layouts.loaded, root, STEPS, damages, resharded=True)


def test_flipped_bits_of_every_file(saved: tuple[Layouts, str]) -> None:
    flips = damage.sampled_flips(saved[1], 2, per_file=2, per_item=0)
    assert damage.unwanted(outcomes(saved, flips), "right", "older") == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_flipped_bits_of_every_file_and_item(
    saved: tuple[Layouts, str], record_property: Callable[[str, object], None]
) -> None:
    flips = damage.sampled_flips(saved[1], 2, per_file=100, per_item=8)
    cases = outcomes(saved, flips)
    record_property("outcomes", damage.count(cases))
    assert len(cases) > 1000
    assert damage.unwanted(cases, "right", "older") == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_file_that_is_missing_cut_or_of_another_save(saved: tuple[Layouts, str]) -> None:
    cases = outcomes(saved, damage.whole_file_damages(saved[1], 2, 1))
    assert {case.damage.kind for case in cases} == {"remove", "empty", "cut", "exchange"}
    # Files equal in both iterations, and one of two trackers, are no loss.
    harmless = (
        "metadata.json",
        "run_config.yaml",
        "latest_train_state.pt",
        "latest_checkpointed_iteration.txt",
    )
    assert damage.unwanted(cases, "right", "older") == []
    loss = [case for case in cases if os.path.basename(case.damage.name) not in harmless]
    assert damage.unwanted(loss, "older") == []
