# SPDX-License-Identifier: Apache-2.0
"""The data loader's position on one and on two data-parallel ranks, and the tokenizer's files."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import ckpt_fast
from ckpt_fast.compat import SoloGroup
from ckpt_fast.config import TokenizerConfig
from ckpt_fast.errors import CheckpointError, UnsafeCheckpointError
from ckpt_fast.trainer.contents.sidecars import (
    maybe_load_dataloader_state,
    maybe_save_dataloader_state,
    resume_dataloader,
    save_tokenizer_assets,
)
from tests.helpers import run_ranks
from tests.models import Run, Setup
from tests.trainer.training import error_of, require


class Loader:
    """Counts samples, and can report and restore its position."""

    def __init__(self, position=0, fail=False):
        self.position, self.fail = position, fail
        self.saves = 0

    def save_state(self):
        self.saves += 1
        if self.fail:
            raise OSError("loader worker died")
        return {"position": self.position, "order": torch.arange(3), "rng": b"\x01\xff"}

    def restore_state(self, state):
        assert torch.equal(state["order"], torch.arange(3))
        assert state["rng"] == b"\x01\xff"
        self.position = state["position"]


def iterator(loader):
    return SimpleNamespace(iterable=loader)


class Group(SoloGroup):
    """The position of this process in a group that it never communicates with."""

    def __init__(self, rank=0):
        self._rank = rank

    def rank(self):
        return self._rank


def groups(dp=None, **ranks):
    names = {name: Group(ranks.get(name, 0)) for name in ("tp", "pp", "cp")}
    return SimpleNamespace(dp=dp or Group(), **names)


def file_of(root, rank=0, iteration=7):
    return Path(root) / f"iter_{iteration:07d}" / f"train_dataloader_dprank{rank:03d}.pt"


def test_round_trip(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    maybe_save_dataloader_state([], iterator(Loader(42)), 7, str(tmp_path), pg_collection=groups())
    assert "saving dataloader checkpoint at iteration 7" in caplog.text
    assert os.listdir(tmp_path) == ["iter_0000007"]
    stock = torch.load(file_of(tmp_path), weights_only=True)
    assert stock["dataloader_state_dict"]["position"] == 42
    loader = Loader()
    maybe_load_dataloader_state(iterator(loader), 7, str(tmp_path), pg_collection=groups())
    assert loader.position == 42


@pytest.mark.parametrize(
    ("train_iterator", "path"), [(None, "x"), (iterator(Loader()), None), (iterator(Loader()), ""), ([], "x")]
)
def test_nothing_to_save(train_iterator, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    maybe_save_dataloader_state([], train_iterator, 7, path, pg_collection=groups())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "train_iterator", [SimpleNamespace(iterable=object()), iter([]), [SimpleNamespace()]]
)
def test_an_iterator_that_cannot_say_where_it_is(train_iterator, tmp_path):
    with pytest.raises(RuntimeError, match="Could not find a save_state"):
        maybe_save_dataloader_state([], train_iterator, 7, str(tmp_path), pg_collection=groups())


@pytest.mark.parametrize("name", ["tp", "pp", "cp"])
def test_only_the_first_of_the_model_parallel_ranks_saves(name, tmp_path):
    loader = Loader()
    maybe_save_dataloader_state([], iterator(loader), 7, str(tmp_path), pg_collection=groups(**{name: 1}))
    assert loader.saves == 0
    assert os.listdir(tmp_path) == []


def test_groups_default_to_the_models(tmp_path):
    model = SimpleNamespace(pg_collection=groups(dp=Group(3)))
    maybe_save_dataloader_state([model], iterator(Loader()), 7, str(tmp_path))
    assert file_of(tmp_path, rank=3).exists()


def test_files_of_a_larger_data_parallel_size_do_not_survive(tmp_path):
    stale = file_of(tmp_path, rank=5)
    stale.parent.mkdir()
    stale.write_bytes(b"stale")
    maybe_save_dataloader_state([], iterator(Loader()), 7, str(tmp_path), pg_collection=groups())
    assert os.listdir(stale.parent) == ["train_dataloader_dprank000.pt"]


def test_iterators_of_virtual_pipeline_stages(tmp_path):
    stages = [iterator(Loader(4)), iterator(Loader(5))]
    maybe_save_dataloader_state([], stages, 7, str(tmp_path), pg_collection=groups())
    restored = [Loader(), Loader()]
    maybe_load_dataloader_state(
        [iterator(each) for each in restored], 7, str(tmp_path), pg_collection=groups()
    )
    assert [each.position for each in restored] == [4, 5]
    single = Loader()
    maybe_load_dataloader_state(iterator(single), 7, str(tmp_path), pg_collection=groups())
    assert single.position == 4


def test_one_state_serves_all_virtual_stages(tmp_path):
    maybe_save_dataloader_state([], [iterator(Loader(4)), None], 7, str(tmp_path), pg_collection=groups())
    restored = [Loader(), Loader()]
    maybe_load_dataloader_state(
        [iterator(each) for each in restored], 7, str(tmp_path), pg_collection=groups()
    )
    assert [each.position for each in restored] == [4, 4]


@pytest.mark.parametrize("path", [None, "", "missing", "."])
def test_nothing_to_restore(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = Loader(3)
    maybe_load_dataloader_state(iterator(loader), 7, path, pg_collection=groups())
    maybe_load_dataloader_state(None, 7, path, pg_collection=groups())
    maybe_load_dataloader_state(SimpleNamespace(iterable=object()), 7, path, pg_collection=groups())
    assert loader.position == 3


def test_a_larger_data_parallel_size_than_at_save(tmp_path):
    maybe_save_dataloader_state([], iterator(Loader()), 7, str(tmp_path), pg_collection=groups())
    with pytest.raises(RuntimeError, match="data-parallel size"):
        maybe_load_dataloader_state(iterator(Loader()), 7, str(tmp_path), pg_collection=groups(dp=Group(1)))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("PWNED",)


def test_a_hostile_file_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = file_of(tmp_path)
    path.parent.mkdir()
    torch.save({"dataloader_state_dict": Hostile()}, path)
    with pytest.raises(UnsafeCheckpointError, match="mkdir"):
        maybe_load_dataloader_state(iterator(Loader()), 7, str(tmp_path), pg_collection=groups())
    assert not (tmp_path / "PWNED").exists()


class WithCode:
    pass


def test_a_position_that_could_not_be_restored_is_not_saved(tmp_path):
    maybe_save_dataloader_state([], iterator(Loader(3)), 7, str(tmp_path), pg_collection=groups())
    loader = SimpleNamespace(save_state=lambda: {"sampler": WithCode()})
    with pytest.raises(CheckpointError, match=r"position of the data loader\[.*'sampler'\].*WithCode"):
        maybe_save_dataloader_state([], iterator(loader), 7, str(tmp_path), pg_collection=groups())
    again = Loader()
    maybe_load_dataloader_state(iterator(again), 7, str(tmp_path), pg_collection=groups())
    assert again.position == 3


# --- Two data-parallel ranks -----------------------------------------------------------------------------


def save_on_two(rank, root, failing):
    loader = Loader(10 + rank, fail=rank == failing)
    try:
        maybe_save_dataloader_state([], iterator(loader), 7, root, pg_collection=groups(dp=dist.group.WORLD))
    except CheckpointError as error:
        return str(error)
    restored = Loader()
    maybe_load_dataloader_state(iterator(restored), 7, root, pg_collection=groups(dp=dist.group.WORLD))
    return restored.position


def test_every_data_parallel_rank_has_its_own_file(tmp_path):
    stale = file_of(tmp_path, rank=2)
    stale.parent.mkdir()
    stale.write_bytes(b"of a run on three ranks")
    assert run_ranks(save_on_two, 2, str(tmp_path), None) == [10, 11]
    assert sorted(os.listdir(stale.parent)) == [file_of(tmp_path, rank).name for rank in (0, 1)]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_loader_fails_both(tmp_path, failing):
    answers = run_ranks(save_on_two, 2, str(tmp_path), failing, timeout_s=60)
    assert all(f"rank {failing}" in text and "loader worker died" in text for text in answers)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_made_fails_both(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    answers = run_ranks(save_on_two, 2, str(blocked), None, timeout_s=60)
    assert all("Not a directory" in text for text in answers)


def resume_with_data(rank, root):
    """Save twice, resume from a root, one directory and a recovery checkpoint, and from step 0."""
    setup, found = Setup(), {}
    with Run(setup, save=root, non_persistent_ckpt_type="global") as run:
        for step in (1, 2):
            run.train(1)
            loader = Loader(position=100 * step + rank)
            run.save(train_data_iterator=iterator(loader), non_persistent_ckpt=step == 2)
    sources = {
        "recovery": {"load": root, "save": root, "non_persistent_ckpt_type": "global"},
        "root": {"load": root},
        "directory": {"load": os.path.join(root, "iter_0000001")},
        "nothing": {"load": os.path.join(root, "nothing")},
    }
    for name, config in sources.items():
        with Run(setup, **config) as run:
            context, loader = {}, Loader(position=-1)
            run.load(checkpointing_context=context)
            resume_dataloader(run.state, iterator(loader), context)
            found[name] = loader.position
    with Run(setup, load=root) as run:
        run.load(checkpointing_context=context)
        for name, path in (("elsewhere", os.path.join(root, "other")), ("switched off", "")):
            loader = Loader(position=-1)
            run.state.cfg.dataset = SimpleNamespace(dataloader_load=path)
            resume_dataloader(run.state, iterator(loader), context)
            found[name] = loader.position
        run.state.cfg.dataset = None
        if rank == 1:
            os.unlink(file_of(os.path.join(root, "energon"), 1, 1))
        dist.barrier()
        found["lost on rank 1"] = error_of(lambda: resume_dataloader(run.state, iterator(loader), context))
    return found


def test_the_data_goes_on_where_the_loaded_checkpoint_left_it(tmp_path):
    assert ckpt_fast.resume_dataloader is resume_dataloader
    for rank, found in enumerate(run_ranks(resume_with_data, 2, str(tmp_path / "run"))):
        lost = found.pop("lost on rank 1")
        assert found == {
            "recovery": 200 + rank,
            "root": 100 + rank,
            "directory": 100 + rank,
            "nothing": -1,
            "elsewhere": -1,
            "switched off": -1,
        }
        require(lost, "RuntimeError", "dprank001", "data-parallel size")


# --- Tokenizer -------------------------------------------------------------------------------------------


class HFTokenizer:
    """Saves itself as Hugging Face tokenizers do."""

    def save_pretrained(self, directory):
        assert isinstance(directory, str)
        Path(directory, "tokenizer.json").write_text("{}")
        Path(directory, "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "MultimodalTokenizer"])
@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: SimpleNamespace(_tokenizer=inner)])
def test_tokenizers_that_save_themselves(kind, wrap, tmp_path):
    save_tokenizer_assets(wrap(HFTokenizer()), TokenizerConfig(tokenizer_type=kind), str(tmp_path))
    assert sorted(os.listdir(tmp_path / "tokenizer")) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_real_hugging_face_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "hello": 1, "world": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer")
    save_tokenizer_assets(SimpleNamespace(_tokenizer=tokenizer), config, str(tmp_path))
    back = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    assert back("hello there world")["input_ids"] == [1, 0, 2]


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("BertWordPieceLowerCase", {"vocab_file": "vocab.txt"}),
        ("BertWordPieceCase", {"vocab_file": "vocab.txt"}),
        ("GPT2BPETokenizer", {"vocab_file": "vocab.json", "merge_file": "merges.txt"}),
        ("SentencePieceTokenizer", {"tokenizer_model": "tokenizer.model"}),
        ("GPTSentencePieceTokenizer", {"tokenizer_model": "tokenizer.model"}),
        ("Llama2Tokenizer", {"tokenizer_model": "tokenizer.model"}),
        ("TikTokenizer", {"tokenizer_model": "tokenizer.json"}),
        ("NullTokenizer", {}),
        ("SomethingElse", {}),
    ],
)
def test_files_of_other_tokenizers(kind, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = {field: f"source_of_{field}" for field in ("vocab_file", "merge_file", "tokenizer_model")}
    for name in sources.values():
        Path(name).write_text(name)
    save_tokenizer_assets(object(), TokenizerConfig(tokenizer_type=kind, **sources), str(tmp_path / "ckpt"))
    saved = {path.name: path.read_text() for path in (tmp_path / "ckpt" / "tokenizer").iterdir()}
    assert saved == {name: sources[field] for field, name in files.items()}


def test_a_missing_source_is_left_out(tmp_path):
    config = TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file="/no/such", merge_file=None)
    save_tokenizer_assets(object(), config, str(tmp_path))
    assert os.listdir(tmp_path / "tokenizer") == []


def test_no_tokenizer(tmp_path):
    save_tokenizer_assets(None, TokenizerConfig(tokenizer_type="NullTokenizer"), str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_no_configuration(tmp_path):
    save_tokenizer_assets(object(), None, str(tmp_path))
    assert os.listdir(tmp_path) == ["tokenizer"]


def test_a_failure_is_logged_and_not_raised(tmp_path, caplog):
    def fail(directory):
        raise RuntimeError("tokenizer is broken")

    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer")
    save_tokenizer_assets(SimpleNamespace(save_pretrained=fail), config, str(tmp_path))
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "tokenizer is broken" in caplog.text


def save_tokenizer_on(rank, active, root):
    if rank == active:
        save_tokenizer_assets(HFTokenizer(), TokenizerConfig(tokenizer_type="HuggingFaceTokenizer"), root)


@pytest.mark.parametrize(("active", "expected"), [(0, ["tokenizer"]), (1, [])])
def test_rank_0_saves_the_tokenizer(active, expected, tmp_path):
    run_ranks(save_tokenizer_on, 2, active, str(tmp_path))
    assert os.listdir(tmp_path) == expected
