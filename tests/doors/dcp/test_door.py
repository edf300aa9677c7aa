# SPDX-License-Identifier: Apache-2.0
"""The torch DCP door on one rank behaves like torch's writer and reader, and each reads the other's files."""

from __future__ import annotations

import importlib.util
import inspect
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from ckpt_fast import FastStorageReader, FastStorageWriter
from ckpt_fast.pipeline.load.index import CheckpointIndex
from tests.doors.dcp.states import blank, differences, odd_tensors, training_state
from tests.manifests import manifest_lies
from tests.storage.test_space import file_system

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]

WRITERS: dict[str, Callable[[Path], Any]] = {
    "ours": FastStorageWriter,
    "ours-2-files": lambda path: FastStorageWriter(path, thread_count=2),
    "stock": dcp.FileSystemWriter,
    "stock-2-threads": lambda path: dcp.FileSystemWriter(path, thread_count=2),
    "stock-file-per-item": lambda path: dcp.FileSystemWriter(path, single_file_per_rank=False),
}
READERS: dict[str, Callable[[Path], Any]] = {"ours": FastStorageReader, "stock": dcp.FileSystemReader}
HAVE_TRANSFORMS = importlib.util.find_spec("torch.distributed.checkpoint._extension") is not None
if HAVE_TRANSFORMS:
    from tests.doors.dcp.transforms import Inverted, registry

    WRITERS["stock-transformed"] = lambda path: dcp.FileSystemWriter(path, _extensions=[Inverted()])
    READERS["ours"] = lambda path: FastStorageReader(path, _extension_registry=registry())
    READERS["stock"] = lambda path: dcp.FileSystemReader(path, _extension_registry=registry())
PAIRS = [(writer, reader) for writer in WRITERS for reader in READERS if "ours" in writer + reader]


def save(directory: Path, state: dict[str, Any], **options: Any) -> Metadata:
    return dcp.save(state, storage_writer=FastStorageWriter(directory), **options)


def load(directory: Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    dcp.load(state, storage_reader=FastStorageReader(directory), **options)
    return state


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_training_state(writer: str, reader: str, tmp_path: Path) -> None:
    expected = training_state()
    dcp.save(expected, storage_writer=WRITERS[writer](tmp_path))
    found = blank(expected)
    dcp.load(found, storage_reader=READERS[reader](tmp_path))
    assert differences(expected, found) == []


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_odd_tensors(writer: str, reader: str, tmp_path: Path) -> None:
    expected = odd_tensors()
    dcp.save(expected, storage_writer=WRITERS[writer](tmp_path))
    found = blank(expected)
    dcp.load(found, storage_reader=READERS[reader](tmp_path))
    assert differences(expected, found) == []


def test_tensors_are_loaded_in_place(tmp_path: Path) -> None:
    expected = odd_tensors()
    save(tmp_path, expected)
    found = odd_tensors(seed=1)
    del found["expanded"]  # cannot be written to
    before = {name: tensor.data_ptr() for name, tensor in found.items()}
    load(tmp_path, found)
    del expected["expanded"]
    assert differences(expected, found) == []
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == before


def test_load_converts_to_the_dtype_wanted(tmp_path: Path) -> None:
    saved = {"w": torch.randn(40, 30)}
    save(tmp_path, saved)
    found = load(tmp_path, {"w": torch.zeros(40, 30, dtype=torch.bfloat16)})
    assert torch.equal(found["w"], saved["w"].bfloat16())


def test_quantized_tensors_are_what_torch_makes_of_them(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.randn(50), 0.1, 3, torch.qint8)
    save(tmp_path / "ours", {"q": quantized})
    dcp.save({"q": quantized}, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"))
    for directory in (tmp_path / "ours", tmp_path / "stock"):
        found = load(directory, {"q": torch.quantize_per_tensor(torch.zeros(50), 0.1, 3, torch.qint8)})
        assert torch.equal(found["q"].int_repr(), quantized.int_repr())


def test_sparse_tensor_is_saved_as_torch_saves_it(tmp_path: Path) -> None:
    sparse = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]]).to_sparse()
    save(tmp_path, {"s": sparse})
    index = CheckpointIndex(str(tmp_path))
    (item,) = index.metadata.storage_data.values()
    content = (tmp_path / item.relative_path).read_bytes()[item.offset : item.offset + item.length]
    assert torch.equal(torch.load(io.BytesIO(content)).to_dense(), sparse.to_dense())


