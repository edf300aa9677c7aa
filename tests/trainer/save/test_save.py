# SPDX-License-Identifier: Apache-2.0
"""What ``save_checkpoint`` writes, when it becomes visible, and what it leaves behind."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from ckpt_fast import compat
from ckpt_fast.callbacks import CallbackContext, CallbackManager
from ckpt_fast.checkpointing import load_checkpoint, maybe_finalize_async_save, save_checkpoint
from ckpt_fast.doors.megatron.common_state import load_common_state_dict
from tests.helpers import RankError, run_ranks
from tests.interop.saved import read_with_dcp
from tests.models import FLOPS, Run, Setup, differences, identical, other
from tests.trainer import training
from tests.trainer.training import error_of, iterations, require, tracked

SETUP = Setup(bf16=True, distributed=True)


def test_files_around_the_payload(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    run_ranks(training.save_steps, 2, SETUP, root, 2, {})
    assert tracked(root) == (2, 2)
    assert iterations(root) == [1, 2]
    for step in (1, 2):
        directory = Path(root) / f"iter_{step:07d}"
        train_state = torch.load(directory / "train_state.pt", weights_only=True)
        assert train_state["step"] == step
        assert train_state["consumed_train_samples"] == 4 * step
        # More digits than single precision has.
        assert train_state["floating_point_operations_so_far"].item() == FLOPS
        run_config = yaml.safe_load((directory / "run_config.yaml").read_text())
        assert run_config["model"]["tensor_model_parallel_size"] == 1
        assert run_config["checkpoint"]["save"] == root
    # No trace of temporary files.
    assert [path for path in Path(root).rglob("*") if "partial" in path.name or "tmp" in path.name] == []


def save_twice_with_a_context(rank: int, root: str, config: dict[str, Any]) -> list[str]:
    context: dict[str, Any] = {}
    with Run(SETUP, save=root, **config) as run:
        run.train(1)
        run.save(checkpointing_context=context)
        strategy = context["save_strategy"]
        run.train(1)
        run.save(checkpointing_context=context)
        assert context["save_strategy"] is strategy
        expected = run.fingerprint()
    with Run(other(SETUP), load=root) as run:
        run.load(checkpointing_context=context)
        assert context["load_strategy"] is not None
        return differences(expected, run.fingerprint())


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "rank-0"])
def test_strategy_is_kept_between_saves(tmp_path: Path, parallel: bool) -> None:
    config = {"ckpt_assume_constant_structure": True, "fully_parallel_save": parallel}
    assert run_ranks(save_twice_with_a_context, 2, str(tmp_path), config) == [[], []]


def test_parallel_save_shares_the_writing(tmp_path: Path) -> None:
    sizes = {}
    for parallel in (True, False):
        root = str(tmp_path / str(parallel))
        run_ranks(training.save_steps, 2, Setup(), root, 1, {"fully_parallel_save": parallel})
        files = Path(root).glob("iter_0000001/*.distcp")
        sizes[parallel] = {path.name: path.stat().st_size for path in files}
    assert sizes[False].keys() == {"__0_0.distcp"}
    assert sizes[True].keys() == {"__0_0.distcp", "__1_0.distcp"}
    assert min(sizes[True].values()) > 0.3 * sum(sizes[True].values())


def overwrite(rank: int, root: str) -> list[str]:
    with Run(SETUP, save=root, load=root) as run:
        run.train(1)
        run.save()
        if rank == 0:
            directory = Path(root) / "iter_0000001"
            # Left by a run on more ranks, and the user's own file.
            (directory / "__7_0.distcp").write_bytes(b"old")
            (directory / "notes.txt").write_text("mine")
        torch.distributed.barrier()
        run.train(1)
        run.state.train_state.step = 1
        run.save()
        expected = run.fingerprint()
        run.train(1)
        run.load()
        return differences(expected, run.fingerprint())


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    assert run_ranks(overwrite, 2, str(tmp_path)) == [[], []]
    names = {path.name for path in (tmp_path / "iter_0000001").iterdir()}
    assert "notes.txt" in names
    assert "__7_0.distcp" not in names


@pytest.mark.parametrize("keep, left", [(-1, [1, 2, 3]), (None, [1, 2, 3]), (2, [2, 3]), (1, [3]), (0, [3])])
def test_retention(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    root = str(tmp_path / "run")
    run_ranks(training.save_steps, 1, SETUP, root, 3, {"most_recent_k": keep})
    # Not even 0 deletes what the tracker names.
    assert iterations(root) == left
    assert tracked(root) == (3, 3)


def save_for_recovery(rank: int, root: str, config: dict[str, Any]) -> None:
    with Run(SETUP, save=root, non_persistent_ckpt_type="global", **config) as run:
        run.train(1)
        run.save()
        for _ in range(3):
            run.train(1)
            run.save(non_persistent_ckpt=True)


def test_non_persistent_checkpoints_have_a_place_of_their_own(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    run_ranks(save_for_recovery, 1, root, {})
    assert (iterations(root), tracked(root)) == ([1], (1, 1))
    recovery = os.path.join(root, "non_persistent")
    # The second newest is kept until the newest is known to be complete.
    assert (iterations(recovery), tracked(recovery)) == ([3, 4], (4, 4))

    elsewhere = str(tmp_path / "elsewhere")
    config = {"non_persistent_global_ckpt_dir": elsewhere, "most_recent_k": 1}
    run_ranks(save_for_recovery, 1, str(tmp_path / "second"), config)
    assert (iterations(elsewhere), tracked(elsewhere)) == ([4], (4, 4))
    assert not (tmp_path / "second/non_persistent").exists()


def save_with(rank: int, root: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    with Run(SETUP, save=root, **config) as run:
        run.train(1)
        run.save(**options)


@pytest.mark.parametrize(
    "config, error, fragment",
    [
        ({"non_persistent_ckpt_type": None}, "ValueError", "Must be 'local' or 'global'"),
        ({"non_persistent_ckpt_type": "in_memory"}, "ValueError", "Invalid non_persistent_ckpt_type"),
        ({"non_persistent_ckpt_type": "local"}, "ValueError", "init_checkpointing_context"),
    ],
)
def test_non_persistent_types_that_cannot_be_saved(
    tmp_path: Path, config: dict[str, Any], error: str, fragment: str
) -> None:
    with pytest.raises(RankError, match=fragment) as caught:
        run_ranks(save_with, 1, str(tmp_path), config, {"non_persistent_ckpt": True})
    assert caught.value.errors == {0: error}
    assert list(tmp_path.iterdir()) == []


def save_oddly(rank: int, root: str) -> list[tuple[str, str]]:
    """Save without a directory, without a model, and without RNG states."""
    with Run(SETUP, save="") as run, pytest.MonkeyPatch.context() as patch:
        run.checkpoint.non_persistent_ckpt_type = "global"
        errors = [error_of(run.save), error_of(lambda: run.save(non_persistent_ckpt=True))]
        run.checkpoint.save = root
        save = functools.partial(save_checkpoint, run.state, [], run.optimizer, run.scheduler, 0)
        errors.append(error_of(save))
        run.checkpoint.save_rng = False
        patch.setattr(
            "ckpt_fast.trainer.save.collect.get_rng_state", lambda *_, **__: pytest.fail("not wanted")
        )
        return [*errors, error_of(run.save)]


def test_without_a_directory_and_without_a_model(tmp_path: Path) -> None:
    ((nowhere, nowhere_either, nothing, without_rng),) = run_ranks(save_oddly, 1, str(tmp_path))
    require(nowhere, "ValueError", "checkpoint.save is not set")
    require(nowhere_either, "ValueError", "neither checkpoint.non_persistent_global_ckpt_dir nor")
    require(nothing, "CheckpointError", "no model to save", "prebuilt_state_dict")
    assert without_rng == ("no error", "None"), "RNG states that are not saved are not collected"


def save_and_load_by_other_names(rank: int, directory: str) -> list[list[str]]:
    os.chdir(directory)
    root = "répertoire 路径/run/"
    with Run(SETUP, save=root) as run:
        run.train(1)
        run.save()
        expected = run.fingerprint()
    os.symlink("répertoire 路径/run", "link")
    wrong = []
    for load in (root, "link", "link/", f"{directory}/link/iter_0000001/"):
        with Run(other(SETUP), load=load) as run:
            run.load()
            wrong.append(differences(expected, run.fingerprint()))
    return wrong


def test_relative_paths_links_and_any_letters(tmp_path: Path) -> None:
    assert run_ranks(save_and_load_by_other_names, 1, str(tmp_path)) == [[[]] * 4]


def save_with_callbacks(rank: int, root: str) -> None:
    seen: list[CallbackContext] = []
    manager = CallbackManager()
    manager.user_state["count"] = 41

    def on_save(context: CallbackContext) -> None:
        # Callbacks can rely on the checkpoint, on every rank.
        assert tracked(root) is not None
        context.user_state["count"] += 1
        seen.append(context)

    manager.register("on_checkpoint_save", on_save)
    with Run(SETUP, save=root) as run:
        run.train(1)
        run.save(callback_manager=manager)
        (context,) = seen
        assert context.state is run.state
        assert context.optimizer is run.optimizer
        assert context.model == compat.unwrap_model(run.model)
        assert manager.user_state["count"] == 42


def test_callbacks_fire_on_every_rank_once_it_is_saved(tmp_path: Path) -> None:
    run_ranks(save_with_callbacks, 2, str(tmp_path))


def save_prebuilt(rank: int, root: str) -> list[str]:
    with Run(SETUP, save=root) as run:
        run.train(2)
        state_dict = run.sharded_state_dict()
        groups = compat.get_pg_collection(run.model)
        expected = run.fingerprint()
        save_checkpoint(
            run.state, [], None, None, FLOPS, prebuilt_state_dict=state_dict, pg_collection=groups
        )
    with Run(other(SETUP), load=root) as run:
        run.load()
        return differences(expected, run.fingerprint(), "train_state")


def test_low_memory_save(tmp_path: Path) -> None:
    assert run_ranks(save_prebuilt, 2, str(tmp_path)) == [[], []]


def save_with_preprocessing(rank: int, root: str) -> tuple[set[str], set[str]]:
    compared: list[set[str]] = []

    def forget(common: dict[str, Any]) -> dict[str, Any]:
        compared.append(set(common))
        return {key: value for key, value in common.items() if key != "iteration"}

    with Run(Setup(), save=root) as run:
        run.train(1)
        run.save(preprocess_common_state_dict_fn=forget)
    on_disk = load_common_state_dict(os.path.join(root, "iter_0000001"))
    return compared[0], set(on_disk)


def test_preprocessing_is_for_the_comparison_only(tmp_path: Path) -> None:
    for compared, on_disk in run_ranks(save_with_preprocessing, 2, str(tmp_path)):
        assert "iteration" in compared
        assert on_disk == compared
        assert on_disk >= {"checkpoint_version", "iteration", "content_metadata", "opt_param_scheduler"}


# --- adapters --------------------------------------------------------------------------------------------

ADAPTER = SimpleNamespace(adapter_key_filter=lambda key: isinstance(key, str) and "linear_proj" in key)


def tune_adapters(rank: int, base: str, root: str) -> tuple[set[str], list[str], tuple[int, int]]:
    """Save what fine-tuning of some weights changed, and resume it on top of the base weights."""
    with Run(Setup(), save=root) as run:
        run.state.cfg.peft = ADAPTER
        run.train(2)
        run.save()
        expected = run.fingerprint()
    on_disk = set(read_with_dcp(os.path.join(root, "iter_0000002")))
    with Run(other(Setup()), load=root, pretrained_checkpoint=base) as run:
        run.state.cfg.peft = ADAPTER
        before = run.fingerprint()
        result = run.load()
        assert run.checkpoint.finetune is False
        after = run.fingerprint()
    kept = [name for name in after if name.startswith("model.") and identical(after[name], before[name])]
    wrong = differences(expected, after, *kept)
    assert len(kept) > 5
    assert not any("linear_proj" in name for name in kept)
    return on_disk, wrong, result


def test_adapters_are_saved_and_resumed_alone(tmp_path: Path) -> None:
    base, root = str(tmp_path / "base"), str(tmp_path / "adapters")
    run_ranks(training.save_steps, 1, Setup(), base, 1, {})
    ((on_disk, wrong, result),) = run_ranks(tune_adapters, 1, base, root)
    model = {name for name in on_disk if name.startswith(("decoder.", "embedding.", "output_layer."))}
    assert model == {"decoder.layers.self_attention.linear_proj.weight"}
    # fp32 parameters are their own master weights: the optimizer restores them.
    assert [name for name in wrong if not name.startswith("optimizer")] == []
    assert result == (2, FLOPS)


# --- without torch.distributed ---------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """A module with the interface that Megatron-Core requires, which needs none of its groups."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(4, 3, generator=generator))

    def sharded_state_dict(self, prefix: str = "", **_: Any) -> dict[str, Any]:
        return {"weight": compat.ShardedTensor.from_rank_offsets("weight", self.weight)}


