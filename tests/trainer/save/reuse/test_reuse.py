# SPDX-License-Identifier: Apache-2.0
"""Saves of a structure that is promised to stay: they collect less, and never save an old or a wrong byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from tests.helpers import run_ranks
from tests.models import Run, Setup, differences, identical, megatron_on_cpu, other
from tests.trainer.save.reuse import mutations
from tests.trainer.save.reuse.mutations import Mutation
from tests.trainer.save.reuse.twins import Twins

pytestmark = pytest.mark.usefixtures("no_fsync")
SETUPS = {
    "dense": Setup(layers=2, distributed=True),
    "bf16": Setup(layers=2, distributed=True, bf16=True),
    "not parallel": Setup(layers=2, distributed=True, bf16=True, parallel_save=False),
    "experts": Setup(experts=2, distributed=True, bf16=True),
    "gated experts": Setup(experts=2, distributed=True, bf16=True, glu=(None, 4)),
    "gated": Setup(layers=2, distributed=True, glu=(None, 4), parallel_save=False),
    "not distributed": Setup(layers=2, bf16=True),
    "tensor parallel": Setup(layers=2, tp=2, distributed=True, bf16=True),
}


def run_of(setup: Setup) -> Run:
    """Return a run that saves its optimizer where that can be done with interleaved rows, and be reused."""
    return Run(setup, async_strategy="mcore", save_optim=setup.distributed and setup.glu == (None, None))


def train(run: Run) -> None:
    """Change all values in place, as training does, whatever was done to the run."""
    run.state.train_state.step += 1
    run.scheduler.step(increment=1)
    model = mutations.model_of(run)
    with torch.no_grad():
        for tensor in [*model.parameters(), *filter(torch.is_floating_point, model.buffers())]:
            tensor.add_(0.001)
        for adam in mutations.adams(run):
            for parameter, state in adam.state.items():
                parameter.add_(0.01)
                for name, value in state.items():
                    value.add_(1 if name == "step" else 0.01)


def save_in_modes(rank: int, root: str, setup: Setup, modes: list[bool]) -> list[bool]:
    """Train and save in the background or not; return which saves collected objects only."""
    reused = []
    with run_of(setup) as run:
        twins = Twins(run, root)
        for in_background in modes:
            run.train(1)
            reused.append(twins.save(in_background, lambda: run.train(1)))
    return reused


@pytest.mark.parametrize(("kind", "ranks"), [("dense", 1), ("experts", 2)])
def test_unchanged_structure_is_reused_by_saves_of_either_kind(tmp_path: Path, kind: str, ranks: int) -> None:
    modes = [False, False, True, True, False, False]
    expected = [False, True, False, True, False, True]
    assert run_ranks(save_in_modes, ranks, str(tmp_path), SETUPS[kind], modes) == [expected] * ranks


def test_rank_without_anything_to_save(tmp_path: Path) -> None:
    assert (
        run_ranks(save_in_modes, 2, str(tmp_path), SETUPS["gated"], [False] * 3) == [[False, True, True]] * 2
    )


def load_reused(rank: int, root: str) -> list[str]:
    """Return what a run, and stock code, load otherwise than it was at the third save."""
    with Run(SETUPS["bf16"]) as run:
        twins = Twins(run, root)
        for _ in range(3):
            run.train(1)
            reused = twins.save()
        assert reused
        expected, directory = run.fingerprint(), twins.directory("kept")
        values = {
            name: tensor.clone()
            for name, tensor in mutations.model_of(run).state_dict().items()
            if tensor is not None
        }
    with Run(other(SETUPS["bf16"]), load=os.path.dirname(directory)) as run:
        run.load()
        wrong = differences(expected, run.fingerprint())
    with Run(other(SETUPS["bf16"])) as run, megatron_on_cpu():
        loaded = dist_checkpointing.load(run.sharded_state_dict(is_loading=True), directory)["model"]
        return wrong + [name for name, value in values.items() if not identical(value, loaded[name])]


def test_reused_save_is_loaded_by_ckpt_fast_and_by_stock_code(tmp_path: Path) -> None:
    assert run_ranks(load_reused, 2, str(tmp_path)) == [[], []]


def change(rank: int, root: str, setup: Setup, changes: list[Mutation]) -> dict[str, list[bool]]:
    """Save twice after each change; return which saves collected objects only."""
    reused = {}
    with run_of(setup) as run:
        twins = Twins(run, root)
        train(run)
        twins.save()
        for mutation in changes:
            # The same parameters, whatever else is changed: not every one is saved by every rank.
            mutation(run, Random((*KEPT, *CHANGED).index(mutation)))
            reused[mutation.__name__] = []
            for _ in range(2):
                train(run)
                reused[mutation.__name__].append(twins.save())
    return reused


KEPT = (mutations.nothing, mutations.layers_frozen)
CHANGED = (
    mutations.parameter_replaced,
    mutations.memory_replaced,
    mutations.data_swapped,
    mutations.parameters_swapped,
    mutations.parameters_tied,
    mutations.parameters_untied,
    mutations.module_replaced,
    mutations.moments_swapped,
    mutations.states_swapped,
    mutations.state_tensor_replaced,
    mutations.state_recreated,
    mutations.loaded,
    mutations.buffer_changed,
    mutations.saving_of_optimizer_switched,
    mutations.saving_of_rng_switched,
)


# Of a model, of an optimizer, of both at once, and of what is saved.
QUICK = (
    mutations.parameter_replaced,
    mutations.parameters_tied,
    mutations.parameters_untied,
    mutations.moments_swapped,
    mutations.state_recreated,
    mutations.loaded,
    mutations.saving_of_rng_switched,
)
OTHERS = tuple(mutation for mutation in CHANGED if mutation not in QUICK)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(2, (*KEPT, *QUICK), id="2-quick"),
        pytest.param(2, OTHERS, id="2-others", marks=pytest.mark.long),
        pytest.param(1, (*KEPT, *CHANGED), id="1-all", marks=pytest.mark.long),
    ],
)
def test_structural_change_is_saved_and_reused_again(
    tmp_path: Path, ranks: int, changes: tuple[Mutation, ...]
) -> None:
    expected = {mutation.__name__: [mutation in KEPT, True] for mutation in changes}
    found = run_ranks(change, ranks, str(tmp_path), SETUPS["bf16"], list(changes))
    assert found[0] == expected
    # The state of random numbers is another rank's.
    if mutations.saving_of_rng_switched in changes:
        expected["saving_of_rng_switched"] = [True, True]
    assert found[1:] == [expected] * (ranks - 1)


def persistence_swapped(model: Any) -> None:
    model.register_buffer("first", model.first, persistent=False)
    model.register_buffer("second", model.second)


def class_replaced(model: Any) -> None:
    class WithoutFirst(type(model)):  # type: ignore[misc]
        def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            found = super().sharded_state_dict(*args, **kwargs)
            return {name: value for name, value in found.items() if not name.endswith("first")}

    model.__class__ = WithoutFirst


def hook_replaced(model: Any) -> None:
    norm = model.decoder.final_layernorm
    norm.hook.remove()
    norm.register_state_dict_post_hook(lambda _, state, prefix, __: state.__delitem__(f"{prefix}weight"))


def change_what_is_saved(rank: int, root: str, change: Callable[[Any], None]) -> list[bool]:
    """Change which of the same tensors are saved, between the second save and the third."""
    reused = []
    with run_of(SETUPS["bf16"]) as run:
        model, twins = mutations.model_of(run), Twins(run, root)
        model.register_buffer("first", torch.ones(5))
        model.register_buffer("second", torch.ones(6), persistent=False)
        norm = model.decoder.final_layernorm
        norm.hook = norm.register_state_dict_post_hook(
            lambda _, state, prefix, __: state.__delitem__(f"{prefix}bias")
        )
        for number in range(4):
            train(run)
            if number == 2:
                change(model)
            reused.append(twins.save())
    return reused


@pytest.mark.parametrize("change", [persistence_swapped, class_replaced, hook_replaced])
def test_other_tensors_are_saved_of_the_same(tmp_path: Path, change: Callable[[Any], None]) -> None:
    assert run_ranks(change_what_is_saved, 1, str(tmp_path), change) == [[False, True, False, True]]


def change_at_random(rank: int, root: str, setup: Setup, seed: int, saves: int) -> None:
    chance, log = Random(seed), []
    with run_of(setup) as run:
        twins = Twins(run, root)
        train(run)
        try:
            while twins.saves < saves:
                log.append(mutations.apply(run, chance))
                for _ in range(chance.choice([1, 2, 3])):
                    if chance.random() < 0.7:
                        train(run)
                    in_background = chance.random() < 0.4
                    reused = twins.save(in_background, lambda: train(run))
                    log.append(f"{twins.saves}{' in background' * in_background}{' reused' * reused}")
        except BaseException as error:
            error.add_note(f"seed {seed}, save {twins.saves}, after: {log}")
            raise


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", SETUPS)
def test_random_changes(tmp_path: Path, kind: str, ranks: int, seed: int) -> None:
    if ranks < SETUPS[kind].tp:
        pytest.skip("needs more ranks")
    run_ranks(change_at_random, ranks, str(tmp_path), SETUPS[kind], seed, 14)
