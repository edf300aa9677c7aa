# SPDX-License-Identifier: Apache-2.0
"""write_files compared with files assembled in Python."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.native.memory import WriteCase, noise

STREAMS_PER_FILE = 3

sizes = st.one_of(
    st.sampled_from([0, 1, 3, 4, 63, 64, 4092, 4095, 4096, 4097, 12_288]), st.integers(0, 20_000)
)
gaps = st.one_of(st.just(0), st.sampled_from([1, 4093, 9000]))
pieces = st.tuples(gaps, sizes, st.integers(-1, STREAMS_PER_FILE - 1))
patches = st.lists(st.tuples(st.integers(0, STREAMS_PER_FILE - 1), st.integers(0, 9000)), max_size=4)
files = st.lists(st.tuples(st.lists(pieces, max_size=12), gaps, patches), min_size=1, max_size=4)


def build_case(directory: Path, layout: list[tuple[list[tuple[int, int, int]], int, list[tuple[int, int]]]]):
    case = WriteCase(directory)
    for file_pieces, tail, file_patches in layout:
        file = case.add_file()
        ends: dict[int, int] = {}
        for gap, nbytes, stream in file_pieces:
            digest = -1 if stream < 0 else file * STREAMS_PER_FILE + stream
            case.add_piece(noise(nbytes, seed=len(case.pieces)), digest, gap)
            ends[digest] = len(case.images[file])
        case.images[file] += bytes(tail)
        taken: list[int] = []
        for stream, distance in file_patches:
            digest = file * STREAMS_PER_FILE + stream
            offset = ends.get(digest, 0) + distance
            fits = offset + 4 <= len(case.images[file]) and all(abs(offset - t) >= 4 for t in taken)
            if digest in ends and fits:
                taken.append(offset)
                case.add_patch(offset, digest)
    return case


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    layout=files,
    threads=st.integers(1, 4),
    chunk_bytes=st.sampled_from([4096, 8192, 65_536]),
    direct=st.booleans(),
    block_bytes=st.sampled_from([0, 1000, 4096, 100_000]),
)
def test_files_and_digests_are_the_models(
    native_impl, layout, threads, chunk_bytes, direct, block_bytes
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        case = build_case(Path(directory), layout)
        written = case.write(threads, chunk_bytes, direct, block_bytes=block_bytes)
        assert written == case.expected(block_bytes)
        for path, image in zip(case.paths(), case.images, strict=True):
            assert Path(path).read_bytes() == image


@pytest.mark.parametrize("offset", range(8188, 8197))
def test_patch_across_a_chunk_border(native_impl, tmp_path, offset) -> None:
    case = WriteCase(tmp_path)
    case.add_file()
    case.add_piece(noise(8000), digest=0)
    case.add_piece(noise(5000, seed=1))
    case.add_patch(offset, 0)
    assert case.write(threads=4, direct=True) == case.expected()
    assert (tmp_path / "file0").read_bytes() == case.images[0]


def test_stream_waits_for_all_its_chunks(native_impl, tmp_path) -> None:
    case = WriteCase(tmp_path)
    for digest in range(3):
        case.add_file()
        for piece in range(40):
            case.add_piece(noise(9000, seed=piece), digest)
            case.add_piece(b"header" * 10)
        case.add_patch(len(case.images[-1]) - 4, digest)
    for _ in range(10):
        assert case.write(threads=4) == case.expected()
        assert [Path(path).read_bytes() for path in case.paths()] == case.images


@pytest.mark.parametrize("direct", [False, True])
def test_existing_longer_file_is_replaced(native_impl, tmp_path, direct) -> None:
    (tmp_path / "file0").write_bytes(noise(50_000))
    case = WriteCase(tmp_path)
    case.add_file()
    case.add_piece(noise(5000, seed=1), digest=0)
    assert case.write(direct=direct, fsync=True) == case.expected()
    assert (tmp_path / "file0").read_bytes() == case.images[0]


def test_file_without_bytes_is_created(native_impl, tmp_path) -> None:
    case = WriteCase(tmp_path)
    case.add_file()
    assert case.write(fsync=True, direct=True) == ([], [0], b"")
    assert (tmp_path / "file0").read_bytes() == b""


def test_new_files_follow_the_umask(native_impl, tmp_path) -> None:
    case = WriteCase(tmp_path)
    case.add_file()
    before = os.umask(0o027)
    try:
        case.write()
    finally:
        os.umask(before)
    assert (tmp_path / "file0").stat().st_mode & 0o777 == 0o640


def test_more_files_than_descriptors(native_impl, tmp_path) -> None:
    resource = pytest.importorskip("resource")
    case = WriteCase(tmp_path)
    for file in range(300):
        case.add_file()
        case.add_piece(noise(100, seed=file))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        assert case.write(threads=4, direct=True) == case.expected()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(
        Path(path).read_bytes() == image for path, image in zip(case.paths(), case.images, strict=True)
    )


def test_no_descriptor_outlives_the_call(native_impl, tmp_path) -> None:
    case = WriteCase(tmp_path)
    case.add_file()
    case.add_piece(noise(9000))
    before = sorted(os.listdir("/proc/self/fd"))
    case.write(direct=True)
    assert sorted(os.listdir("/proc/self/fd")) == before
