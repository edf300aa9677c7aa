# SPDX-License-Identifier: Apache-2.0
"""Bad input, damaged files, failing disks: every rank raises, saying what failed, where, and what to do."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import megatron
from ckpt_fast.checkpointing import _load_model_weights_from_checkpoint, maybe_finalize_async_save
from ckpt_fast.doors import megatron_core
from ckpt_fast.errors import CheckpointError
from tests.helpers import run_ranks
from tests.models import Run, Setup
from tests.trainer import runs
from tests.trainer.runs import ALL

SETUP = Setup(bf16=True, distributed=True)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Iterations 1 and 2 of two ranks."""
    root = str(tmp_path_factory.mktemp("errors") / "run")
    run_ranks(runs.save_steps, 2, SETUP, root, 2, {})
    return root


@pytest.fixture
def root(sound: str, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


def error_of(action: Callable[[], Any]) -> tuple[str, str]:
    """Kind and text of what ``action`` raises."""
    try:
        result = action()
    except (Exception, SystemExit) as error:
        return type(error).__name__, str(error)
    return "no error", str(result)


def load(rank: int, setup: Setup, config: dict[str, Any]) -> tuple[str, str]:
    with Run(setup, **{"on_corrupt": "raise", **config}) as run:
        return error_of(run.load)


def load_on_two(setup: Setup = SETUP, **config: Any) -> tuple[str, str]:
    """The one error that both ranks raise."""
    first, second = run_ranks(load, 2, setup, config)
    assert first == second
    return first


def require(error: tuple[str, str], kind: str, *fragments: str) -> None:
    assert error[0] == kind, error
    assert [fragment for fragment in fragments if fragment not in error[1]] == [], error[1]


# --- nothing there ---------------------------------------------------------------------------------------


def test_step_that_does_not_exist(root: Path) -> None:
    error = load_on_two(load=str(root), ckpt_step=77)
    require(error, "CheckpointNotFoundError", "ckpt_step=77", f"{root}/iter_0000077", "ls")


def test_pretrained_checkpoint_that_does_not_exist(tmp_path: Path) -> None:
    error = load_on_two(load=str(tmp_path), pretrained_checkpoint=str(tmp_path / "nothing"))
    require(error, "CheckpointNotFoundError", "pretrained_checkpoint", str(tmp_path / "nothing"))


def test_tracker_names_what_is_gone(root: Path) -> None:
    shutil.rmtree(root / "iter_0000002")
    error = load_on_two(load=str(root))
    require(error, "CheckpointNotFoundError", f"{root}/iter_0000002", "ckpt_step")


def test_trackers_that_cannot_be_understood(root: Path) -> None:
    (root / "latest_train_state.pt").write_bytes(b"\x80nonsense")
    error = load_on_two(load=str(root))
    require(error, "RuntimeError", f"{root}/latest_train_state.pt")
    (root / "latest_train_state.pt").unlink()
    (root / "latest_checkpointed_iteration.txt").write_text("soon")
    assert load_on_two(load=str(root))[0] == "SystemExit"


def load_weights(rank: int, path: str) -> tuple[str, str]:
    with Run(SETUP) as run:
        return error_of(lambda: _load_model_weights_from_checkpoint(path, run.model))


def test_weights_from_nowhere(tmp_path: Path) -> None:
    first, second = run_ranks(load_weights, 2, str(tmp_path / "nothing"))
    assert first == second
    require(first, "CheckpointNotFoundError", str(tmp_path / "nothing"), "does not exist")


# --- half a checkpoint -----------------------------------------------------------------------------------


def unlink(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def truncate(name: str, nbytes: int) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, nbytes)


def flip_last_weight_bit(directory: Path) -> None:
    """A bit of ``output_layer.weight``'s data, in whichever file it is."""
    metadata = torch.distributed.checkpoint.FileSystemReader(directory).read_metadata()
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == "output_layer.weight"]
    with (directory / info.relative_path).open("r+b") as file:
        file.seek(info.offset + info.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def garble(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(b"\x80\x04nonsense" * 9) and None


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], tuple[str, ...]]] = {
    # what is done, kinds of error, fragments of its text
    "no-seal": (unlink("metadata.json"), ("CheckpointCorruptError",), ("metadata.json",)),
    "no-metadata": (
        unlink(".metadata"),
        ("CheckpointNotFoundError", "CheckpointCorruptError"),
        (".metadata",),
    ),
    "no-common": (unlink("common.pt"), ("CheckpointNotFoundError", "CheckpointCorruptError"), ("common.pt",)),
    "no-shard": (
        unlink("__1_0.distcp"),
        ("CheckpointNotFoundError", "CheckpointCorruptError"),
        ("__1_0.distcp",),
    ),
    "short-shard": (truncate("__1_0.distcp", 3000), ("CheckpointCorruptError",), ("__1_0.distcp", "3000")),
    "flipped-bit": (
        flip_last_weight_bit,
        ("CheckpointCorruptError",),
        ("output_layer.weight", ".distcp", "CRC-32"),
    ),
    "garbled-metadata": (garble(".metadata"), ("CheckpointCorruptError",), (".metadata",)),
    "garbled-common": (garble("common.pt"), ("CheckpointCorruptError",), ("common.pt",)),
    "garbled-seal": (garble("metadata.json"), ("CheckpointCorruptError",), ("metadata.json",)),
}


