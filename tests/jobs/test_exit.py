# SPDX-License-Identifier: Apache-2.0
"""What happens to a save that is in flight when the program ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.jobs.conftest import Exits
from tests.pipeline.layouts import same
from tests.pipeline.save.test_save import assert_not_published, loaded


@pytest.mark.parametrize("how", ["normally", pytest.param("exception", marks=pytest.mark.long)])
def test_one_rank_finishes_its_save(exits: Exits, tmp_path: Path, how: str) -> None:
    (done,) = exits(tmp_path, how)
    assert done.status == (how == "exception"), done.stderr
    assert "finalized" in done.stdout
    assert f"finished the save to {tmp_path}/second while the process was ending" in done.stderr
    expected = torch.zeros(1, 100_000)
    assert same(loaded(tmp_path / "second", "w", torch.ones(1, 100_000)), expected)


@pytest.mark.parametrize("how", ["normally", pytest.param("exception", marks=pytest.mark.long)])
def test_several_ranks_abandon_it_and_report_it(exits: Exits, tmp_path: Path, how: str) -> None:
    message = (
        f"this process ends before the save to {tmp_path}/second was finalized: it is abandoned, and the"
    )
    for done in exits(tmp_path, how, ranks=2):
        assert done.status == (how == "exception"), done.stderr
        assert "finalized" not in done.stdout
        assert message in done.stderr
    assert_not_published(tmp_path / "second")
    assert (tmp_path / "first" / "metadata.json").exists()


def test_sigterm_is_like_a_crash(exits: Exits, tmp_path: Path) -> None:
    """Without a handler of the program's own, nobody can finish it: the previous checkpoint stays."""
    (done,) = exits(tmp_path, "SIGTERM")
    assert done.status == -signal.SIGTERM
    assert_not_published(tmp_path / "second")
    assert (tmp_path / "first" / "metadata.json").exists()
