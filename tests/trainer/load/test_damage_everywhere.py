# SPDX-License-Identifier: Apache-2.0
"""Every file of a checkpoint, the large ones too, damaged or exchanged: no wrong values, no mixtures."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.helpers import run_ranks
from tests.models import Setup
from tests.trainer import training
from tests.trainer.load import damage
from tests.trainer.load.damage import Case, Damage

SETUP = Setup()
STEPS = (2, 1)
NEWEST = "iter_0000002"


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.long), 2], ids=["1-rank", "2-ranks"]
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """Return the number of ranks, and the root of iterations 1 and 2 that they saved."""
    root = str(tmp_path_factory.mktemp("everywhere") / "run")
    run_ranks(training.save_steps, request.param, SETUP, root, 2, {}, True)
    return request.param, root


def outcomes(saved: tuple[int, str], damages: list[Damage]) -> list[Case]:
    return damage.same_on_all(saved[0], SETUP, saved[1], STEPS, damages)


def names(saved: tuple[int, str]) -> list[str]:
    return [name for name in damage.files_of(saved[1], 2) if NEWEST in name]


def test_a_file_that_is_missing_cut_or_of_another_save(saved: tuple[int, str]) -> None:
    assert len(names(saved)) >= 6
    damages = [each for each in damage.whole_file_damages(saved[1], 2, 1) if NEWEST in each.name]
    exchanged = [each.name for each in damages if each.kind == "exchange"]
    assert exchanged == names(saved)
    # The seal and the run configuration are the same in both.
    equal = [
        Damage("exchange", name, name.replace(NEWEST, "iter_0000001"))
        for name in names(saved)
        if os.path.basename(name) in ("metadata.json", "run_config.yaml")
    ]
    assert damage.unwanted(outcomes(saved, [each for each in damages if each not in equal]), "older") == []
    assert damage.unwanted(outcomes(saved, equal), "right", "older") == []


def test_flipped_bits_of_every_file(saved: tuple[int, str]) -> None:
    flips = damage.sampled_flips(saved[1], 2, per_file=3, per_item=0)
    assert damage.unwanted(outcomes(saved, flips), "right", "older") == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_flipped_bits_of_every_file_and_item(
    saved: tuple[int, str], record_property: Callable[[str, object], None]
) -> None:
    cases = outcomes(saved, damage.sampled_flips(saved[1], 2, per_file=100, per_item=8))
    record_property("outcomes", damage.count(cases))
    assert len(cases) > 1000
    assert damage.unwanted(cases, "right", "older") == []
