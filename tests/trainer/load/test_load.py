# SPDX-License-Identifier: Apache-2.0
"""What ``load_checkpoint`` restores under which configuration, and which checkpoint it chooses."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt_fast.checkpointing import _load_base_checkpoint, _load_model_weights_from_checkpoint
from ckpt_fast.compat import ShardedObject, ShardedTensor, get_pg_collection
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.doors.megatron.load_strategy import FastLoadStrategy
from ckpt_fast.trainer.load import weights as weights_module
from tests.helpers import RankError, run_ranks
from tests.models import FLOPS, Run, Setup, differences, other
from tests.trainer import training
from tests.trainer.training import ALL, Loaded

SETUP = Setup(bf16=True, distributed=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save iterations 1 and 2 on one rank."""
    root = str(tmp_path_factory.mktemp("load") / "run")
    run_ranks(training.save_steps, 1, SETUP, root, 2, {})
    return root


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a checkpoint without optimizer, scheduler and RNG."""
    root = str(tmp_path_factory.mktemp("bare") / "run")
    run_ranks(training.save_steps, 1, SETUP, root, 1, {"save_optim": False, "save_rng": False})
    return root


def load(root: str, step: int = 2, options: dict[str, Any] | None = None, **config: Any) -> Loaded:
    (loaded,) = run_ranks(training.load, 1, SETUP, root, step, {"load": root, **config}, options or {})
    return loaded


def test_everything_is_restored(root: str) -> None:
    assert load(root) == Loaded((2, FLOPS), restored=ALL, kept=set())


@pytest.mark.parametrize("options", [{"checkpointing_context": {}}, {"strict": False}])
def test_everything_is_restored_with_other_arguments(root: str, options: dict[str, Any]) -> None:
    assert load(root, options=options).restored == ALL


@pytest.mark.parametrize("config", [{"save_optim": False, "save_rng": False}, {"fully_parallel_load": True}])
def test_save_options_do_not_limit_a_load(root: str, config: dict[str, Any]) -> None:
    assert load(root, **config).restored == ALL


@pytest.mark.parametrize(
    "strictness",
    [
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ],
)
def test_every_strictness_loads_what_fits(root: str, strictness: str) -> None:
    # "missing" are the train state's neighbours that a scaffold never requests: there are none here.
    assert load(root, dist_ckpt_strictness=strictness).restored == ALL


def load_what_does_not_fit(rank: int, setup: Setup, config: dict[str, Any]) -> tuple[str, str, list[str]]:
    """Return the error and what the load has changed."""
    with Run(setup, **config) as run:
        run.train(1)
        before = {**run.fingerprint(), "step": run.state.train_state.step}
        kind, message = training.error_of(run.load)
        return kind, message, differences(before, {**run.fingerprint(), "step": run.state.train_state.step})


STRICTNESS = ["assume_ok_unexpected", "log_unexpected", "log_all", "ignore_all", "return_all"]


@pytest.mark.parametrize("strictness", STRICTNESS)
@pytest.mark.parametrize("lacking", ["decoder.final_layernorm", "a layer"])
def test_a_load_that_is_refused_has_changed_nothing(
    root: str, tmp_path: Path, lacking: str, strictness: str
) -> None:
    directory = shutil.copytree(root, tmp_path / "run")
    setup = dataclasses.replace(other(SETUP), layers=2)
    if lacking != "a layer":
        setup = other(SETUP)
        FastLoadStrategy().remove_sharded_tensors(str(directory / "iter_0000002"), lacking)
    config = {"load": str(directory), "dist_ckpt_strictness": strictness, "load_optim": False}
    ((kind, message, changed),) = run_ranks(load_what_does_not_fit, 1, setup, config)
    assert (kind, changed) == ("CheckpointMismatchError", [])
    assert ("decoder.layers" if lacking == "a layer" else lacking) in message


@pytest.mark.parametrize("strictness", ["log_all", "ignore_all"])
@pytest.mark.parametrize("section", ["optimizer", "rng_state"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_section_that_is_missing_is_refused_before_anything_is_changed(
    root: str, tmp_path: Path, section: str, strictness: str, ranks: int
) -> None:
    directory = shutil.copytree(root, tmp_path / "run") / "iter_0000002"
    FastLoadStrategy().remove_sharded_tensors(str(directory), section)
    config = {"load": str(tmp_path / "run"), "dist_ckpt_strictness": strictness}
    for kind, message, changed in run_ranks(load_what_does_not_fit, ranks, other(SETUP), config):
        assert (kind, changed) == ("CheckpointMismatchError", []), message
        assert f"has no {'RNG' if section == 'rng_state' else section} state. Nothing was loaded" in message


def save_without_scheduler(rank: int, root: str) -> None:
    with Run(SETUP, save=root) as run:
        run.train(1)
        run.scheduler = None
        run.save()


def test_a_scheduler_without_state_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    run_ranks(save_without_scheduler, 1, str(tmp_path))
    ((kind, message, changed),) = run_ranks(load_what_does_not_fit, 1, other(SETUP), {"load": str(tmp_path)})
    assert (kind, changed) == ("CheckpointMismatchError", []), message
    assert "has no scheduler state. Nothing was loaded" in message


class Scheduler:
    """Not Megatron-Core's: its steps are not added up."""

    num_steps = 5

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def load_another_scheduler(rank: int, root: str) -> int:
    with Run(other(SETUP), load=root) as run:
        run.scheduler = Scheduler()
        run.load()
        return run.scheduler.num_steps


