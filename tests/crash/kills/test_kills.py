# SPDX-License-Identifier: Apache-2.0
"""Training runs are killed at random moments, whole or in part; nothing is lost, and nothing piles up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ckpt_fast import compat
from tests.crash.kills.campaign import Kills
from tests.crash.kills.run import KINDS

SEED = 1


def kill(place: Path, kind: str, ranks: int, kills: int) -> None:
    if KINDS[kind].is_local and not compat.HAVE_RESIL:
        pytest.skip("needs nvidia-resiliency-ext")
    counts = Kills(kind, ranks, str(place), SEED).run(kills)
    sys.stdout.write(f"{kind}, {ranks} ranks: {dict(counts)}\n")
    assert counts["kills"] == kills and counts["while it was at 'save'"] > kills // 4


@pytest.mark.long
@pytest.mark.parametrize(("kind", "ranks"), [("overwriting in the background", 2), ("retention", 1)])
def test_killed_a_few_times(tmp_path: Path, kind: str, ranks: int) -> None:
    kill(tmp_path, kind, ranks, 6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "ranks"),
    [(name, ranks) for ranks in (1, 2) for name, kind in KINDS.items() if ranks >= kind.least_ranks],
)
def test_killed_often(tmp_path: Path, kind: str, ranks: int) -> None:
    kill(tmp_path, kind, ranks, 50)
