# SPDX-License-Identifier: Apache-2.0
"""The stand-in of an optimizer says what the optimizer says of itself, but for the state of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckpt_fast import compat
from tests.helpers import run_ranks
from tests.models import Run, Setup

DISTRIBUTED = Setup(distributed=True)


def members(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def both(optimizer: Any) -> list[list[dict[str, Any]]]:
    stand_in = compat.without_parameter_state(optimizer)
    assert stand_in is not None
    return [[member.state_dict() for member in members(each)] for each in (optimizer, stand_in)]


def compare(rank: int) -> list[str]:
    """Compare in several situations; return what differs, or is not refused."""
    wrong = []
    with Run(DISTRIBUTED) as run:
        run.train(2)
        adam = members(run.optimizer)[0].optimizer
        states = list(adam.state.values())

        def compare(situation: str) -> None:
            own, stand_ins = both(run.optimizer)
            if own != stand_ins:
                wrong.append(situation)

        compare("as it is")
        assert own_step(run) == 2
        adam.add_param_group({**adam.param_groups[0], "params": [], "lr": 0.25})
        compare("an empty group")
        kept = states[0]["step"].clone()
        states[0]["step"] += 1
        for each in (run.optimizer, compat.without_parameter_state(run.optimizer)):
            try:
                members(each)[0].state_dict()
                wrong.append("steps that differ")
            except AssertionError:
                pass
        states[0]["step"].copy_(kept)
        counts: list[int] = []
        adam.register_state_dict_post_hook(lambda _, state: counts.append(len(state["state"])))
        compare("a hook")
        assert counts == [len(states)] * 2
    return wrong


def own_step(run: Run) -> float:
    step: float = members(run.optimizer)[0].state_dict()["optimizer"]["param_groups"][0]["step"]
    return step


def test_the_stand_in_says_the_same() -> None:
    assert run_ranks(compare, 1) == [[]]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_other_optimizers_have_none(kind: Any) -> None:
    assert compat.without_parameter_state(kind([torch.nn.Parameter(torch.zeros(1))])) is None