class Optimizer:
    """Momentum only, with the two methods a checkpoint needs."""

    def __init__(self, seed: int) -> None:
        self.momentum = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"momentum": compat.ShardedTensor.from_rank_offsets("momentum", self.momentum)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.momentum = state_dict["momentum"]


def undistributed_state(**checkpoint: Any) -> Any:
    from ckpt_fast.config import CheckpointConfig, ConfigContainer
    from ckpt_fast.state import GlobalState

    state = GlobalState()
    model = SimpleNamespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    state.cfg = ConfigContainer(model=model, checkpoint=CheckpointConfig(**checkpoint))
    return state


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_one_process_without_torch_distributed(tmp_path: Path, is_async: bool) -> None:
    assert not torch.distributed.is_initialized()
    state = undistributed_state(save=str(tmp_path), async_save=is_async, async_strategy="mcore")
    state.initialize_async_checkpoint_worker()
    state.train_state.step = 5
    module, optimizer = Linear(1), Optimizer(2)
    save_checkpoint(state, [module], optimizer, None, FLOPS)
    with torch.no_grad():
        module.weight.zero_()
    maybe_finalize_async_save(state, state.cfg.checkpoint, blocking=True)
    expected_random = torch.rand(3)

    state = undistributed_state(load=str(tmp_path))
    loaded, loaded_optimizer = Linear(3), Optimizer(4)
    assert load_checkpoint(state, [loaded], loaded_optimizer, None) == (5, FLOPS)
    assert identical(loaded.weight, Linear(1).weight)
    assert identical(loaded_optimizer.momentum, optimizer.momentum)
    assert identical(torch.rand(3), expected_random)
    assert set(read_with_dcp(str(tmp_path / "iter_0000005"))) >= {"weight", "momentum"}
