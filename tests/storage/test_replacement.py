# SPDX-License-Identifier: Apache-2.0
"""A checkpoint replaces an older one: there is always one to load, and no user's file is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.format.manifest import file_record
from ckpt_fast.storage import replacement
from ckpt_fast.storage.owners import Hold, occupy
from tests.helpers import run_ranks
from tests.pipeline.layouts import same, whole
from tests.pipeline.save.test_save import FILES, loaded, names, save_tensors
from tests.saves import new_save

pytestmark = pytest.mark.usefixtures("no_fsync")
OLD, NEW = torch.arange(1000), torch.arange(1000) + 5


@pytest.fixture(params=["exchange", "two renames"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose a file system that can exchange two names, or one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(replacement, "_renameat2", lambda: None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a directory with a checkpoint and unrelated files."""
    directory = tmp_path / "run" / "iter_0000005"
    save_tensors(directory, {"w": OLD}, writers=3, **FILES)
    (directory / "notes.txt").write_text("of the user")
    (directory / "evaluation").mkdir()
    (directory / "evaluation" / "scores").write_text("0.9")
    return directory


def is_whole(directory: Path, expected: torch.Tensor) -> bool:
    return same(loaded(directory, "w", torch.zeros_like(expected)), expected)


@pytest.mark.usefixtures("file_system")
def test_what_is_not_the_checkpoints_stays(run: Path) -> None:
    os.chmod(run, 0o750)
    save_tensors(run, {"w": NEW}, **FILES)
    assert is_whole(run, NEW)
    assert names(run) == {
        ".metadata",
        "metadata.json",
        "common.pt",
        "__0_0.distcp",
        "notes.txt",
        "evaluation",
    }
    assert (run / "evaluation" / "scores").read_text() == "0.9"
    assert names(run.parent) == {"iter_0000005"} and run.stat().st_mode & 0o777 == 0o750


@pytest.mark.usefixtures("file_system")
def test_through_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(run)
    save_tensors(link, {"w": NEW}, **FILES)
    assert link.is_symlink() and is_whole(run, NEW) and is_whole(link, NEW)
    assert names(run.parent) == {"iter_0000005"} and names(link.parent) == {"link"}


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("when", ["staged", "written"])
def test_one_that_is_given_up_leaves_the_older(run: Path, when: str) -> None:
    job = new_save([whole("w", NEW)], str(run), snapshot=True, **FILES)
    job.stage()
    if when == "written":
        job.write()
    assert len(names(run.parent)) == 2
    job.abandon()
    assert names(run.parent) == {"iter_0000005"} and is_whole(run, OLD)


def die_at(_: int, directory: str, call: str) -> None:
    """End the process before the first such call of a save."""

    def end(*_: Any, **__: Any) -> None:
        os._exit(0)

    child = os.fork()
    if child == 0:
        job = new_save([whole("w", NEW)], directory, **FILES)
        job.stage()
        job.write()
        if call == "second rename":
            original, count = os.rename, [0]

            def rename(source: str, target: str) -> None:
                count[0] += 1
                if count[0] == 2:
                    end()
                original(source, target)

            replacement._renameat2 = lambda: None  # type: ignore[assignment]
            os.rename = rename  # type: ignore[assignment]
        else:
            setattr(replacement, call, end)
        job.commit()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("call", "left"), [("_exchange", OLD), ("discard", NEW)], ids=["before the exchange", "behind it"]
)
def test_killed(run: Path, call: str, left: torch.Tensor) -> None:
    run_ranks(die_at, 1, str(run), call, fresh=True)
    assert is_whole(run, left) and len(names(run.parent)) == 2
    save_tensors(run, {"w": NEW + 1}, **FILES)
    assert is_whole(run, NEW + 1) and names(run.parent) == {"iter_0000005"}
    assert (run / "notes.txt").read_text() == "of the user"


def test_killed_between_two_renames(run: Path) -> None:
    run_ranks(die_at, 1, str(run), "second rename", fresh=True)
    assert not run.exists()
    replacement.put_back(str(run))
    assert is_whole(run, OLD) and (run / "notes.txt").exists()
    save_tensors(run, {"w": NEW + 1}, **FILES)
    assert is_whole(run, NEW + 1) and names(run.parent) == {"iter_0000005"}


def test_a_failed_exchange_loses_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(replacement, "_exchange", fail)
        with pytest.raises(CheckpointWriteError, match=r"Input/output error\. One of the two"):
            save_tensors(run, {"w": NEW}, **FILES)
    assert is_whole(run, OLD)
    save_tensors(run, {"w": NEW}, **FILES)
    assert is_whole(run, NEW) and names(run.parent) == {"iter_0000005"}


