# SPDX-License-Identifier: Apache-2.0
"""Names of a checkpoint's files, and what a directory is recognized as."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ckpt_fast import compat
from ckpt_fast.trainer.places import paths


@pytest.fixture
def stored_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a multi-storage-client profile "store" whose objects are files under the returned directory."""
    pytest.importorskip("multistorageclient")
    config = tmp_path / "msc.yaml"
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    config.write_text(
        f"profiles:\n  store:\n    storage_provider:\n      type: file\n      options:\n"
        f"        base_path: {bucket}\n"
    )
    monkeypatch.setenv("MSC_CONFIG", str(config))
    monkeypatch.setattr(compat.MultiStorageClientFeature, "_enabled", True)
    return bucket


def test_names() -> None:
    assert paths.get_checkpoint_name("/c", 1000) == "/c/iter_0001000"
    assert paths.get_checkpoint_name("/c", 12345678) == "/c/iter_12345678"
    assert paths.get_checkpoint_name("/c", 5, release=True) == "/c/release"
    assert paths.get_checkpoint_train_state_filename("/c") == "/c/train_state.pt"
    assert paths.get_checkpoint_train_state_filename("/c", prefix="latest") == "/c/latest_train_state.pt"
    assert paths.get_checkpoint_run_config_filename("/c") == "/c/run_config.yaml"
    assert paths.get_checkpoint_tracker_filename("/c") == "/c/latest_checkpointed_iteration.txt"


def test_join_keeps_the_scheme_of_a_url() -> None:
    assert paths.join_paths("msc://store/run", "iter_0000001", "x") == "msc://store/run/iter_0000001/x"
    with pytest.raises(ValueError, match="at least one"):
        paths.join_paths()


@pytest.mark.parametrize("marker", ["run_config.yaml", "train_state.pt", "metadata.json", ".metadata"])
def test_any_marker_makes_an_iteration_directory(tmp_path: Path, marker: str) -> None:
    assert not paths.is_checkpoint_iteration_directory(str(tmp_path))
    (tmp_path / marker).touch()
    assert paths.is_checkpoint_iteration_directory(str(tmp_path))
    assert paths.checkpoint_exists(str(tmp_path))


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_path_is_not_a_checkpoint(nothing: str | None) -> None:
    assert not paths.is_checkpoint_iteration_directory(nothing)
    assert not paths.checkpoint_exists(nothing)
    assert not paths.is_hf_checkpoint_dir(nothing)


@pytest.mark.parametrize("tracker", ["latest_train_state.pt", "latest_checkpointed_iteration.txt"])
def test_a_root_exists_with_either_tracker(tmp_path: Path, tracker: str) -> None:
    (tmp_path / "iter_0000001").mkdir()
    assert not paths.checkpoint_exists(str(tmp_path))
    (tmp_path / tracker).touch()
    assert paths.checkpoint_exists(str(tmp_path))
    assert not paths.is_checkpoint_iteration_directory(str(tmp_path))


def test_a_directory_in_the_trackers_place_is_not_a_tracker(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").mkdir()
    assert not paths.checkpoint_exists(str(tmp_path))


@pytest.mark.parametrize(
    "weights",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model-00001-of-00002.safetensors",
        "pytorch_model-00001-of-00002.bin",
    ],
)
def test_hf_directory_needs_config_and_weights(tmp_path: Path, weights: str) -> None:
    (tmp_path / weights).touch()
    assert not paths.is_hf_checkpoint_dir(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert paths.is_hf_checkpoint_dir(str(tmp_path))


def test_hf_adapters_are_not_a_model(tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    assert not paths.is_hf_checkpoint_dir(str(tmp_path))


def test_hf_weights_are_found_in_a_directory_whose_name_is_a_pattern(tmp_path: Path) -> None:
    directory = tmp_path / "run[1]"
    directory.mkdir()
    (directory / "config.json").touch()
    (directory / "model-00001-of-00002.safetensors").touch()
    assert paths.is_hf_checkpoint_dir(str(directory))


def test_hf_model_id(tmp_path: Path) -> None:
    for name, model in (
        ("iter_0000002", "hf_model_id: old"),
        ("iter_0000010", "hf_model_id: new"),
        ("iter_best", "hf_model_id: stray"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run_config.yaml").write_text(f"model:\n  {model}\n")
    assert paths.get_hf_model_id_from_checkpoint(str(tmp_path)) == "new"
    assert paths.get_hf_model_id_from_checkpoint(str(tmp_path / "iter_0000002")) == "old"

    (tmp_path / "run_config.yaml").write_text(
        "model:\n  hf_model_id: plain\n  extra_checkpoint_metadata:\n    hf_model_id: extra\n"
    )
    assert paths.get_hf_model_id_from_checkpoint(str(tmp_path)) == "extra"
    (tmp_path / "run_config.yaml").write_text("")
    assert paths.get_hf_model_id_from_checkpoint(str(tmp_path)) is None


def test_hf_model_id_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        paths.get_hf_model_id_from_checkpoint(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError):
        paths.get_hf_model_id_from_checkpoint(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        paths.get_hf_model_id_from_checkpoint(str(tmp_path / "file"))


def test_ensure_directory_exists(tmp_path: Path) -> None:
    paths.ensure_directory_exists(str(tmp_path / "a" / "b" / "file"))
    assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b" / "file").exists()
    paths.ensure_directory_exists(str(tmp_path / "c"), check_parent=False)
    assert (tmp_path / "c").is_dir()
    paths.ensure_directory_exists("file-in-the-working-directory")


def test_write_file_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    paths.write_file(str(path), b"first")
    paths.write_file(str(path), b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_objects_are_found_written_and_read(stored_objects: Path) -> None:
    root = "msc://store/run"
    paths.write_file(paths.join_paths(root, "iter_0000007", "run_config.yaml"), b"model:\n  hf_model_id: m\n")
    assert (stored_objects / "run" / "iter_0000007" / "run_config.yaml").exists()
    assert paths.is_checkpoint_iteration_directory(paths.get_checkpoint_name(root, 7))
    assert not paths.is_checkpoint_iteration_directory(paths.get_checkpoint_name(root, 8))
    assert not paths.checkpoint_exists(root)
    paths.write_file(paths.get_checkpoint_tracker_filename(root), b"7")
    assert paths.checkpoint_exists(root)
    assert paths.get_hf_model_id_from_checkpoint(root) == "m"


def test_ordinary_paths_stay_local_with_object_storage_on(stored_objects: Path, tmp_path: Path) -> None:
    assert paths.object_storage(str(tmp_path / "file")) is None
    assert paths.object_storage("relative") is None
    assert paths.object_storage("msc://store/file") is not None


def test_objects_with_object_storage_off(stored_objects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.MultiStorageClientFeature, "_enabled", False)
    with pytest.raises(compat.UnavailableError, match=r"msc://store/run.*MultiStorageClientFeature\.enable"):
        paths.checkpoint_exists("msc://store/run")
    monkeypatch.setitem(sys.modules, "multistorageclient", None)
    with pytest.raises(compat.UnavailableError, match="install multi-storage-client"):
        paths.write_file("msc://store/run/file", b"")