def test_a_scheduler_that_is_not_megatrons_keeps_its_steps(root: str) -> None:
    assert run_ranks(load_another_scheduler, 1, root) == [5]


def test_an_explicit_step_wins_over_the_tracker(root: str) -> None:
    assert load(root, step=1, ckpt_step=1) == Loaded((1, FLOPS), restored=ALL, kept=set())


@pytest.mark.parametrize("trailing", ["", "/"])
def test_one_iteration_directory(root: str, trailing: str) -> None:
    directory = os.path.join(root, "iter_0000001") + trailing
    assert load(root, step=1, load=directory, ckpt_step=2).restored == ALL


def test_megatron_lm_tracker_alone(root: str, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "run")
    (tmp_path / "run/latest_train_state.pt").unlink()
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("1")
    assert load(root, step=1, load=str(tmp_path / "run")).restored == ALL


def test_nothing_to_load_changes_nothing(tmp_path: Path, root: str) -> None:
    assert load(root, load=str(tmp_path)) == Loaded((0, 0), restored=set(), kept=ALL)
    assert load(root, load=None) == Loaded((0, 0), restored=set(), kept=ALL)


def test_nothing_to_load_can_end_the_run(tmp_path: Path, root: str) -> None:
    with pytest.raises(RankError) as caught:
        load(root, load=str(tmp_path), exit_on_missing_checkpoint=True)
    assert caught.value.errors == {0: "SystemExit"}
    assert str(tmp_path) in str(caught.value) or "exit" in str(caught.value)


@pytest.mark.parametrize("strictness", ["assume_ok_unexpected", "raise_all"])
def test_skipping_model_and_optimizer(root: str, strictness: str) -> None:
    options = {"skip_load_to_model_and_opt": True}
    loaded = load(root, options=options, dist_ckpt_strictness=strictness)
    assert loaded == Loaded(
        (2, FLOPS), restored={"scheduler", "rng", "train_state"}, kept={"model", "optimizer"}
    )
    kept = load(root, options=options, finetune=True).kept
    assert kept == {"model", "optimizer", "scheduler", "rng"}


def test_what_was_not_saved_stays_as_it_is(bare: str) -> None:
    loaded = load(bare, step=1)
    assert loaded.result == (1, FLOPS)
    assert loaded.restored == {"model", "train_state"}
    assert loaded.kept == {"scheduler", "rng"}


def fresh_optimizer_follows_the_weights(rank: int, root: str, config: dict[str, Any]) -> list[float]:
    """Load without optimizer state; return what changes when master weights are copied into the model."""
    with Run(other(SETUP), load=root, **config) as run:
        run.train(1)
        run.load()
        loaded = run.fingerprint()
        run.optimizer.zero_grad()
        # Copies the master weights into the model.
        for member in run.optimizer.chained_optimizers:
            member._copy_main_params_to_model_params()
        run.model[0].start_param_sync(force_sync=True)
        return differences(loaded, run.fingerprint())


