# SPDX-License-Identifier: Apache-2.0
"""Hundreds of damages of each kind of checkpoint; `make fuzz` has more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.campaign import run
from tests.fuzz.checkpoints import KINDS

pytestmark = [pytest.mark.usefixtures("no_fsync"), pytest.mark.filterwarnings("ignore")]


COUNT = 500


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints(
    native_impl: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAST_IO_THREADS", "2")
    first = 0 if native_impl == "engine" else COUNT  # the twin has other cases
    tally = run(kind, tmp_path, range(first, first + COUNT // 2), seed=0)
    assert tally.problems == []
    assert tally.outcomes["slice refused"] > COUNT // 20 and tally.outcomes["slice right"] > 0
