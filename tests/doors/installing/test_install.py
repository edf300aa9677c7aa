# SPDX-License-Identifier: Apache-2.0
"""What ``install`` changes, that it can be undone without a trace, and what it does not touch."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint import _storage_utils, filesystem, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

import ckpt_fast
from ckpt_fast import compat
from ckpt_fast.doors import install as installing
from ckpt_fast.errors import CheckpointError

WRITER = "torch.distributed.checkpoint.filesystem.FileSystemWriter"
KINDS = ("FileSystemWriter", "FileSystemReader", "TorchDistSaveShardedStrategy")
# Some versions of torch have no stream transforms, and one format.
OPTIONS = inspect.signature(FileSystemWriter.__init__).parameters


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert ckpt_fast.uninstall() == ()


def everything() -> dict[str, Any]:
    """Return what the names of torch DCP and dist_checkpointing mean, and those of their classes."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(("torch.distributed.checkpoint", "megatron.core.dist_checkpointing")):
            for name, value in vars(module).items():
                found[module_name, name] = value
                if isinstance(value, type):
                    found |= {(module_name, name, key): member for key, member in vars(value).items()}
                    found[module_name, name, "__init__"] = value.__init__
                if isinstance(value, dict) and name == "default_strategies":
                    found |= {
                        (module_name, name, action, place): type(strategy)
                        for action, strategies in value.items()
                        for place, strategy in strategies.items()
                    }
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> set[Any]:
    # What Python and ABCs keep for themselves changes by use.
    volatile = {"__annotations_cache__", "_abc_impl", "__abstractmethods__", "__annotate_func__"}
    names = {name for name in before.keys() | after.keys() if name[-1] not in volatile}
    return {name for name in names if before.get(name) is not after.get(name)}


def test_every_name_is_as_it_was(tmp_path: Path) -> None:
    compat.dist_checkpointing  # noqa: B018, imported, so that all its modules are
    before = everything()
    assert len(before) > 2000 and changes(before, everything()) == set()
    with ckpt_fast.install() as installed:
        assert WRITER in installed.changed
        assert any("TorchDistSaveShardedStrategy" in name for name in installed.changed)
        now = changes(before, everything())
        assert {name[1:] for name in now} >= {(kind, "__init__") for kind in KINDS}
        # Modules keep their names, but for those that one of them looks up.
        assert {name[0] for name in now if len(name) == 2} <= {state_dict_saver.__name__}
    assert changes(before, everything()) == set()
    assert type(FileSystemWriter(tmp_path)) is FileSystemWriter
    assert type(compat.TorchDistSaveShardedStrategy("torch_dist", 1)) is compat.TorchDistSaveShardedStrategy


def test_doors_are_chosen() -> None:
    with ckpt_fast.install(megatron=False) as installed:
        assert WRITER in installed.changed and not any("megatron" in name for name in installed.changed)
        assert type(torch_strategies.TorchDistLoadShardedStrategy()).__module__.startswith("megatron.")
        with ckpt_fast.install(torch_dcp=False) as inner:
            assert any("megatron" in name for name in inner.changed) and WRITER in inner.changed
            assert type(torch_strategies.TorchDistLoadShardedStrategy()) is ckpt_fast.FastLoadStrategy
        assert type(torch_strategies.TorchDistLoadShardedStrategy()).__module__.startswith("megatron.")
        assert isinstance(FileSystemWriter("x"), ckpt_fast.FastStorageWriter)
    with ckpt_fast.install(torch_dcp=False, megatron=False) as nothing:
        assert nothing.changed == () and type(FileSystemWriter("x")) is FileSystemWriter


def test_two_installations_are_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ckpt_fast"):
        first = ckpt_fast.install()
        assert ckpt_fast.install().changed == first.changed
        assert len(caplog.records) == 1 and WRITER in caplog.text
    assert set(ckpt_fast.uninstall()) == set(first.changed)
    assert type(FileSystemWriter("x")) is FileSystemWriter


def test_the_outer_block_stays(tmp_path: Path) -> None:
    with ckpt_fast.install():
        with ckpt_fast.install():
            pass
        assert isinstance(FileSystemWriter(tmp_path), ckpt_fast.FastStorageWriter)
        assert isinstance(compat.TorchDistLoadShardedStrategy(), ckpt_fast.FastLoadStrategy)
    assert type(FileSystemWriter(tmp_path)) is FileSystemWriter
    ckpt_fast.install()
    with ckpt_fast.install():
        pass
    assert isinstance(FileSystemWriter(tmp_path), ckpt_fast.FastStorageWriter)
    ckpt_fast.uninstall()


def test_a_block_undoes_nothing_of_a_later_installation(tmp_path: Path) -> None:
    with ckpt_fast.install():
        ckpt_fast.uninstall()
        ckpt_fast.install()
    assert isinstance(FileSystemWriter(tmp_path), ckpt_fast.FastStorageWriter)
    ckpt_fast.uninstall()


