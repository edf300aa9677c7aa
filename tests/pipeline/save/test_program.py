# SPDX-License-Identifier: Apache-2.0
"""A save of a known structure writes, byte for byte, what planning it anew would write."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_fast.format.manifest import split_manifest
from ckpt_fast.format.types import (
    ObjectShard,
    Shard,
    TensorShard,
)
from ckpt_fast.pipeline.load.decode import read_dcp_metadata
from ckpt_fast.pipeline.save.program import ProgramCache, SaveProgram, structure_of
from tests.manifests import manifest_lies
from tests.pipeline.layouts import PLAIN_DTYPES, random_tensor, whole
from tests.saves import save

pytestmark = pytest.mark.usefixtures("native_impl", "no_fsync")

Structure = list[tuple[str, Any]]


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    """Return names with the shape, dtype and kind of a tensor, or with None for an object."""
    kinds = st.sampled_from(["plain", "transposed", "columns", "long columns", "empty"])
    tensors = st.tuples(st.integers(1, 70), st.sampled_from(PLAIN_DTYPES), kinds)
    parts = draw(st.lists(st.one_of(st.none(), tensors), max_size=8))
    return [(f"t{number}", part) for number, part in enumerate(parts)]


def shards_of(structure: Structure, seed: int, moved: bool) -> list[Shard]:
    """Return shards of the structure with values, and where they are ``moved``, addresses, of the seed."""
    return [_shard(name, part, seed, moved) for name, part in structure]


_memory: dict[tuple[str, Any], torch.Tensor] = {}


def _shard(name: str, part: Any, seed: int, moved: bool) -> Shard:
    if part is None:
        return ObjectShard(name, bytes([seed % 251]) * (100 + seed % 7))
    size, dtype, kind = part
    if kind == "empty":
        return whole(name, torch.empty((0, size), dtype=dtype))
    wide = 600 if kind == "long columns" else size
    values = random_tensor((size + 1, wide + 3), dtype, seed)
    place = values if moved else _memory.setdefault((name, (size, dtype, kind)), values.clone())
    place.view(torch.uint8).copy_(values.view(torch.uint8))
    if kind == "transposed":
        return whole(name, place.t())
    return whole(name, place if kind == "plain" else place[:, :wide])


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.distcp")}


def require_same(first: Path, second: Path) -> None:
    """Assert that the directories hold the same data files, described alike."""
    assert files_of(first) == files_of(second)
    assert read_dcp_metadata(str(first)) == read_dcp_metadata(str(second))
    assert manifest_lies(first) == []


@settings(max_examples=40, deadline=None)
@given(structures(), st.booleans(), st.booleans(), st.integers(1, 3), st.integers(0, 1000))
def test_executed_again(
    tmp_path_factory: pytest.TempPathFactory,
    structure: Structure,
    snapshot: bool,
    moved: bool,
    writers: int,
    seed: int,
) -> None:
    root, programs = tmp_path_factory.mktemp("again"), ProgramCache()
    for number in range(3):
        shards = shards_of(structure, seed + number, moved)
        options = {"writers": writers, "snapshot": snapshot}
        save(shards, str(root / f"{number}"), programs=programs, **options)
        save(shards, str(root / "anew"), **options)
        require_same(root / f"{number}", root / "anew")


def saved(directory: Path, shards: list[Shard], programs: ProgramCache) -> SaveProgram | None:
    """Save, and return the program that the next save would use."""
    save(shards, str(directory), programs=programs, snapshot=True)
    structure = structure_of(shards, ("__0_", 1, 0, None, True))
    return None if structure is None else programs.find(structure)


@pytest.fixture(autouse=True)
def one_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_fast.pipeline.save.waves.automatic_writers", lambda *_: 1)


def test_a_program_is_found_again_and_another_structure_drops_it(tmp_path: Path) -> None:
    programs = ProgramCache()
    first = saved(tmp_path / "0", [whole("w", torch.zeros(5))], programs)
    assert first is not None and saved(tmp_path / "1", [whole("w", torch.ones(5))], programs) is first
    other = saved(tmp_path / "2", [whole("w", torch.ones(6))], programs)
    assert other is not None and other is not first
    assert saved(tmp_path / "3", [whole("w", torch.zeros(5))], programs) is not first


CHANGES: dict[str, Shard] = {
    "name": whole("v", torch.zeros(4, 6)),
    "shape": whole("w", torch.zeros(6, 4)),
    "dtype": whole("w", torch.zeros(4, 6, dtype=torch.int32)),
    "strides": whole("w", torch.zeros(6, 4).t()),
    "place": TensorShard("w", torch.zeros(4, 6), (4, 0), (8, 6)),
    "whole": TensorShard("w", torch.zeros(4, 6), (0, 0), (8, 6)),
    "sizes": TensorShard("w", torch.zeros(4, 6), (0, 0, 0), (2, 2, 6), (2, 2, 6)),
    "object": ObjectShard("w", b"w"),
    "conjugate": whole("w", torch.zeros(4, 6, dtype=torch.complex64).conj()),
    "negative": whole("w", torch._neg_view(torch.zeros(4, 6))),
}


def test_everything_but_values_is_structure() -> None:
    shards: dict[str, Shard] = {**CHANGES, "none": whole("w", torch.zeros(4, 6))}
    shards["complex"] = whole("w", torch.zeros(4, 6, dtype=torch.complex64))
    structures = {structure_of([shard], ()) for shard in shards.values()}
    assert len(structures) == len(shards)
    ones = whole("w", torch.ones(4, 6))
    assert structure_of([ones], ()) == structure_of([shards["none"]], ()) != structure_of([ones], (1,))


def test_tensors_that_are_more_than_bytes_have_no_program(tmp_path: Path) -> None:
    programs = ProgramCache()
    sparse = whole("s", torch.eye(3).to_sparse())
    assert structure_of([sparse], ()) is None
    complex32 = whole("c", torch.zeros(3, dtype=torch.complex32))
    assert saved(tmp_path / "0", [complex32, whole("w", torch.zeros(2))], programs) is None
    save([complex32, whole("w", torch.ones(2))], str(tmp_path / "1"), programs=programs)
    assert manifest_lies(tmp_path / "1") == []


def test_objects_that_outgrow_their_room_are_planned_anew(tmp_path: Path) -> None:
    programs = ProgramCache()

    def shards(nbytes: int) -> list[Shard]:
        return [ObjectShard("o", b"x" * nbytes), whole("w", torch.arange(5.0)), ObjectShard("p", b"p")]

    first = saved(tmp_path / "0", shards(1000), programs)
    assert saved(tmp_path / "1", shards(1100), programs) is first
    second = saved(tmp_path / "2", shards(5000), programs)
    assert second is not first and saved(tmp_path / "3", shards(1000), programs) is second
    for number, nbytes in enumerate((1000, 1100, 5000, 1000)):
        metadata = read_dcp_metadata(str(tmp_path / f"{number}"))
        extent = next(info for index, info in metadata.storage_data.items() if index.fqn == "o")
        assert extent.length == nbytes
        content = (tmp_path / f"{number}" / extent.relative_path).read_bytes()
        assert content[extent.offset :][:nbytes] == b"x" * nbytes
        assert manifest_lies(tmp_path / f"{number}") == []


def test_a_program_holds_no_tensor(tmp_path: Path) -> None:
    programs = ProgramCache()
    shards = [whole("w", torch.zeros(1000)), whole("t", torch.zeros(30, 40).t())]
    storages = [weakref.ref(shard.tensor.untyped_storage()) for shard in shards]
    tensors = [weakref.ref(shard.tensor) for shard in shards]
    for number in range(2):
        assert saved(tmp_path / f"{number}", list(shards), programs) is not None
    del shards
    gc.collect()
    assert [each() for each in (*tensors, *storages)] == [None] * 4


def test_metadata_of_a_reused_program_is_the_pickle_of_the_first(tmp_path: Path) -> None:
    programs = ProgramCache()
    contents = []
    for number in range(2):
        saved(tmp_path / f"{number}", [ObjectShard("o", b"same"), whole("w", torch.ones(3))], programs)
        pickled, manifest = split_manifest((tmp_path / f"{number}/.metadata").read_bytes())
        assert manifest is not None
        contents.append(pickled)
    assert contents[0] == contents[1]
