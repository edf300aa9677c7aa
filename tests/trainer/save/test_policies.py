# SPDX-License-Identifier: Apache-2.0
"""What happens if a save fails or the newest checkpoint is damaged."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast.pipeline.load.decode import read_dcp_metadata
from tests.helpers import RankError, run_ranks
from tests.manifests import make_older
from tests.models import FLOPS, Run, Setup
from tests.trainer import training
from tests.trainer.training import ALL, Loaded

SETUP = Setup()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save iterations 1, 2 and 3 on one rank."""
    root = str(tmp_path_factory.mktemp("policies") / "run")
    run_ranks(training.save_steps, 1, SETUP, root, 3, {})
    return root


@pytest.fixture
def root(saved: str, tmp_path: Path) -> str:
    """Return a copy to damage, with the fingerprints beside it."""
    for name in os.listdir(os.path.dirname(saved)):
        if name.endswith(".pt"):
            shutil.copy(os.path.join(os.path.dirname(saved), name), tmp_path)
    shutil.copytree(saved, tmp_path / "run")
    return str(tmp_path / "run")


def load(root: str, step: int, **config: Any) -> Loaded:
    (loaded,) = run_ranks(training.load, 1, SETUP, root, step, {"load": root, **config}, {})
    return loaded


def flip_a_bit(directory: str) -> None:
    """Flip a bit in the middle of the longest item of rank 0."""
    items = read_dcp_metadata(directory).storage_data.values()
    mine = [item for item in items if item.relative_path == "__0_0.distcp"]
    longest = max(mine, key=lambda item: item.length)
    with open(os.path.join(directory, longest.relative_path), "r+b") as file:
        file.seek(longest.offset + longest.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


DAMAGES = {
    "bit": flip_a_bit,
    "truncated": lambda directory: os.truncate(os.path.join(directory, "__0_0.distcp"), 5000),
    "shard": lambda directory: os.unlink(os.path.join(directory, "__0_0.distcp")),
    "seal": lambda directory: os.unlink(os.path.join(directory, "metadata.json")),
    "metadata": lambda directory: (
        os.unlink(os.path.join(directory, "metadata.json")),
        os.unlink(os.path.join(directory, ".metadata")),
    ),
    "common": lambda directory: os.truncate(os.path.join(directory, "common.pt"), 100),
    "directory": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped(root: str, damage: str) -> None:
    DAMAGES[damage](os.path.join(root, "iter_0000003"))
    assert load(root, 2) == Loaded((2, FLOPS), restored=ALL, kept=set())


def fall_back(rank: int, roots: list[str]) -> list[tuple[int, float]]:
    results = []
    for root in roots:
        with Run(SETUP, load=root) as run:
            results.append(run.load())
    return results


def test_ranks_fall_back_together(saved: str, tmp_path: Path) -> None:
    """Whatever is wrong with the newest checkpoint, half-written directories included, no rank hangs."""
    roots = []
    for name, damage in DAMAGES.items():
        roots.append(shutil.copytree(saved, tmp_path / name))
        damage(str(tmp_path / name / "iter_0000003"))
    # An interrupted save, newer than what the tracker names, of which nothing may be trusted.
    unfinished = shutil.copytree(saved, tmp_path / "unfinished")
    shutil.copytree(unfinished / "iter_0000003", unfinished / "iter_0000004")
    (unfinished / "iter_0000004/metadata.json").unlink()
    results = run_ranks(fall_back, 2, [str(root) for root in [*roots, unfinished]])
    assert results == [[(2, FLOPS)] * len(roots) + [(3, FLOPS)]] * 2


def test_a_damaged_recovery_checkpoint_is_skipped(saved: str, tmp_path: Path) -> None:
    """By the recovery checkpoint before it, or by the persistent one, whichever is newer."""
    root = tmp_path / "run"
    shutil.copytree(saved, root / "non_persistent")
    shutil.copytree(os.path.join(saved, "iter_0000002"), root / "iter_0000002")
    shutil.copytree(os.path.join(saved, "iter_0000001"), root / "iter_0000001")
    config = {"save": str(root), "non_persistent_ckpt_type": "global"}
    DAMAGES["shard"](str(root / "non_persistent/iter_0000003"))
    for name, tracked, expected in (
        ("no persistent one", None, "non_persistent/iter_0000002"),
        ("an older one", "1", "non_persistent/iter_0000002"),
        ("one as new", "2", "non_persistent/iter_0000002"),
    ):
        if tracked:
            (root / "latest_checkpointed_iteration.txt").write_text(tracked)
        ((result, used),) = run_ranks(load_and_tell, 1, {"load": str(root), **config})
        assert (result, used) == ((2, FLOPS), str(root / expected)), name
    DAMAGES["shard"](str(root / "non_persistent/iter_0000002"))
    ((result, used),) = run_ranks(load_and_tell, 1, {"load": str(root), **config})
    assert (result, used) == ((2, FLOPS), str(root / "iter_0000002"))


def load_and_tell(rank: int, config: dict[str, Any]) -> tuple[Any, str]:
    """Return the result of a load, and the directory it fell back to."""
    printed = io.StringIO()
    with Run(SETUP, **config) as run, contextlib.redirect_stdout(printed):
        result = run.load()
    return result, re.findall(r"falling back to (\S+)", printed.getvalue())[-1]


def test_several_damaged_checkpoints_are_skipped(root: str) -> None:
    DAMAGES["bit"](os.path.join(root, "iter_0000003"))
    DAMAGES["shard"](os.path.join(root, "iter_0000002"))
    assert load(root, 1).result == (1, FLOPS)


def test_nothing_whole_is_left(root: str) -> None:
    for step in (1, 2, 3):
        DAMAGES["truncated"](os.path.join(root, f"iter_{step:07d}"))
    with pytest.raises(RankError, match=r"iter_0000003/__0_0\.distcp has 5000 bytes instead of"):
        load(root, 1)


def test_no_fall_back_where_none_is_wanted(root: str) -> None:
    DAMAGES["bit"](os.path.join(root, "iter_0000003"))
    with pytest.raises(RankError, match=r"CheckpointCorruptError.*iter_0000003") as raised:
        load(root, 2, on_corrupt="raise")
    assert raised.value.errors == {0: "CheckpointCorruptError"}


@pytest.mark.parametrize("step", [2, 3])
def test_an_invalid_policy_is_refused(root: str, step: int) -> None:
    """Even if nothing is damaged: not only when it is needed for the first time."""
    if step == 2:
        DAMAGES["bit"](os.path.join(root, "iter_0000003"))
    with pytest.raises(RankError, match="on_corrupt='retry': use one of fallback, raise") as raised:
        load(root, step, on_corrupt="retry")
    assert raised.value.errors == {0: "ValueError"}


@pytest.mark.parametrize("setting", [{"on_save_error": "ignore"}, {"on_save_in_progress": "drop"}])
def test_a_save_with_an_invalid_policy(setting: dict[str, str], tmp_path: Path) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(RankError, match=f"{name}='{value}': use one of "):
        run_ranks(training.save_steps, 1, SETUP, str(tmp_path / "run"), 1, setting)
    assert not list(tmp_path.glob("run/iter_*"))


def test_a_certain_checkpoint_is_not_replaced_by_another(root: str) -> None:
    DAMAGES["truncated"](os.path.join(root, "iter_0000003"))
    with pytest.raises(RankError, match="iter_0000003"):
        load(root, 2, ckpt_step=3)
    with pytest.raises(RankError, match="iter_0000003"):
        load(root, 2, load=os.path.join(root, "iter_0000003"))


def test_a_stale_sidecar_does_not_condemn_a_stock_checkpoint(root: str) -> None:
    """A stock writer that overwrote our checkpoint left our sidecar behind."""
    directory = os.path.join(root, "iter_0000003")
    make_older(Path(directory))
    run_ranks(_overwrite_with_stock, 1, directory)
    assert load(root, 3, on_corrupt="raise").result == (3, FLOPS)


def _overwrite_with_stock(rank: int, directory: str) -> None:
    from megatron.core import dist_checkpointing

    from tests.models import megatron_on_cpu

    with Run(SETUP) as run:
        run.train(3)
        with megatron_on_cpu():
            dist_checkpointing.save(
                run.sharded_state_dict(), directory, content_metadata=run.content_metadata()
            )


def _fail_to_save(rank: int, root: str, asynchronous: bool) -> tuple[int, bool]:
    """Save step 1; let step 2 fail on the last rank only; continue; save step 3."""
    with Run(SETUP, save=root, on_save_error="warn", async_save=asynchronous) as run:
        run.state.initialize_async_checkpoint_worker()
        for step in (1, 2, 3):
            run.train(1)
            if step == 2 and rank == 0:
                # A directory in place of a data file.
                os.makedirs(os.path.join(root, "iter_0000002", "__1_0.distcp", "in_the_way"))
            run.save()
            from ckpt_fast.checkpointing import maybe_finalize_async_save

            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
            if step == 2:
                tracker = Path(root, "latest_checkpointed_iteration.txt").read_text()
                sealed = os.path.exists(os.path.join(root, "iter_0000002", "metadata.json"))
    return int(tracker), sealed


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_without_a_checkpoint_that_failed(tmp_path: Path, asynchronous: bool) -> None:
    root = str(tmp_path / "run")
    assert run_ranks(_fail_to_save, 2, root, asynchronous) == [(1, False), (1, False)]
    assert Path(root, "latest_checkpointed_iteration.txt").read_text() == "3"