@pytest.mark.parametrize("config", [{"load_optim": False}, {"finetune": True}])
def test_master_weights_follow_the_loaded_weights(root: str, config: dict[str, Any]) -> None:
    assert run_ranks(fresh_optimizer_follows_the_weights, 1, root, config) == [[]]


def test_pretrained_checkpoint_is_the_fallback(root: str, tmp_path: Path) -> None:
    loaded = load(root, load=str(tmp_path), pretrained_checkpoint=root)
    assert loaded.result[0] == 0
    assert loaded.restored == {"model"}
    # Once the run has a checkpoint of its own, it is resumed from that.
    shutil.copytree(root, tmp_path / "run")
    assert load(root, load=str(tmp_path / "run"), pretrained_checkpoint="/nowhere").restored == ALL


def test_recovery_checkpoint_goes_before_an_older_persistent_one(root: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(root, run / "non_persistent")
    for name in ("iter_0000001", "latest_train_state.pt", "latest_checkpointed_iteration.txt"):
        source = Path(root) / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, run / name)
    (run / "latest_train_state.pt").unlink()
    (run / "latest_checkpointed_iteration.txt").write_text("1")

    assert load(root, step=1, load=str(run)).restored == ALL
    config = {"load": str(run), "non_persistent_ckpt_type": "global"}
    assert load(root, step=2, **config).restored == ALL
    assert load(root, step=1, ckpt_step=1, **config).restored == ALL
    # Not even a pretrained checkpoint is preferred.
    shutil.rmtree(run / "iter_0000001")
    (run / "latest_checkpointed_iteration.txt").unlink()
    assert load(root, step=2, pretrained_checkpoint=root, **config).restored == ALL


def load_weights_alone(rank: int, root: str, directory: str) -> tuple[set[str], list[str]]:
    with Run(other(SETUP)) as run:
        run.train(1)
        before = run.fingerprint()
        state_dict = _load_model_weights_from_checkpoint(directory, run.model, return_state_dict=True)
        assert not differences(before, run.fingerprint(), "model")
        assert _load_model_weights_from_checkpoint(directory, run.model) is None
        wrong = differences(training.saved_fingerprint(root, 2, rank), run.fingerprint())
        changed = training.parts(differences(before, run.fingerprint()))
        assert set(state_dict) >= {"model"}
        return changed, [name for name in wrong if name.startswith("model")]


def test_loading_weights_alone(root: str) -> None:
    assert run_ranks(load_weights_alone, 1, root, os.path.join(root, "iter_0000002")) == [({"model"}, [])]


def load_weights_and_watch(rank: int, directory: str) -> list[str]:
    events: list[str] = []

    def note(event: str) -> Any:
        return lambda *_: events.append(event)

    with Run(other(SETUP)) as run, pytest.MonkeyPatch.context() as patch:
        gpu = SimpleNamespace(is_available=lambda: True, empty_cache=note("GPU memory released"))
        patch.setattr(weights_module, "torch", SimpleNamespace(cuda=gpu))
        patch.setattr(weights_module, "gc", SimpleNamespace(collect=note("garbage collected")))
        patch.setattr(weights_module, "barrier_if_distributed", note("barrier"))
        _load_model_weights_from_checkpoint(directory, run.model)
    return events


def test_weights_alone_leave_no_memory_behind_when_the_next_collective_begins(root: str) -> None:
    (events,) = run_ranks(load_weights_and_watch, 1, os.path.join(root, "iter_0000002"))
    assert events == ["garbage collected", "GPU memory released", "barrier"]


def keys_that_do_not_match(rank: int, directory: str) -> tuple[Any, Any]:
    with Run(other(SETUP)) as run:
        scaffold = {"model": run.sharded_state_dict(is_loading=True)["model"]}
        scaffold["model"]["decoder.extra"] = scaffold["model"].pop("output_layer.weight")
        scaffold["model"]["decoder.extra"].key = "decoder.extra"
        _, missing, unexpected = torch_dist.load(scaffold, directory, strict="return_all")
        return missing, unexpected


def test_mismatching_keys_are_returned(root: str) -> None:
    ((missing, unexpected),) = run_ranks(keys_that_do_not_match, 1, os.path.join(root, "iter_0000002"))
    assert "output_layer.weight" in missing
    assert "decoder.extra" in unexpected


