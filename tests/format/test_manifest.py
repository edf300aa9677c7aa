# SPDX-License-Identifier: Apache-2.0
"""The manifest: it round-trips, stock readers ignore it, and no change of it goes unnoticed."""

from __future__ import annotations

import io
import pickle
import zlib
from array import array
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_fast.errors import CheckpointCorruptError
from ckpt_fast.format.manifest import BLOCK_NBYTES, Manifest, append_manifest, split_manifest
from ckpt_fast.format.types import BlockDigests, FileRecord, ObjectShard, TensorRequest
from ckpt_fast.pipeline.load.decode import read_contents
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_objects, load_tensors
from tests.manifests import manifest_lies, manifest_of, without_ids
from tests.pipeline.layouts import random_tensor, same, whole
from tests.saves import save

pytestmark = pytest.mark.usefixtures("native_impl", "no_fsync")

ROWS, COLUMNS = 400, 1000  # of float32: 1.6 MB, six blocks and part of a seventh
LARGE = random_tensor((ROWS, COLUMNS), torch.float32, 1)
SMALL = random_tensor((50, 30), torch.bfloat16, 2)

records = st.builds(
    FileRecord,
    st.text(min_size=1).filter(str.isprintable),
    st.integers(0, 2**60),
    st.integers(0, 2**32 - 1),
)


def object_item(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save([value], buffer)
    return buffer.getvalue()


def changed(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """Change every element bitwise: arithmetic would not change a NaN."""
    bits = torch.int32 if tensor.itemsize == 4 else torch.int16
    return (tensor.view(bits) + by).view(tensor.dtype)


def odd(seed: int) -> torch.Tensor:
    """Return a tensor of a dtype that torch itself stores."""
    return torch.complex(torch.eye(4) * (seed + 1), torch.eye(4)).to(torch.complex32)


def save_some(directory: Path, seed: int = 0) -> None:
    """Save a checkpoint with the same structure and length for every seed."""
    shards = [
        whole("large", changed(LARGE, seed)),
        whole("small", changed(SMALL, seed)),
        whole("twin", changed(SMALL, seed + 1)),
        whole("odd", odd(seed)),
        ObjectShard("object", object_item(f"object {seed}")),
    ]
    save(
        shards,
        str(directory),
        writers=2,
        common_files={"common.pt": b"common %d" % seed},
        seal_files={"metadata.json": b"{}"},
    )


@settings(max_examples=60)
@given(
    files=st.lists(records, max_size=5, unique_by=lambda each: each.path),
    beside=st.lists(records, max_size=2, unique_by=lambda each: each.path),
    payloads=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**60), st.integers(0, 10**6)), max_size=8),
    pickled=st.binary(max_size=40),
)
def test_manifest_round_trip(files, beside, payloads, pickled) -> None:
    parts, expected = [], {}
    for half in (payloads[::2], payloads[1::2]):  # as if from two ranks, which number their files differently
        part = BlockDigests(
            [f"__{len(parts)}_{n}.distcp" for n in range(3)], array("I"), array("q"), array("q"), b""
        )
        crcs = array("I")
        for file, offset, nbytes in half:
            part.file.append(file)
            part.offset.append(offset)
            part.nbytes.append(nbytes)
            mine = [zlib.crc32(b"%d %d" % (offset, n)) for n in range(-(-nbytes // BLOCK_NBYTES))]
            crcs.extend(mine)
            expected[part.paths[file], offset] = (nbytes, mine)
        parts.append(part._replace(crcs=crcs.tobytes()))
    manifest = Manifest("id", files, parts, beside=beside, notes={"glu_rows": "contiguous"})
    content = append_manifest(pickled, manifest)
    before, found = split_manifest(content)
    assert before == pickled and found is not None
    assert (found.save_id, found.notes, found.block_nbytes) == ("id", manifest.notes, BLOCK_NBYTES)
    assert (found.files, found.beside) == (manifest.files, manifest.beside)
    for place, (nbytes, crcs) in expected.items():
        payload = found.payload(*place)
        assert payload is not None and (payload.nbytes, payload.crcs.tolist()) == (nbytes, crcs)
    assert found.payload("__9_9.distcp", 0) is None


def test_every_save_has_an_id_of_its_own(tmp_path: Path) -> None:
    for name in "ab":
        save_some(tmp_path / name)
    first, second = ((tmp_path / name / ".metadata").read_bytes() for name in "ab")
    assert manifest_of(tmp_path / "a").save_id != manifest_of(tmp_path / "b").save_id
    assert without_ids(first) == without_ids(second)


def test_it_describes_every_file(tmp_path: Path) -> None:
    save_some(tmp_path)
    assert manifest_lies(tmp_path) == []


def test_stock_readers_ignore_it(tmp_path: Path) -> None:
    save_some(tmp_path)
    with (tmp_path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    assert metadata.state_dict_metadata.keys() == {"large", "small", "twin", "odd", "object"}
    large = torch.zeros_like(LARGE)
    dcp.load({"large": large}, checkpoint_id=tmp_path, no_dist=True)
    assert same(large, LARGE)


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_another_tool_that_writes_the_pickle_again_drops_it(tmp_path: Path, cut: int) -> None:
    """Whole items still have the CRC-32 of their archives; remains of a manifest count as damage."""
    save_some(tmp_path)
    path = tmp_path / ".metadata"
    pickled, _ = split_manifest(path.read_bytes())
    path.write_bytes(pickled if not cut else path.read_bytes()[:-cut])
    if cut:
        with pytest.raises(CheckpointCorruptError, match=r"\.metadata is damaged"):
            read_contents(str(tmp_path))
        return
    assert read_contents(str(tmp_path)).manifest is None
    into = torch.zeros_like(LARGE)
    load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("large", into, (0, 0))])
    assert same(into, LARGE)


def test_a_later_version_is_ignored(tmp_path: Path) -> None:
    save_some(tmp_path)
    path = tmp_path / ".metadata"
    content = bytearray(path.read_bytes()[:-12])
    content[-4:] = (2).to_bytes(4, "little")
    path.write_bytes(bytes(content) + zlib.crc32(content).to_bytes(4, "little") + b"CKPTFAST")
    assert read_contents(str(tmp_path)).manifest is None
    into = torch.zeros_like(SMALL)
    load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("small", into, (0, 0))])
    assert same(into, SMALL)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])
