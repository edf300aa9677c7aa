# SPDX-License-Identifier: Apache-2.0
"""Actions with collectives of their own: what the others see if a rank exits within one."""

from __future__ import annotations

import os

import pytest

from ckpt_fast.ranks.foreign import run_on_all_ranks
from tests.helpers import RankError, run_ranks


def end_or_fail(rank: int) -> None:
    def action() -> None:
        if rank == 1:
            os._exit(1)
        raise OSError("no answer")

    run_on_all_ranks(action, "the conversion")


def test_nobody_waits_for_a_process_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_TIMEOUT", "1")
    with pytest.raises(RankError, match=r"the conversion: OSError: no answer.*end this job") as failed:
        run_ranks(end_or_fail, 2, fresh=True)
    assert failed.value.errors == {0: "RuntimeError", 1: "ProcessEnded"}