@pytest.mark.parametrize("sidecar", [True, False], ids=["sidecar", "stock"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(root: Path, damage: str, sidecar: bool) -> None:
    inflict, kinds, fragments = DAMAGES[damage]
    directory = root / "iter_0000002"
    inflict(directory)
    if not sidecar:
        # As stock writers leave it: damage has to be noticed without the list of files.
        (directory / "ckpt_fast.json").unlink()
    kind, text = load_on_two(load=str(root))
    assert kind in kinds, (kind, text)
    for fragment in (str(directory), "earlier iteration", *fragments):
        assert fragment in text


def test_an_empty_directory(root: Path) -> None:
    shutil.rmtree(root / "iter_0000002")
    (root / "iter_0000002").mkdir()
    error = load_on_two(load=str(root))
    require(error, "UnknownFormatError", "Unknown checkpoint format", f"{root}/iter_0000002", "older")


def load_where_rank_1_lacks_a_file(rank: int, path: str) -> tuple[str, str]:
    """Each rank has its own view of the directory, as on a file system that is not shared."""
    with Run(SETUP) as run:
        scaffold = run.sharded_state_dict() if rank == 9 else {"model": run.sharded_state_dict(True)["model"]}
        return error_of(lambda: megatron_core.load(scaffold, f"{path}_{rank}"))


def test_only_one_rank_sees_the_damage(root: Path) -> None:
    for rank in range(2):
        shutil.copytree(root / "iter_0000002", root / f"view_{rank}")
    (root / "view_1/.metadata").unlink()
    first, second = run_ranks(load_where_rank_1_lacks_a_file, 2, str(root / "view"))
    assert first == second
    require(first, "CheckpointNotFoundError", "rank 1:", str(root / "view_1"), ".metadata")


# --- a checkpoint of something else ----------------------------------------------------------------------


def test_unknown_format_in_the_configuration(root: Path) -> None:
    error = load_on_two(load=str(root), ckpt_format="zarr")
    require(error, "NotImplementedError", "zarr", "torch_dist", "fsdp_dtensor")


def test_format_on_disk_is_another(root: Path) -> None:
    error = load_on_two(load=str(root), ckpt_format="fsdp_dtensor")
    require(error, "AssertionError", "torch_dist", "fsdp_dtensor", f"{root}/iter_0000002", "ckpt_format")


def test_unknown_format_on_disk(root: Path) -> None:
    directory = root / "iter_0000002"
    for path in directory.iterdir():
        if path.name not in ("run_config.yaml", "train_state.pt"):
            path.unlink()
    error = load_on_two(load=str(root))
    require(error, "UnknownFormatError", "Unknown checkpoint format", str(directory), "older")


@pytest.mark.parametrize(
    "setup, name, shapes",
    [
        (Setup(bf16=True, hidden=32), "weight has shape", ("16", "32")),
        (Setup(bf16=True, layers=3), "decoder.layers.", ("(1, ", "(3, ")),
        (Setup(bf16=True, layers=3, tp=2), "decoder.layers.", ("(1, ", "(3, ")),
    ],
    ids=["hidden", "layers", "layers-tp2"],
)
def test_model_of_another_shape(root: Path, setup: Setup, name: str, shapes: tuple[str, ...]) -> None:
    error = load_on_two(setup, load=str(root), load_optim=False)
    require(
        error, "CheckpointMismatchError", "rank 0:", name, f"{root}/iter_0000002", "configuration", *shapes
    )


def load_other_keys(rank: int, path: str, strict: str, ranks: list[int]) -> tuple[str, str]:
    """Ask, on ``ranks`` only, for a name that the checkpoint does not have."""
    with Run(SETUP) as run:
        scaffold = {"model": run.sharded_state_dict(True)["model"]}
        if rank in ranks:
            scaffold["model"]["output_layer.weight"].key = "lm_head.weight"
        return error_of(lambda: megatron_core.load(scaffold, path, strict=strict))


@pytest.mark.parametrize(
    "strict, ranks, fragments",
    [
        ("assume_ok_unexpected", [0, 1], ("has, for example", "linear_fc1.weight", "dist_ckpt_strictness")),
        ("raise_all", [0, 1], ("Unexpected keys", "configuration")),
        ("assume_ok_unexpected", [1], ("all ranks build the same model",)),
    ],
    ids=["missing", "strict", "ranks-disagree"],
)
def test_a_name_that_is_not_there(
    root: Path, strict: str, ranks: list[int], fragments: tuple[str, ...]
) -> None:
    directory = str(root / "iter_0000002")
    first, second = run_ranks(load_other_keys, 2, directory, strict, ranks)
    assert first == second
    require(first, "CheckpointMismatchError", "rank 0:", directory, "lm_head.weight", *fragments)


# --- saving ----------------------------------------------------------------------------------------------


def save(rank: int, config: dict[str, Any], break_it: str) -> tuple[tuple[str, str], bool]:
    """Save step 3 on top of a resumed run with something in the way; the error, and errno was kept."""
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
    """Files of this process cannot grow beyond ``nbytes``: writes fail with EFBIG."""

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
    """A directory of the name of a file to be written, made on one rank before the save."""

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

    # The run is as if it had not tried: the previous checkpoint is selected, complete, and loads.
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert torch.load(root / "latest_train_state.pt", weights_only=True)["step"] == 2


def test_previous_checkpoint_loads_after_a_failed_save(sound: str, tmp_path: Path) -> None:
    root = shutil.copytree(os.path.dirname(sound), tmp_path / "copy") / "run"
    config = {"save": str(root), "load": str(root)}
    run_ranks(save, 2, config, "full_disk_on_rank_1")
    for loaded in run_ranks(runs.load, 2, SETUP, str(root), 2, {"load": str(root)}, {}):
        assert loaded.restored == ALL


def save_with_a_full_log(rank: int, root: str) -> None:
    with Run(SETUP, save=root) as run, open("/dev/full", "w") as log, contextlib.redirect_stdout(log):
        run.train(1)
        run.save()
        # Its buffer would be flushed, and fail, when it is closed.
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
    """Between the writing of the data and its publication."""
    with Run(SETUP, save=root) as run:
        run.train(1)
        job = megatron_core.start_save(
            run.sharded_state_dict(), root, megatron_core.FastSaveStrategy(), snapshot=True
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
    require(first, "CheckpointWriteError", "rank 0:", str(tmp_path / "gone"), "is missing", "not published")


def test_errors_keep_errno_and_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        megatron_core.start_save({}, str(tmp_path / "file/iter_0000001"), megatron_core.FastSaveStrategy())
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == 20
    assert str(caught.value.filename).startswith(str(tmp_path / "file"))


# --- one rank fails in what is not ours ------------------------------------------------------------------


class OutOfOrderError(Exception):
    """Raised by a module or optimizer of the program."""


def break_down(*_: Any, **__: Any) -> Any:
    raise OutOfOrderError("out of order")


def fail_on_rank_1(rank: int, root: str, where: str) -> tuple[str, str]:
    with Run(SETUP, save=root, load=root) as run:
        run.train(1)
        broken = {"save": run.optimizer, "scaffold": run.optimizer, "optimizer": run.optimizer}
        owner = broken.get(where, megatron.unwrap_model(run.model)[0])
        method = "sharded_state_dict" if where in ("save", "scaffold") else "load_state_dict"
        if rank == 1:
            setattr(owner, method, break_down)
        return error_of(run.save if where == "save" else run.load)


@pytest.mark.parametrize("where", ["save", "scaffold", "model", "optimizer"])
def test_no_rank_waits_for_one_that_failed(root: Path, where: str) -> None:
    healthy, failed = run_ranks(fail_on_rank_1, 2, str(root), where)
    require(healthy, "CheckpointMismatchError" if where == "model" else "CheckpointError", "rank 1:")
    assert "out of order" in healthy[1]
    assert "out of order" in failed[1]
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "2"


def fail_to_load_weights_on_rank_1(rank: int, path: str) -> tuple[str, str]:
    with Run(SETUP) as run:
        if rank == 1:
            megatron.unwrap_model(run.model)[0].load_state_dict = break_down
        return error_of(lambda: _load_model_weights_from_checkpoint(path, run.model, strict=False))


def test_no_rank_waits_for_one_that_failed_to_load_weights(root: Path) -> None:
    healthy, failed = run_ranks(fail_to_load_weights_on_rank_1, 2, str(root / "iter_0000002"))
    require(healthy, "CheckpointError", "rank 1:", "OutOfOrderError: out of order")
    require(failed, "OutOfOrderError", "out of order")
