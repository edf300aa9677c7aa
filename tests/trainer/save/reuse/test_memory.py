# SPDX-License-Identifier: Apache-2.0
"""What is kept between saves of a structure that is promised to stay: no tensor, and little for each."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_ranks
from tests.models import Run, Setup
from tests.trainer.save.reuse import mutations
from tests.trainer.save.reuse.twins import Twins


def tensors_kept(rank: int, root: str, in_background: bool) -> list[str]:
    """Return the names of what is still alive when only the context is kept."""
    with Run(Setup(layers=2, distributed=True, bf16=True), async_strategy="mcore") as run:
        twins = Twins(run, root)
        for _ in range(3):
            run.train(1)
            reused = twins.save(in_background)
        assert reused
        model = mutations.model_of(run)
        alive: dict[str, weakref.ref[Any]] = {
            name: weakref.ref(each) for name, each in [*model.named_parameters(), *model.named_modules()]
        }
        for number, state in enumerate(mutations.states_of(run)):
            alive |= {f"{number}.{name}": weakref.ref(value) for name, value in state.items()}
        context = twins.context
        assert context
    del run, twins, model, state
    gc.collect()
    alive.pop("rotary_pos_emb")  # Megatron-Core caches what it computes, together with itself
    return [name for name, reference in alive.items() if reference() is not None]


@pytest.mark.parametrize("in_background", [False, True])
def test_context_keeps_no_tensor_alive(tmp_path: Path, in_background: bool) -> None:
    assert run_ranks(tensors_kept, 1, str(tmp_path), in_background) == [[]]