@pytest.mark.parametrize("why", ["a mount point", "no permission", "no room"])
def test_where_nothing_can_be_put_beside_it_is_overwritten(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    if why == "a mount point":
        monkeypatch.setattr(replacement, "_is_mount_point", lambda path: path == str(run))
    elif why == "no permission":
        monkeypatch.setattr(os, "mkdir", refuse)
    else:
        monkeypatch.setattr("ckpt_fast.storage.files.has_room_beside", lambda *_: False)
    save_tensors(run, {"w": NEW}, **FILES)
    assert is_whole(run, NEW) and (run / "notes.txt").exists()
    assert "the checkpoint in it ends now" in caplog.text


def test_mount_points_are_known() -> None:
    assert replacement._is_mount_point("/proc") and not replacement._is_mount_point("/proc/self")


def test_leftovers_are_found_but_not_saves_in_progress(run: Path) -> None:
    other = run.parent / "iter_0000006"
    other.mkdir()
    (run.parent / ".iter_0000005.0123abcd.ckpt_fast-new").mkdir()
    (run.parent / ".iter_0000006.0123abcd.ckpt_fast-new").mkdir()
    (run.parent / ".iter_0000006.hidden").mkdir()
    hold = Hold()
    occupy(str(other), hold)
    assert replacement.replaced_in(str(run.parent)) == {str(run)}
    hold.let_go()
    assert replacement.replaced_in(str(run.parent)) == {str(run), str(other)}
    replacement.sweep(str(run))
    assert names(run.parent) == {
        run.name,
        other.name,
        ".iter_0000006.0123abcd.ckpt_fast-new",
        ".iter_0000006.hidden",
    }


def replace_on(rank: int, directory: str) -> None:
    job = new_save([whole(f"w{rank}", NEW + rank)], directory, **FILES)
    job.stage()
    job.write()
    job.commit()


def test_all_ranks_write_to_the_same_place(run: Path) -> None:
    run_ranks(replace_on, 2, str(run))
    for rank in range(2):
        assert same(loaded(run, f"w{rank}", torch.zeros_like(NEW)), NEW + rank)
    assert names(run.parent) == {"iter_0000005"}


def test_where_directories_cannot_be_renamed_the_files_are_moved(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a lower layer of an overlay."""

    def fail(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(replacement, "_exchange", fail)
    save_tensors(run, {"w": NEW}, **FILES)
    assert is_whole(run, NEW) and (run / "notes.txt").exists() and names(run.parent) == {"iter_0000005"}
    assert "the checkpoint in it ends now" in caplog.text


def test_whoever_puts_the_older_one_back_between_two_renames_is_waited_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a load does that finds nothing at the path."""
    monkeypatch.setattr(replacement, "_renameat2", lambda: None)
    original, count = os.rename, [0]

    def rename(source: str, target: str) -> None:
        count[0] += 1
        if count[0] in (2, 4):
            replacement.put_back(str(run))
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    save_tensors(run, {"w": NEW}, **FILES)
    assert count[0] > 4 and is_whole(run, NEW) and names(run.parent) == {"iter_0000005"}


def test_names_of_users_are_not_ours(run: Path) -> None:
    for name in (".iter_0000005.20240131.old", ".iter_0000005.20240131.new", ".logs.20240131.old"):
        (run.parent / name).mkdir()
    before = names(run.parent)
    assert replacement.replaced_in(str(run.parent)) == set()
    save_tensors(run, {"w": NEW}, **FILES)
    assert names(run.parent) == before


def test_a_file_of_the_user_among_recorded_ones_stays(run: Path) -> None:
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "vocab.json").write_text("of the checkpoint")

    def finish(directory: str) -> list[Any]:
        os.mkdir(os.path.join(directory, "tokenizer"))
        Path(directory, "tokenizer", "vocab.json").write_text("{}")
        return [file_record("tokenizer/vocab.json", b"{}")]

    save_tensors(run, {"w": NEW}, finish=finish, **FILES)
    (run / "tokenizer" / "mine.txt").write_text("of the user")
    save_tensors(run, {"w": NEW + 1}, finish=finish, **FILES)
    assert (run / "tokenizer" / "mine.txt").read_text() == "of the user" and is_whole(run, NEW + 1)
    assert (run / "tokenizer" / "vocab.json").read_text() == "{}"


def test_what_the_older_one_recorded_in_nested_folders_goes_with_it(run: Path) -> None:
    def finish(directory: str) -> list[Any]:
        os.makedirs(os.path.join(directory, "modelopt_state", "part"))
        Path(directory, "modelopt_state", "part", "file").write_bytes(b"{}")
        return [file_record("modelopt_state/part/file", b"{}")]

    save_tensors(run, {"w": NEW}, finish=finish, **FILES)
    save_tensors(run, {"w": NEW + 1}, **FILES)
    assert is_whole(run, NEW + 1) and not (run / "modelopt_state").exists()
