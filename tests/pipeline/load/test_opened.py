# SPDX-License-Identifier: Apache-2.0
"""An open checkpoint: every part is read once, and everyone gets what was read first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError
from ckpt_fast.format.types import TensorShard
from ckpt_fast.pipeline.load.complete import require_complete
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.storage.files import Directory
from tests.saves import save


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    value = torch.arange(6.0)
    shards = [TensorShard("a", value, (0,), (6,))]
    save(shards, str(tmp_path), common_files={"notes": b"as saved", "other": b"as saved"}, writers=1)
    return tmp_path


def opened(directory: Path, *wanted: str) -> OpenCheckpoint:
    return OpenCheckpoint(Directory(str(directory)), wanted)


def test_what_is_wanted_is_read_once(directory: Path) -> None:
    checkpoint = opened(directory, "notes")
    assert checkpoint.read("notes") == checkpoint.read("other") == b"as saved"
    (directory / "notes").write_bytes(b"replaced")
    (directory / "other").write_bytes(b"replaced")
    assert (checkpoint.read("notes"), checkpoint.read("other")) == (b"as saved", b"replaced")
    assert (checkpoint.take("notes"), checkpoint.take("notes")) == (b"as saved", b"replaced")


def test_what_is_forgotten_is_read_again(directory: Path) -> None:
    checkpoint = opened(directory, "notes")
    checkpoint.read("notes")
    (directory / "notes").write_bytes(b"replaced")
    checkpoint.forget()
    assert checkpoint.read("notes") == b"replaced"


def test_what_is_compared_is_what_is_decoded(directory: Path) -> None:
    checkpoint = opened(directory, "notes")
    require_complete(checkpoint)
    (directory / "notes").write_bytes(b"replaced")
    assert checkpoint.read("notes") == b"as saved"


def test_what_was_replaced_before_it_was_read_is_found(directory: Path) -> None:
    (directory / "notes").write_bytes(b"AS SAVED")
    for checkpoint in (opened(directory), opened(directory, "notes")):
        with pytest.raises(CheckpointCorruptError, match=r"notes has CRC-32 \w+ instead of"):
            require_complete(checkpoint)


def test_metadata_is_parsed_once(directory: Path) -> None:
    checkpoint = opened(directory)
    manifest = checkpoint.manifest
    (directory / ".metadata").unlink()
    assert checkpoint.index.tensor("a").shape == (6,)
    assert checkpoint.index is checkpoint.index
    assert checkpoint.contents.manifest is manifest
    assert checkpoint.is_own
    checkpoint.close()
    with pytest.raises(CheckpointNotFoundError, match=r"it has no \.metadata"):
        _ = checkpoint.index


def test_what_is_there(directory: Path) -> None:
    (directory / "unreadable").mkdir()
    checkpoint = opened(directory)
    assert [checkpoint.holds(name) for name in ("notes", "unreadable", "absent")] == [True, True, False]
