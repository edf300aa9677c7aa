# SPDX-License-Identifier: Apache-2.0
"""Failing disks and ranks: every rank raises, and the previous checkpoint stays selected and intact."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import compat
from ckpt_fast.checkpointing import _load_model_weights_from_checkpoint, maybe_finalize_async_save
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline.save.parts import SaveOptions
from tests.helpers import run_ranks
from tests.models import Run, Setup
from tests.trainer import training
from tests.trainer.training import ALL, error_of, require

SETUP = Setup(bf16=True, distributed=True)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save iterations 1 and 2 on two ranks."""
    root = str(tmp_path_factory.mktemp("failures") / "run")
    run_ranks(training.save_steps, 2, SETUP, root, 2, {})
    return root


@pytest.fixture
def root(sound: str, tmp_path: Path) -> Path:
    """Return a copy to save into."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


# --- saving ----------------------------------------------------------------------------------------------


def save(rank: int, config: dict[str, Any], break_it: str) -> tuple[tuple[str, str], bool]:
    """Save step 3 in a resumed run with an obstacle; return the error, and whether errno was kept."""
    with Run(SETUP, **config) as run:
        run.load()
        run.train(1)
        run.state.initialize_async_checkpoint_worker()

        def save_and_finalize() -> None:
            with FAILURES[break_it](rank, config["save"]):
                run.save()
                maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)

        return error_of(save_and_finalize)


class limited_files:
    """Limit files of this process to ``nbytes``: writes fail with EFBIG."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def __enter__(self) -> None:
        self._handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._nbytes, self._limits[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        signal.signal(signal.SIGXFSZ, self._handler)


class blocked:
    """Put a directory in place of a file to be written, on one rank, before the save."""

    def __init__(self, rank: int, path: str) -> None:
        self._path = path if rank == 1 else None

    def __enter__(self) -> None:
        if self._path:
            os.makedirs(self._path)
        torch.distributed.barrier()

    def __exit__(self, *_: object) -> None:
        torch.distributed.barrier()
        if self._path:
            shutil.rmtree(self._path)


def full_disk_on_rank_1(rank: int, root: str) -> Any:
    return limited_files(6000) if rank == 1 else contextlib.nullcontext()


def blocked_shard(rank: int, root: str) -> Any:
    return blocked(rank, os.path.join(root, "iter_0000003/__1_0.distcp/in_the_way"))


def blocked_metadata(rank: int, root: str) -> Any:
    return blocked(rank, os.path.join(root, "iter_0000003/.metadata/in_the_way"))


def blocked_train_state(rank: int, root: str) -> Any:
    return blocked(rank, os.path.join(root, "iter_0000003/train_state.pt/in_the_way"))


def blocked_directory(rank: int, root: str) -> Any:
    if rank == 0:
        Path(root, "iter_0000003").write_text("a file in the way")
    return contextlib.nullcontext()


FAILURES = {
    function.__name__: function
    for function in (
        full_disk_on_rank_1,
        blocked_shard,
        blocked_metadata,
        blocked_train_state,
        blocked_directory,
    )
}

EXPECTED = {
    "full_disk_on_rank_1": ("rank 1:", "__1_0.distcp", "File too large"),
    "blocked_shard": ("rank 0:", "__1_0.distcp", "Is a directory"),
    "blocked_metadata": ("rank 0:", ".metadata"),
    "blocked_train_state": ("rank 0:", "train_state.pt"),
    "blocked_directory": ("rank 0:", "iter_0000003", "directory"),
}


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failed_saves(root: Path, failure: str, background: bool) -> None:
    config = {"save": str(root), "load": str(root), "async_save": background, "async_strategy": "mcore"}
    first, second = run_ranks(save, 2, config, failure)
    assert first == second
    kind, text = first
    assert kind in ("CheckpointWriteError", "AsyncSaveError"), first
    for fragment in (f"{root}/iter_0000003", *EXPECTED[failure]):
        assert fragment in text

    # As if the save had not been tried: the previous checkpoint is selected, complete, and loads.
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert torch.load(root / "latest_train_state.pt", weights_only=True)["step"] == 2


def test_previous_checkpoint_loads_after_a_failed_save(sound: str, tmp_path: Path) -> None:
    root = shutil.copytree(os.path.dirname(sound), tmp_path / "copy") / "run"
    config = {"save": str(root), "load": str(root)}
    run_ranks(save, 2, config, "full_disk_on_rank_1")
    for loaded in run_ranks(training.load, 2, SETUP, str(root), 2, {"load": str(root)}, {}):
        assert loaded.restored == ALL


def save_with_a_full_log(rank: int, root: str) -> None:
    with Run(SETUP, save=root) as run, open("/dev/full", "w") as log, contextlib.redirect_stdout(log):
        run.train(1)
        run.save()
        # Its buffer would be flushed when it is closed, and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())


def test_a_log_on_a_full_disk_fails_no_save(tmp_path: Path) -> None:
    run_ranks(save_with_a_full_log, 2, str(tmp_path))
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


def save_to(rank: int, root: str) -> tuple[str, str]:
    with Run(SETUP, save=root) as run:
        run.train(1)
        return error_of(run.save)


def test_save_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = run_ranks(save_to, 2, str(tmp_path / "file"))
    assert first == second
    require(first, "CheckpointWriteError", "rank 0:", str(tmp_path / "file"), "directory")


def remove_the_directory_in_between(rank: int, root: str) -> tuple[str, str]:
    """Remove it after the data is written and before it is published; return the error."""
    with Run(SETUP, save=root) as run:
        run.train(1)
        job = torch_dist.start_save(
            run.sharded_state_dict(), root, torch_dist.FastSaveStrategy(), SaveOptions(snapshot=True)
        )
        job.write()
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(root)
        torch.distributed.barrier()
        return error_of(job.commit)


def test_directory_is_removed_while_saving(tmp_path: Path) -> None:
    first, second = run_ranks(remove_the_directory_in_between, 2, str(tmp_path / "gone"))
    assert first == second
    require(first, "CheckpointWriteError", "rank 0:", str(tmp_path / "gone"), "was deleted", "not published")


def test_errors_keep_errno_and_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        torch_dist.start_save({}, str(tmp_path / "file/iter_0000001"), torch_dist.FastSaveStrategy())
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == 20
    assert str(caught.value.filename).startswith(str(tmp_path / "file"))


# --- one rank fails in what is not ours ------------------------------------------------------------------


class OutOfOrderError(Exception):
    """Raised by the program's own module or optimizer."""


def break_down(*_: Any, **__: Any) -> Any:
    raise OutOfOrderError("out of order")


def fail_on_rank_1(rank: int, root: str, where: str) -> tuple[str, str]:
    with Run(SETUP, save=root, load=root) as run:
        run.train(1)
        broken = {"save": run.optimizer, "scaffold": run.optimizer, "optimizer": run.optimizer}
        owner = broken.get(where, compat.unwrap_model(run.model)[0])
        method = "sharded_state_dict" if where in ("save", "scaffold") else "load_state_dict"
        if rank == 1:
            setattr(owner, method, break_down)
        return error_of(run.save if where == "save" else run.load)


@pytest.mark.parametrize("where", ["save", "scaffold", "model", "optimizer"])
def test_no_rank_waits_for_one_that_failed(root: Path, where: str) -> None:
    kinds = {"save": "CheckpointError", "model": "CheckpointMismatchError"}
    for error in run_ranks(fail_on_rank_1, 2, str(root), where):
        require(error, kinds.get(where, "OutOfOrderError"), "out of order")
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "2"


def fail_to_load_weights_on_rank_1(rank: int, path: str) -> tuple[str, str]:
    with Run(SETUP) as run:
        if rank == 1:
            compat.unwrap_model(run.model)[0].load_state_dict = break_down
        return error_of(lambda: _load_model_weights_from_checkpoint(path, run.model, strict=False))


def test_no_rank_waits_for_one_that_failed_to_load_weights(root: Path) -> None:
    for error in run_ranks(fail_to_load_weights_on_rank_1, 2, str(root / "iter_0000002")):
        require(error, "OutOfOrderError", "out of order")
