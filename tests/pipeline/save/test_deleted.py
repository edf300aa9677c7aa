# SPDX-License-Identifier: Apache-2.0
"""What somebody deletes while it is being saved is not published, and not made anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.format.manifest import file_record
from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.save import seal
from ckpt_fast.pipeline.save.save import Save
from ckpt_fast.storage.commit import write_file_atomic
from tests.helpers import run_ranks
from tests.models import Run, Setup
from tests.pipeline.layouts import whole
from tests.saves import new_save, save
from tests.trainer.training import error_of, iterations, tracked

WHAT: dict[str, Callable[[Path], Any]] = {
    "the directory": shutil.rmtree,
    "all data": lambda directory: [path.unlink() for path in directory.glob("*.distcp")],
    "a file": lambda directory: (directory / "__0_1.distcp").unlink(),
}
anything = pytest.mark.parametrize("what", WHAT)


class Case:
    """A save of two data files, of which something is deleted at a certain moment."""

    def __init__(self, directory: Path, delete: Callable[[Path], Any], moment: str) -> None:
        self.directory, self._delete, self._moment = directory, delete, moment
        self.selected = False

    def run(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """Return the error; nothing has been selected."""
        shards = [whole(name, torch.ones(1000)) for name in "ab"]
        job = new_save(
            shards,
            str(self.directory),
            finish=self._finish,
            select=self._select,
            seal_files={"metadata.json": b"{}"},
            writers=2,
        )
        job.stage()
        job.write()
        self.place = Path(job.written_to)
        assert {path.name for path in self.place.glob("*.distcp")} == {"__0_0.distcp", "__0_1.distcp"}
        if self._moment == "before the commit":
            self._delete(self.place)
        sealing = seal.seal

        def then_delete(*arguments: Any, **options: Any) -> None:
            sealing(*arguments, **options)
            self._delete(self.place)

        if self._moment == "while the seal is written":
            monkeypatch.setattr(seal, "seal", then_delete)
        with pytest.raises(CheckpointWriteError) as raised:
            job.commit()
        assert not self.selected
        return str(raised.value)

    def _finish(self, directory: str) -> list[FileRecord]:
        write_file_atomic(f"{directory}/extra", b"x")
        if self._moment == "before the seal":
            self._delete(Path(directory))
        return [file_record("extra", b"x")]

    def _select(self) -> None:
        self.selected = True


@anything
@pytest.mark.parametrize("moment", ["before the commit", "before the seal", "while the seal is written"])
@pytest.mark.parametrize("replaces", [False, True])
def test_what_is_deleted_while_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, moment: str, replaces: bool
) -> None:
    directory = tmp_path / "iter_0000001"
    if replaces:
        save([whole("a", torch.zeros(10))], str(directory))
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
    case = Case(directory, WHAT[what], moment)
    error = case.run(monkeypatch)
    assert "deleted" in error or "is missing" in error
    assert not (case.place / "metadata.json").exists() or moment == "while the seal is written"
    if what == "the directory":
        assert not case.place.exists(), "it is not made anew"
    if replaces:
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def save_what_is_deleted(rank: int, root: str, what: str) -> tuple[str, str]:
    """Save iterations 1 and 2, the second of which is deleted once its data is known to be there."""
    look = Save._require_all_present

    def then_delete(job: Save, files: Any) -> None:
        look(job, files)
        WHAT[what](Path(job.written_to))

    with Run(Setup(), save=root, storage_writers_per_rank=2) as run, pytest.MonkeyPatch.context() as patch:
        run.train(1)
        run.save()
        patch.setattr(Save, "_require_all_present", then_delete)
        run.train(1)
        return error_of(run.save)


@anything
def test_a_run_names_no_checkpoint_that_is_gone(tmp_path: Path, what: str) -> None:
    root = str(tmp_path / "run")
    ((kind, text),) = run_ranks(save_what_is_deleted, 1, root, what)
    assert kind == "CheckpointWriteError" and "deleted" in text
    assert tracked(root) == (1, 1) and not (Path(root) / "iter_0000002/metadata.json").exists()
    assert iterations(root) == ([1] if what == "the directory" else [1, 2])