def weights_with_every_strictness(rank: int, directory: str) -> list[Any]:
    """Return result type, whether it has the model, and the plain call's result, for each strictness."""
    found = []
    with Run(other(SETUP)) as run:
        for strictness in ("assume_ok_unexpected", "return_unexpected", "return_all"):
            run.train(1)
            before = run.fingerprint()
            options = {"dist_ckpt_strictness": strictness}
            returned = _load_model_weights_from_checkpoint(
                directory, run.model, return_state_dict=True, **options
            )
            state_dict = returned[0] if isinstance(returned, tuple) else returned
            assert not differences(before, run.fingerprint(), "model")
            nothing = _load_model_weights_from_checkpoint(directory, run.model, **options)
            found.append((type(returned).__name__, "model" in state_dict, nothing))
    return found


def test_weights_alone_with_mismatches_returned(root: str) -> None:
    """Megatron-Core then returns a tuple; without ``return_state_dict`` it must not reach the model."""
    directory = os.path.join(root, "iter_0000002")
    (found,) = run_ranks(weights_with_every_strictness, 1, directory)
    assert found == [("dict", True, None), ("tuple", True, None), ("tuple", True, None)]


def load_modules_apart(rank: int, sources: list[str], is_mimo: bool) -> list[tuple[str, str]]:
    """Load modules that differ by rank: rank 0 does not request a tensor that rank 1 has a replica of."""
    errors = []
    config = {"non_persistent_ckpt_type": "global", "fully_parallel_save": False}
    with Run(other(SETUP), **config) as run:
        for source in sources:
            scaffold = {"model": run.sharded_state_dict(is_loading=True)["model"]}
            if rank == 0:
                del scaffold["model"]["output_layer.weight"]
            errors.append(
                training.error_of(
                    lambda source=source, scaffold=scaffold: _load_base_checkpoint(
                        source,
                        run.checkpoint,
                        sharded_state_dict=scaffold,
                        is_megatron_mimo=is_mimo,
                        pg_collection=get_pg_collection(run.model),
                    )[1]
                )
            )
    return errors


def test_modules_on_ranks_of_their_own_load_from_every_source(root: str, tmp_path: Path) -> None:
    """A root, one iteration's directory, and a recovery checkpoint."""
    shutil.copytree(root, tmp_path / "run/non_persistent")
    iteration = "iter_0000002"
    sources = [root, os.path.join(root, iteration), str(tmp_path / "run")]
    loaded = [os.path.join(root, iteration)] * 2 + [str(tmp_path / "run/non_persistent" / iteration)]
    for errors in run_ranks(load_modules_apart, 2, sources, True):
        assert errors == [("no error", path) for path in loaded]
    for errors in run_ranks(load_modules_apart, 2, sources, False):
        assert [kind for kind, _ in errors] == ["CheckpointMismatchError"] * 3


class WithExtraState(torch.nn.Linear):
    """A module with extra state in its checkpoint, as Transformer Engine's have."""

    def sharded_state_dict(self, prefix: str = "", **_: Any) -> dict[str, Any]:
        name = f"layers.{self.out_features}"
        return {
            "weight": ShardedTensor.from_rank_offsets(f"{name}.weight", self.weight),
            "_extra_state": ShardedObject(f"{name}._extra_state", {"scale": 1.0}, (1,), (0,)),
        }


def test_extra_state_of_every_chunk_is_left_out_of_weights_alone(tmp_path: Path) -> None:
    chunks = [WithExtraState(3, 4, bias=False), WithExtraState(3, 5, bias=False)]
    content = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    job = torch_dist.start_save(content, str(tmp_path), torch_dist.FastSaveStrategy())
    job.write()
    job.commit()
    loaded = [WithExtraState(3, 4, bias=False), WithExtraState(3, 5, bias=False)]
    state_dict = _load_model_weights_from_checkpoint(str(tmp_path), loaded, return_state_dict=True)
    assert {key: set(part) for key, part in state_dict.items() if key.startswith("model")} == {
        "model0": {"weight"},
        "model1": {"weight"},
    }
    _load_model_weights_from_checkpoint(str(tmp_path), loaded)
    assert [torch.equal(a.weight, b.weight) for a, b in zip(chunks, loaded, strict=True)] == [True, True]