def test_objects_are_what_they_were(tmp_path: Path) -> None:
    stock = FileSystemWriter(tmp_path), compat.TorchDistLoadShardedStrategy()
    with ckpt_fast.install():
        assert isinstance(stock[0], FileSystemWriter) and isinstance(
            stock[1], compat.TorchDistLoadShardedStrategy
        )
        ours = FileSystemWriter(tmp_path), compat.TorchDistLoadShardedStrategy()
        assert type(copy.copy(stock[0])) is FileSystemWriter
        assert type(pickle.loads(pickle.dumps(stock[0]))) is FileSystemWriter
        assert type(pickle.loads(pickle.dumps(ours[0]))) is ckpt_fast.FastStorageWriter
    assert isinstance(ours[0], FileSystemWriter) and isinstance(ours[1], compat.TorchDistLoadShardedStrategy)


def test_wherever_it_has_been_imported(tmp_path: Path) -> None:
    make = functools.partial(FileSystemWriter, path=tmp_path)
    registry = {"writer": dcp.FileSystemWriter, "reader": dcp.FileSystemReader}

    def by_default(kind: Any = FileSystemReader) -> Any:
        return kind(tmp_path)

    with ckpt_fast.install(megatron=False):
        later = types.ModuleType("later")
        exec("from torch.distributed.checkpoint import FileSystemReader as Reader", vars(later))
        for writer in (make(), registry["writer"](tmp_path), _storage_utils._storage_setup(None, tmp_path)):
            assert isinstance(writer, ckpt_fast.FastStorageWriter)
        for reader in (by_default(), registry["reader"](str(tmp_path)), later.Reader(tmp_path)):
            assert isinstance(reader, ckpt_fast.FastStorageReader)
        assert inspect.signature(FileSystemWriter).parameters["overwrite"].default is True
    assert type(later.Reader(tmp_path)) is FileSystemReader


def test_arguments_are_those_of_torch(tmp_path: Path) -> None:
    with ckpt_fast.install(megatron=False):
        writer = FileSystemWriter(tmp_path, False, sync_files=False, thread_count=3, overwrite=False)
        assert isinstance(writer, ckpt_fast.FastStorageWriter)
        assert (writer._thread_count, writer.overwrite) == (3, False)
        assert writer.path == tmp_path and writer.fs.exists(tmp_path)
        with pytest.raises(TypeError):
            FileSystemWriter()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="colour"):
            FileSystemWriter(tmp_path, colour="red")  # type: ignore[call-arg]


def test_what_stays_stock(tmp_path: Path) -> None:
    with ckpt_fast.install(megatron=False):

        class Derived(FileSystemWriter):
            pass

        assert Derived.__mro__[1] is FileSystemWriter
        assert type(Derived(tmp_path)) is Derived
        assert type(FileSystemWriter("s3://bucket/run")) is FileSystemWriter
        assert type(FileSystemReader("s3://bucket/run")) is FileSystemReader
        if "_extensions" in OPTIONS:
            from tests.doors.dcp.transforms import Inverted

            assert type(FileSystemWriter(tmp_path, _extensions=[Inverted()])) is FileSystemWriter
        if "serialization_format" in OPTIONS:
            form = filesystem.SerializationFormat.SAFETENSORS
            assert type(FileSystemWriter(tmp_path, serialization_format=form)) is FileSystemWriter
        hugging_face = getattr(dcp, "HuggingFaceStorageWriter", None)
        if hugging_face is not None:
            pytest.importorskip("safetensors")
            assert type(hugging_face(str(tmp_path))) is hugging_face


def _with_another_argument(self: Any, path: str, streams: int) -> None: ...


@pytest.mark.parametrize("what", ["constructor", "method", "executor", "checkpointer"])
def test_what_is_not_known_is_named(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = state_dict_saver.__name__
    if what in ("executor", "checkpointer") and not hasattr(state_dict_saver, "AsyncCheckpointerType"):
        pytest.skip("this torch has no checkpointer types")
    if what == "constructor":
        monkeypatch.setattr(FileSystemReader, "__init__", _with_another_argument)
        named = "FileSystemReader.__init__ takes streams"
    elif what == "method":
        monkeypatch.setattr(filesystem.StorageWriter, "compact", lambda self: None, raising=False)
        named = "FileSystemWriter has compact"
    elif what == "executor":
        monkeypatch.delattr(state_dict_saver, "_ProcessBasedAsyncCheckpointExecutor")
        named = f"there is no {saver}._ProcessBasedAsyncCheckpointExecutor"
    else:
        kind = types.SimpleNamespace(name="DAEMON")
        monkeypatch.setattr(state_dict_saver, "AsyncCheckpointerType", [kind])
        named = f"{saver} has a checkpointer DAEMON"
    with pytest.raises(CheckpointError, match=rf"{named}.*. Nothing was installed"):
        ckpt_fast.install()
    assert installing._installed == {}
    monkeypatch.undo()
    assert type(FileSystemReader("x")) is FileSystemReader