def test_no_bit_of_it_can_flip(tmp_path: Path, step: int) -> None:
    save_some(tmp_path)
    path = tmp_path / ".metadata"
    content = path.read_bytes()
    pickled, _ = split_manifest(content)
    for bit in range(8 * len(pickled), 8 * len(content), step):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointCorruptError, match=r"\.metadata is damaged"):
            read_contents(str(tmp_path))


# --- parts -----------------------------------------------------------------------------------------------

PARTS = {
    "rows": (slice(100, 200), slice(None)),
    "one row": (slice(70, 71), slice(None)),
    "columns": (slice(None), slice(250, 500)),
    "few columns": (slice(None), slice(7, 20)),
    "a box": (slice(130, 260), slice(100, 900)),
    "all": (slice(None), slice(None)),
}


@pytest.mark.parametrize("step", [119_967, pytest.param(39_989, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["in place", "converted"])
@pytest.mark.parametrize("part", PARTS)
def test_partial_reads_are_checked(tmp_path: Path, part: str, dtype: torch.dtype, step: int) -> None:
    """A flip in a block that is touched is detected; in any other it does no harm."""
    save([whole("large", LARGE)], str(tmp_path))
    path = tmp_path / "__0_0.distcp"
    content = path.read_bytes()
    start = content.index(LARGE.numpy().tobytes())
    rows, columns = PARTS[part]
    wanted = torch.arange(LARGE.numel()).view(ROWS, COLUMNS)[rows, columns]
    touched = set((wanted * 4 // BLOCK_NBYTES).flatten().tolist())
    expected = LARGE[rows, columns].to(dtype)
    index = CheckpointIndex(str(tmp_path))
    offsets = (rows.start or 0, columns.start or 0)
    for at in range(0, LARGE.nbytes, step):
        with path.open("r+b") as file:
            file.seek(start + at)
            file.write(bytes([content[start + at] ^ 1 << at % 8]))
        into = torch.zeros(expected.shape, dtype=dtype)
        request = TensorRequest("large", into, offsets)
        if at // BLOCK_NBYTES in touched:
            begin = start + at // BLOCK_NBYTES * BLOCK_NBYTES
            with pytest.raises(CheckpointCorruptError, match=rf"large in .*distcp \(bytes {begin} to \d+\)"):
                load_tensors(index, [request])
        else:
            load_tensors(index, [request])
            assert same(into, expected)
        path.write_bytes(content)
    load_tensors(index, [TensorRequest("large", into, offsets)])
    assert same(into, expected)


@pytest.mark.parametrize("part", ["rows", "columns", "all"])
def test_a_part_of_a_stock_item_is_checked_with_all_of_it(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dcp.save({"large": LARGE}, checkpoint_id=tmp_path, no_dist=True)
    path = tmp_path / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(LARGE.numpy().tobytes()) + 10] ^= 4  # in the first row
    path.write_bytes(content)
    rows, columns = PARTS[part]
    into = torch.zeros_like(LARGE[rows, columns])
    request = TensorRequest("large", into, (rows.start or 0, columns.start or 0))
    with pytest.raises(CheckpointCorruptError, match=r"large in .* has CRC-32"):
        load_tensors(CheckpointIndex(str(tmp_path)), [request])
    monkeypatch.setenv("CKPT_FAST_VERIFY", "0")
    load_tensors(CheckpointIndex(str(tmp_path)), [request])
    if part == "rows":
        assert same(into, LARGE[rows, columns])


# --- another save ------------------------------------------------------------------------------------------


def load_some(directory: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, object]:
    index = CheckpointIndex(str(directory))
    large, small, twin = torch.zeros_like(LARGE), torch.zeros_like(SMALL), torch.zeros_like(SMALL)
    named = {"large": large, "small": small, "twin": twin, "odd": torch.zeros_like(odd(0))}
    load_tensors(index, [TensorRequest(name, tensor, (0, 0)) for name, tensor in named.items()])
    return large, small, twin, load_objects(index, ["object"])["object"]


def test_a_file_of_another_save_is_rejected(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_some(tmp_path / str(seed), seed)
    names = sorted(path.name for path in (tmp_path / "0").glob("*.distcp"))
    assert len(names) == 2
    for name in names:
        mine = (tmp_path / "0" / name).read_bytes()
        (tmp_path / "0" / name).write_bytes((tmp_path / "1" / name).read_bytes())
        with pytest.raises(CheckpointCorruptError, match=r"damaged, or of another save than \w{32}"):
            load_some(tmp_path / "0")
        (tmp_path / "0" / name).write_bytes(mine)
    assert load_some(tmp_path / "0")[3] == ["object 0"]


def test_an_item_of_another_save_is_rejected(tmp_path: Path) -> None:
    """Nor is one of the same save in the place of another."""
    for seed in (0, 1):
        save_some(tmp_path / str(seed), seed)
    infos = CheckpointIndex(str(tmp_path / "0")).metadata.storage_data
    twins = [info for index, info in infos.items() if index.fqn in ("small", "twin")]
    sources = [("1", info, info) for info in infos.values()] + [("0", *twins), ("0", *twins[::-1])]
    for seed, source, target in sources:
        path = tmp_path / "0" / target.relative_path
        mine = path.read_bytes()
        item = (tmp_path / seed / source.relative_path).read_bytes()[source.offset :][: source.length]
        path.write_bytes(mine[: target.offset] + item + mine[target.offset + target.length :])
        assert len(path.read_bytes()) == len(mine)
        with pytest.raises(CheckpointCorruptError, match="of another save"):
            load_some(tmp_path / "0")
        path.write_bytes(mine)
    load_some(tmp_path / "0")


def test_metadata_of_another_save_is_rejected(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_some(tmp_path / str(seed), seed)
    (tmp_path / "0" / ".metadata").write_bytes((tmp_path / "1" / ".metadata").read_bytes())
    with pytest.raises(CheckpointCorruptError, match="of another save"):
        load_some(tmp_path / "0")