def test_tuples_are_stored_whole(tmp_path: Path) -> None:
    state = {"pair": (torch.randn(1000), 3)}
    save(tmp_path, state)
    found: dict[str, Any] = {"pair": None}
    load(tmp_path, found)
    assert differences(state, found) == []


def test_partial_load(tmp_path: Path) -> None:
    expected = training_state()
    save(tmp_path, expected)
    some = {"model": {"0.weight": torch.zeros(96, 48)}, "step": 0}
    load(tmp_path, some)
    assert torch.equal(some["model"]["0.weight"], expected["model"]["0.weight"]) and some["step"] == 17

    more = {"step": 0, "unheard of": torch.full((3,), 5.0)}
    with pytest.raises(CheckpointException, match="unheard of"):
        load(tmp_path, dict(more))
    load(tmp_path, more, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    assert more["step"] == 17 and torch.equal(more["unheard of"], torch.full((3,), 5.0))

    rebuilt = _load_state_dict_from_keys("model", storage_reader=FastStorageReader(tmp_path))
    assert differences(expected["model"], rebuilt["model"]) == []


def test_target_of_another_shape_is_refused(tmp_path: Path) -> None:
    class Careless(dcp.DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            return torch.zeros(2)

    save(tmp_path, {"w": torch.randn(1 << 20)})
    with pytest.raises(CheckpointException, match=r"w .*\(1048576,\).*\(2,\)"):
        load(tmp_path, {"w": torch.zeros(1 << 20)}, planner=Careless())


def test_checkpoint_id_moves_writer_and_reader(tmp_path: Path) -> None:
    writer, reader = FastStorageWriter(tmp_path / "unused"), FastStorageReader(tmp_path / "unused")
    for step in (1, 2):
        directory = tmp_path / f"step_{step}"
        metadata = dcp.save({"w": torch.full((9,), step)}, checkpoint_id=directory, storage_writer=writer)
        assert writer.checkpoint_id == metadata.storage_meta.checkpoint_id == str(directory)
    assert not (tmp_path / "unused").exists()
    for step in (1, 2):
        state = {"w": torch.zeros(9, dtype=torch.int64)}
        dcp.load(state, checkpoint_id=tmp_path / f"step_{step}", storage_reader=reader)
        assert torch.equal(state["w"], torch.full((9,), step))
    assert FastStorageWriter.validate_checkpoint_id("/some/path")
    assert not FastStorageReader.validate_checkpoint_id("s3://bucket/path")


def test_overwriting(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.zeros(5), "gone": torch.ones(70000)})
    save(tmp_path, {"w": torch.ones(5)})
    assert torch.equal(load(tmp_path, {"w": torch.zeros(5)})["w"], torch.ones(5))
    assert manifest_lies(tmp_path) == []
    with pytest.raises(CheckpointException, match="overwrite is False"):
        dcp.save({"w": torch.zeros(5)}, storage_writer=FastStorageWriter(tmp_path, overwrite=False))
    assert torch.equal(load(tmp_path, {"w": torch.zeros(5)})["w"], torch.ones(5))
    dcp.save({"w": torch.zeros(5)}, storage_writer=FastStorageWriter(tmp_path / "new", overwrite=False))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"w": torch.zeros(1000)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    file_system(monkeypatch, free=50_000)
    save(tmp_path / "fits", {"w": torch.zeros(1000)})
    with pytest.raises(CheckpointException, match=r"0\.00 GB free.*Nothing was written"):
        save(tmp_path, {"w": torch.zeros(1000), "v": torch.zeros(100, 1000)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_no_files_of_one_rank_is_a_checkpoint_too(tmp_path: Path) -> None:
    save(tmp_path, {})
    assert {path.name for path in tmp_path.iterdir()} == {".metadata"}
    load(tmp_path, {})


@pytest.mark.parametrize("files", [1, 3])
def test_directory(files: int, tmp_path: Path) -> None:
    dcp.save(training_state(), storage_writer=FastStorageWriter(tmp_path, thread_count=files))
    data = {f"__0_{number}.distcp" for number in range(files)}
    assert {path.name for path in tmp_path.iterdir()} == {".metadata", *data}
    assert manifest_lies(tmp_path) == []


def test_report(tmp_path: Path) -> None:
    writer = FastStorageWriter(tmp_path, thread_count=2)
    assert writer.report is None
    transposed = torch.randn(100, 50).t()
    for step in (1, 2):
        dcp.save({"w": torch.ones(100), "t": transposed}, storage_writer=writer)
        report = writer.report
        assert report is not None and (report.directory, report.files) == (str(tmp_path), 2)
        assert report.nbytes == sum(path.stat().st_size for path in tmp_path.glob("*.distcp"))
        assert 0 < report.stall_s == report.seconds
        assert {"plan", "stage", "encode", "write"} <= report.steps.keys()
        if step == 2:
            assert report.host_memory_allocated == 0


class Names(pickle.Unpickler):
    """Records the globals of a pickle, and the state it gives to TensorProperties."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.names: set[str] = set()
        self.properties: list[Any] = []

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        if name != "TensorProperties":
            return super().find_class(module, name)
        states = self.properties

        class Properties:
            def __setstate__(self, state: Any) -> None:
                states.append(state)

        return Properties


def test_metadata_is_what_every_torch_reads(tmp_path: Path) -> None:
    state = training_state()
    metadata = save(tmp_path, state)
    names = Names((tmp_path / ".metadata").open("rb"))
    unpickled = names.load()
    assert {name.partition(".")[0] for name in names.names} == {"torch"}
    # One object for all tensors of a dtype: the file is shorter and faster to read.
    assert len(names.properties) == 3 and {len(properties) for properties in names.properties} == {5}
    assert {type(info) for info in unpickled.storage_data.values()} == {_StorageInfo}
    assert unpickled.storage_data == metadata.storage_data
    assert unpickled.planner_data["trainer.losses"] == ("trainer", "losses")
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"))
    stock = dcp.FileSystemReader(tmp_path / "stock").read_metadata()
    for entry in stock.state_dict_metadata.values():
        if hasattr(getattr(entry, "properties", None), "strides"):
            entry.properties.strides = None
    ours = dcp.FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == stock.state_dict_metadata == metadata.state_dict_metadata
    assert ours.planner_data == stock.planner_data
    assert getattr(ours, "version", None) == getattr(stock, "version", None)


class Custom:
    """Not plain data: loading it runs code."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom)

    def __hash__(self) -> int:
        return 1


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_objects_that_are_not_plain_data(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAST_ON_UNLOADABLE", "warn")
    dcp.save({"object": Custom(), "w": torch.ones(4)}, storage_writer=WRITERS[writer](tmp_path))
    assert torch.equal(load(tmp_path, {"w": torch.zeros(4)})["w"], torch.ones(4))
    with pytest.raises(
        CheckpointException, match=r"(?s)UnsafeCheckpointError.*object in .*CKPT_FAST_ALLOW_PICKLE=1"
    ):
        load(tmp_path, {"object": None})
    monkeypatch.setenv("CKPT_FAST_ALLOW_PICKLE", "1")
    assert load(tmp_path, {"object": None})["object"] == Custom()


@pytest.mark.skipif(not HAVE_TRANSFORMS, reason="needs torch 2.7, for its stream transforms")
def test_unknown_transform_is_named(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(4)}, storage_writer=WRITERS["stock-transformed"](tmp_path))
    with pytest.raises(CheckpointException, match=r"CheckpointMismatchError.*test\.inverted"):
        load(tmp_path, {"w": torch.zeros(4)})


def flip(directory: Path, content: bytes, at: int) -> None:
    """Flip a bit of the only data file, ``at`` bytes into the only occurrence of ``content``."""
    (path,) = directory.glob("*.distcp")
    data = bytearray(path.read_bytes())
    assert data.count(content) == 1
    data[data.index(content) + at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_a_flipped_bit_is_noticed(writer: str, tmp_path: Path) -> None:
    state = {"w": torch.randn(5000), "words": "once upon a time"}
    for wrong, content in (("w", state["w"].numpy().tobytes()), ("words", b"once upon a time")):
        directory = tmp_path / wrong
        dcp.save(state, storage_writer=WRITERS[writer](directory))
        flip(directory, content, 5)
        (sound,) = state.keys() - {wrong}
        load(directory, {sound: blank(state[sound])})
        with pytest.raises(CheckpointException, match=rf"CheckpointCorruptError.*{wrong} in .*damaged"):
            load(directory, {wrong: blank(state[wrong])})


def with_byteorder(item: bytes, byteorder: bytes | None) -> bytes:
    """Return the item with another byteorder member and the same data; None removes the member."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(item)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            if not name.endswith("byteorder"):
                new.writestr(name, old.read(name))
            elif byteorder is not None:
                new.writestr(name, byteorder)
    return out.getvalue()


@pytest.mark.parametrize("byteorder", [b"little", b"big", None])
def test_items_of_machines_with_another_byte_order(byteorder: bytes | None, tmp_path: Path) -> None:
    saved = torch.arange(1000, dtype=torch.int32)
    dcp.save({"w": saved}, storage_writer=dcp.FileSystemWriter(tmp_path))
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    ((index, info),) = metadata.storage_data.items()
    item = with_byteorder((tmp_path / info.relative_path).read_bytes(), byteorder)
    (tmp_path / info.relative_path).write_bytes(item)
    metadata.storage_data = {index: _StorageInfo(info.relative_path, 0, len(item))}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))

    stock = {"w": torch.zeros(1000, dtype=torch.int32)}
    dcp.load(stock, storage_reader=dcp.FileSystemReader(tmp_path))
    assert (stock["w"][1] == 1 << 24) == (byteorder == b"big")
    assert torch.equal(load(tmp_path, {"w": torch.zeros(1000, dtype=torch.int32)})["w"], stock["w"])


def test_fast_path_is_taken_for_stock_items(tmp_path: Path) -> None:
    dcp.save(
        {"w": torch.randn(300, 300), "half": torch.randn(7).half(), "t": torch.randn(5, 6).t()},
        storage_writer=dcp.FileSystemWriter(tmp_path),
    )
    index = CheckpointIndex(str(tmp_path))
    for fqn, fast in (("w", True), ("half", True), ("t", False)):
        tensor = index.tensor(fqn)
        located = index.locate([(tensor.dtype, piece) for piece in tensor.pieces])
        assert [raw is not None for raw in located.values()] == [fast], fqn


@pytest.mark.parametrize(
    ("ours", "stock"), [(FastStorageWriter, dcp.FileSystemWriter), (FastStorageReader, dcp.FileSystemReader)]
)
def test_arguments_are_those_of_torch(ours: type, stock: type) -> None:
    """What is passed by position, or by name, means the same to both."""
    mine = list(inspect.signature(ours).parameters)
    theirs = list(inspect.signature(stock).parameters)
    assert mine[: len(theirs)] == theirs


def test_arguments_by_position(tmp_path: Path) -> None:
    writer = FastStorageWriter(tmp_path, False, False, 2, 1000, True, False)
    dcp.save({f"w{n}": torch.ones(5) for n in range(4)}, storage_writer=writer)
    assert len(list(tmp_path.glob("*.distcp"))) == 2
    with pytest.raises(CheckpointException, match="overwrite"):
        dcp.save({"w": torch.ones(5)}, storage_writer=writer)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no stream transforms, and 1 are asked for"):
        FastStorageWriter(tmp_path, _extensions=[object()])
    formats = pytest.importorskip("torch.distributed.checkpoint.filesystem").SerializationFormat
    FastStorageWriter(tmp_path, serialization_format=formats.TORCH_SAVE)
    with pytest.raises(ValueError, match="cannot write"):
        FastStorageWriter(tmp_path, serialization_format=formats.SAFETENSORS)
