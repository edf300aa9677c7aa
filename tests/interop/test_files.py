# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint, examined without ckpt_fast and without megatron-core."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ckpt_fast import native
from tests.helpers import run_ranks
from tests.manifests import manifest_lies, without_ids
from tests.models import Run, Setup, differences, other

SETUP = Setup(distributed=True, bf16=True)


def save(rank: int, root: str) -> None:
    with Run(SETUP, save=root, storage_writers_per_rank=2) as run:
        run.train(1)
        run.save()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint of two data-parallel ranks with two files each."""
    root = tmp_path_factory.mktemp("files")
    run_ranks(save, 2, str(root))
    return root / "iter_0000001"


@pytest.fixture(scope="module")
def metadata(checkpoint: Path) -> Metadata:
    return FileSystemReader(checkpoint).read_metadata()


def items(checkpoint: Path, metadata: Metadata) -> list[tuple[MetadataIndex, bytes]]:
    found = []
    for index, info in metadata.storage_data.items():
        data = (checkpoint / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        assert len(data) == info.length
        found.append((index, data))
    return found


def test_every_item_is_an_archive_that_torch_reads(checkpoint: Path, metadata: Metadata) -> None:
    tensors = 0
    for index, data in items(checkpoint, metadata):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None, index
        value = torch.load(io.BytesIO(data), weights_only=True)
        entry = metadata.state_dict_metadata[index.fqn]
        if not isinstance(entry, TensorStorageMetadata):
            assert isinstance(value, list)
            continue
        (chunk,) = [chunk for chunk in entry.chunks if chunk.offsets == index.offset]
        assert (value.shape, value.dtype) == (chunk.sizes, entry.properties.dtype)
        assert value.is_contiguous()
        tensors += 1
    assert tensors > 20


def test_checksums_are_of_the_data(checkpoint: Path, metadata: Metadata) -> None:
    index, data = next(
        (index, data) for index, data in items(checkpoint, metadata) if index.fqn == "output_layer.weight"
    )
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        raw = archive.read("archive/data/0")
        assert zlib.crc32(raw) == archive.getinfo("archive/data/0").CRC
        assert archive.getinfo("archive/data/0").compress_type == zipfile.ZIP_STORED
    assert any(raw), index

    damaged = bytearray(data)
    damaged[data.index(raw) + len(raw) // 2] ^= 1
    with zipfile.ZipFile(io.BytesIO(damaged)) as archive:
        assert archive.testzip() == "archive/data/0"


class NamesOnly(pickle.Unpickler):
    """Records the classes and functions that a pickle names."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.names: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add((module, name))
        return super().find_class(module, name)


def test_metadata_names_torch_alone(checkpoint: Path) -> None:
    with (checkpoint / ".metadata").open("rb") as file:
        unpickler = NamesOnly(file)
        unpickler.load()
    assert len(unpickler.names) > 5
    assert {module.partition(".")[0] for module, _ in unpickler.names} <= {"torch", "collections"}


def test_seal_is_what_every_version_understands(checkpoint: Path) -> None:
    assert json.loads((checkpoint / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    assert dist_checkpointing.check_is_distributed_checkpoint(str(checkpoint))


def test_directory_holds_nothing_else(checkpoint: Path) -> None:
    data = {f"__{rank}_{number}.distcp" for rank in range(2) for number in range(2)}
    around = {"run_config.yaml", "train_state.pt"}
    assert {path.name for path in checkpoint.iterdir()} == {
        ".metadata",
        "metadata.json",
        "common.pt",
        *data,
        *around,
    }
    assert {path.name for path in checkpoint.parent.iterdir()} == {
        "iter_0000001",
        "latest_train_state.pt",
        "latest_checkpointed_iteration.txt",
    }


def test_manifest_tells_the_truth(checkpoint: Path) -> None:
    assert manifest_lies(checkpoint) == []


def save_and_resume(rank: int, root: str) -> dict[str, Any]:
    with Run(SETUP, save=root) as run:
        run.train(1)
        run.save()
    with Run(other(SETUP), load=root) as run:
        run.load()
        return run.fingerprint()


def test_native_and_fallback_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes on disk and the same run from them, whichever implementation moved them."""
    if native.engine().__name__.endswith("fallback"):
        pytest.skip("the engine is not built")
    root, contents, resumed = tmp_path / "root", [], []
    for choice in ("1", "0"):
        monkeypatch.setenv("CKPT_FAST_NATIVE", choice)
        resumed.append(run_ranks(save_and_resume, 2, str(root)))
        contents.append({path.name: path.read_bytes() for path in (root / "iter_0000001").iterdir()})
        contents[-1][".metadata"] = without_ids(contents[-1][".metadata"])
        root.rename(tmp_path / choice)
    assert contents[0] == contents[1]
    assert [differences(one, other) for one, other in zip(*resumed, strict=True)] == [[], []]
