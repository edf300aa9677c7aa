# SPDX-License-Identifier: Apache-2.0
"""Configuration, retention and sidecars on ``msc://`` paths, with the real multi-storage-client."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from ckpt_fast.compat import MultiStorageClientFeature, SoloGroup
from ckpt_fast.config import CheckpointConfig, ConfigContainer, TokenizerConfig
from ckpt_fast.state import TrainState
from ckpt_fast.trainer.contents import sidecars
from ckpt_fast.trainer.experiment_loggers import append_to_progress_log
from ckpt_fast.trainer.places import retention, trackers
from tests.trainer.contents.test_sidecars import HFTokenizer, Loader, iterator

GROUPS = SimpleNamespace(dp=SoloGroup(), tp=None, pp=None, cp=None)

profiles = (f"store{number}" for number in itertools.count())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a URL for objects in ``tmp_path/run``. Profiles are cached, so each test has its own."""
    pytest.importorskip("multistorageclient")
    profile, config = next(profiles), tmp_path / "msc.yaml"
    provider = {"type": "file", "options": {"base_path": str(tmp_path)}}
    config.write_text(yaml.safe_dump({"profiles": {profile: {"storage_provider": provider}}}))
    monkeypatch.setenv("MSC_CONFIG", str(config))
    monkeypatch.setattr(MultiStorageClientFeature, "_enabled", True)  # newer Megatron-Core: off by default
    return f"msc://{profile}/run"


def test_configuration(root: str, tmp_path: Path):
    cfg = ConfigContainer(checkpoint=CheckpointConfig(save=root, pretrained_checkpoint=root))
    with pytest.raises(AssertionError, match="does not exist"):
        cfg.checkpoint.finalize()
    cfg.to_yaml(f"{root}/run_config.yaml")
    assert (tmp_path / "run" / "run_config.yaml").exists()
    cfg.checkpoint.finalize()
    assert ConfigContainer.from_yaml(f"{root}/run_config.yaml").checkpoint == cfg.checkpoint


def test_retention_keeps_what_the_tracker_names(root: str, tmp_path: Path):
    for iteration in (1, 2, 3):
        checkpoint = tmp_path / "run" / f"iter_{iteration:07d}"
        checkpoint.mkdir(parents=True)
        for name in (".metadata", "metadata.json", "__0_0.distcp"):
            (checkpoint / name).write_bytes(b"x")
    trackers.publish_trackers(root, 2, TrainState(step=2).state_dict())
    retention.cleanup_old_non_persistent_checkpoint(root, leave_ckpt_num=1)
    left = sorted(path.name for path in (tmp_path / "run").glob("iter_*"))
    assert left == ["iter_0000002", "iter_0000003"]


def test_retention_does_not_count_what_was_never_finished(root: str, tmp_path: Path):
    for iteration, names in ((1, [".metadata"]), (2, []), (3, [".metadata"])):
        checkpoint = tmp_path / "run" / f"iter_{iteration:07d}"
        checkpoint.mkdir(parents=True)
        for name in ("__0_0.distcp", *names):
            (checkpoint / name).write_bytes(b"x")
    trackers.publish_trackers(root, 3, TrainState(step=3).state_dict())
    retention.cleanup_old_non_persistent_checkpoint(root, leave_ckpt_num=2)
    left = sorted(path.name for path in (tmp_path / "run").glob("iter_*"))
    assert left == ["iter_0000001", "iter_0000003"]


def test_dataloader_state(root: str, tmp_path: Path):
    stale = tmp_path / "run" / "iter_0000007" / "train_dataloader_dprank003.pt"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"stale")
    sidecars.maybe_save_dataloader_state([], iterator(Loader(5)), 7, root, pg_collection=GROUPS)
    assert not stale.exists()
    loader = Loader()
    sidecars.maybe_load_dataloader_state(iterator(loader), 7, root, pg_collection=GROUPS)
    assert loader.position == 5


def test_tokenizer(root: str, tmp_path: Path):
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer")
    sidecars.save_tokenizer_assets(HFTokenizer(), config, f"{root}/iter_0000007")
    saved = tmp_path / "run" / "iter_0000007" / "tokenizer"
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_tokenizer_files_that_are_objects_themselves(root: str, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vocab").write_bytes(b"words")
    config = TokenizerConfig(tokenizer_type="BertWordPieceCase", vocab_file=f"{root}/vocab")
    sidecars.save_tokenizer_assets(object(), config, str(tmp_path / "local"))
    assert (tmp_path / "local" / "tokenizer" / "vocab.txt").read_bytes() == b"words"


def test_progress_log(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    append_to_progress_log(root, "first")
    append_to_progress_log(root, "second")
    lines = (tmp_path / "run" / "progress.txt").read_text().splitlines()
    assert [line.rpartition("\t")[2] for line in lines] == ["first", "second"]


def test_train_state_tracker_is_safe_to_load(root: str, tmp_path: Path):
    trackers.publish_trackers(root, 2, TrainState(step=2).state_dict())
    tracker = tmp_path / "run" / "latest_train_state.pt"
    assert torch.load(tracker, weights_only=True)["step"].item() == 2
