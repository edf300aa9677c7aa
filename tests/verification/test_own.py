# SPDX-License-Identifier: Apache-2.0
"""Verifying a run that ckpt_fast has saved: every damage is found, and named for what it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ckpt_fast import verify
from ckpt_fast.verification.report import State, Verdict
from tests.manifests import make_older
from tests.verification.runs import flips, save_run, small_files

TRACKERS = ("latest_train_state.pt", "latest_checkpointed_iteration.txt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("own") / "run")


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_a_sound_run(run: Path) -> None:
    for deep in (False, True):
        report = verify(run, deep)
        assert report.verdict is Verdict.SOUND and report.kind == "run" and report.is_own
        assert [each.kind for each in report.checkpoints] == ["torch_dist"] * 2
        assert [each.is_selected for each in report.checkpoints] == [False, True]
        last = report.checkpoints[1]
        assert last.path == str(run / "iter_0000002") and last.is_complete
        assert {each.path for each in report.files} == set(TRACKERS)
        states = {each.state for each in (*last.files, *last.items)}
        assert states == ({State.SOUND} if deep else {State.SOUND, State.UNREAD})
        positions = [each.path for each in last.files if each.path.startswith("..")]
        assert positions == ["../energon/iter_0000002/train_dataloader_dprank000.pt"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [25, pytest.param(120, marks=pytest.mark.long)])
def test_flips_in_every_small_file_are_found(run: Path, count: int) -> None:
    wrong = []
    step = run / "iter_0000002"
    for path in [*small_files(step), *(run / "energon/iter_0000002").iterdir()]:
        for at in flips(path, count):
            report = verify(step, deep=True)
            named = any(os.path.samefile(line.split(" ", 1)[0], path) for line in report.damages[:1])
            if report.verdict is not Verdict.DAMAGED or not named:
                wrong.append((path.name, at, report.damages))
    assert wrong == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.long)])
def test_flips_in_the_data_name_the_items(run: Path, count: int) -> None:
    data = run / "iter_0000002/__0_0.distcp"
    for byte, _ in flips(data, count):
        report = verify(data.parent, deep=True)
        assert report.verdict is Verdict.DAMAGED
        assert [each.state for each in report.files if each.path == data.name] == [State.FLIPPED]
        named = [each for each in report.items if each.state.is_damage]
        within = [each for each in report.items if each.offset <= byte < each.offset + each.nbytes]
        assert named == within and all(each.state is State.FLIPPED for each in named)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    "name", ["metadata.json", "common.pt", "run_config.yaml", "train_state.pt", ".metadata"]
)
def test_what_a_load_needs_is_missing_or_empty(run: Path, name: str, deep: bool) -> None:
    path = run / "iter_0000002" / name
    path.write_bytes(b"")
    report = verify(path.parent, deep)
    assert report.verdict is Verdict.DAMAGED and not report.is_complete
    assert State.TRUNCATED in {each.state for each in report.files if each.path == name}
    path.unlink()
    for found in (verify(path.parent, deep), verify(run, deep).checkpoints[1]):
        assert found.verdict is Verdict.DAMAGED and not found.is_complete
        assert State.MISSING in {each.state for each in found.files if each.path == name}


def test_what_is_of_another_save_is_called_swapped(run: Path) -> None:
    """Whole by its own checksums, and not what belongs there."""
    one, two = run / "iter_0000001", run / "iter_0000002"
    for name in ("__0_0.distcp", "train_state.pt"):
        shutil.copy(one / name, two / name)
    (run / "energon/iter_0000002/train_dataloader_dprank000.pt").write_bytes(
        (run / "energon/iter_0000001/train_dataloader_dprank000.pt").read_bytes()
    )
    report = verify(two, deep=True)
    states = {each.path: each.state for each in report.files}
    assert states["train_state.pt"] is states["../energon/iter_0000002/train_dataloader_dprank000.pt"]
    assert states["train_state.pt"] is State.SWAPPED
    assert State.SWAPPED in {each.state for each in report.items}
    assert State.FLIPPED not in {each.state for each in report.items if each.offsets is not None}


def test_a_file_that_nothing_names_is_extra_and_no_defect(run: Path) -> None:
    (run / "iter_0000002/__7_0.distcp").write_bytes(b"of another save")
    report = verify(run / "iter_0000002", deep=True)
    assert report.is_sound
    assert [each.path for each in report.files if each.state is State.EXTRA] == ["__7_0.distcp"]


def test_a_save_that_has_not_ended_is_incomplete_and_no_defect(run: Path) -> None:
    unfinished = run / "iter_0000003"
    shutil.copytree(run / "iter_0000002", unfinished)
    (unfinished / "metadata.json").unlink()
    (unfinished / ".metadata").unlink()
    report = verify(run, deep=True)
    assert report.is_sound and report.checkpoints[2].verdict is Verdict.INCOMPLETE
    shutil.rmtree(run / "iter_0000001")
    unfinished.rename(run / "iter_0000001")  # the trackers name a later one
    assert verify(run).verdict is Verdict.DAMAGED


@pytest.mark.parametrize("name", TRACKERS)
def test_trackers_of_a_run(run: Path, name: str) -> None:
    path = run / name
    path.write_bytes(b"")
    report = verify(run)
    assert report.verdict is Verdict.DAMAGED
    assert [each.is_selected for each in report.checkpoints] == [False, True], "the other says so"
    (run / TRACKERS[0]).unlink(missing_ok=True)
    (run / TRACKERS[1]).write_text("7")
    report = verify(run)
    assert (
        report.verdict is Verdict.DAMAGED and "names iter_0000007, which does not exist" in report.damages[0]
    )


def test_the_directory_of_a_position_that_is_gone_is_noted(run: Path) -> None:
    shutil.rmtree(run / "energon")
    report = verify(run / "iter_0000002", deep=True)
    assert report.is_sound and "train_dataloader_dprank000.pt" in report.notes[0]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [60, pytest.param(None, marks=pytest.mark.long)])
def test_flips_in_the_sidecar_of_an_older_version_are_found(run: Path, count: int | None) -> None:
    step = run / "iter_0000002"
    make_older(step)
    assert verify(step, deep=True).is_sound
    sidecar = step / "ckpt_fast.json"
    missed = [at for at in flips(sidecar, count) if verify(step, deep=True).verdict is not Verdict.DAMAGED]
    assert missed == []
    missed = [at for at in flips(step / ".metadata", 20) if verify(step, deep=True).is_sound]
    assert missed == []


def test_no_pickle_is_run_even_if_that_is_allowed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_ALLOW_PICKLE", "1")
    mark = run / "mark"
    for name in (".metadata", "common.pt", "train_state.pt"):
        (run / "iter_0000002" / name).write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    (run / "latest_train_state.pt").write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    assert not verify(run, deep=True).is_sound
    assert not mark.exists()
