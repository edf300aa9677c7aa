# SPDX-License-Identifier: Apache-2.0
"""read_extents against slices taken in Python."""

from __future__ import annotations

import os
import socket
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_fast import native
from tests.native.memory import Memory, column, noise

FILES = [noise(700_001, seed=1), noise(4096, seed=2), b"", noise(300_000, seed=3)]
STREAMS = 4

offsets = st.one_of(st.sampled_from([0, 1, 4095, 4096, 65_536, 299_999]), st.integers(0, 700_001))
sizes = st.one_of(st.sampled_from([0, 1, 4096, 262_144, 400_000]), st.integers(0, 9000))
extents = st.lists(
    st.tuples(st.integers(0, len(FILES) - 1), offsets, sizes, st.integers(-1, STREAMS - 1)), max_size=25
)


@pytest.fixture(scope="module")
def paths():
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / f"file{i}" for i in range(len(FILES))]
        for path, content in zip(paths, FILES, strict=True):
            path.write_bytes(content)
        yield [str(path) for path in paths]


def read(paths, rows, digest_count=0, threads=2, chunk_bytes=4096, direct=False):
    """Read (file, offset, nbytes, digest) rows; returns their bytes and the streams' CRCs."""
    memory = [Memory(bytes(nbytes), misalign=i % 5) for i, (_, _, nbytes, _) in enumerate(rows)]
    files, offsets, sizes, digests = zip(*rows, strict=True) if rows else ((), (), (), ())
    addresses = column(*(m.address for m in memory))
    crcs = native.read_extents(
        paths,
        column(*files),
        column(*offsets),
        column(*sizes),
        addresses,
        column(*digests),
        digest_count,
        threads,
        chunk_bytes,
        direct,
    )
    return [m.content() for m in memory], crcs


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    wanted=extents,
    threads=st.integers(1, 4),
    chunk_bytes=st.sampled_from([4096, 65_536, 1 << 20]),
    direct=st.booleans(),
)
def test_bytes_and_digests_are_the_models(native_impl, paths, wanted, threads, chunk_bytes, direct) -> None:
    rows = []
    for file, offset, nbytes, digest in wanted:  # unordered, overlapping, cut to the file's size
        offset = min(offset, len(FILES[file]))  # noqa: PLW2901
        rows.append((file, offset, min(nbytes, len(FILES[file]) - offset), digest))
    contents, crcs = read(paths, rows, STREAMS, threads, chunk_bytes, direct)
    streams = [b""] * STREAMS
    for (file, offset, nbytes, digest), content in zip(rows, contents, strict=True):
        expected = FILES[file][offset : offset + nbytes]
        assert content == expected
        if digest >= 0:
            streams[digest] += expected
    assert crcs == [zlib.crc32(stream) for stream in streams]


@pytest.mark.parametrize("direct", [False, True])
def test_stream_spans_files_in_the_order_given(native_impl, paths, direct) -> None:
    rows = [(3, 10, 290_000, 0), (0, 5, 600_000, 0), (1, 0, 4096, 0)]
    _, crcs = read(paths, rows, 1, direct=direct)
    expected = FILES[3][10:290_010] + FILES[0][5:600_005] + FILES[1]
    assert crcs == [zlib.crc32(expected)]


@pytest.mark.parametrize("direct", [False, True])
def test_thousands_of_small_extents(native_impl, paths, direct) -> None:
    rows = [(0, at, 100, i % 3) for i, at in enumerate(range(0, 700_000, 150))]
    contents, crcs = read(paths, rows, 3, chunk_bytes=65_536, direct=direct)
    assert contents == [FILES[0][at : at + 100] for _, at, _, _ in rows]
    assert crcs == [zlib.crc32(b"".join(contents[d::3])) for d in range(3)]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("nbytes", [100, 400_000])
def test_file_that_ends_early(native_impl, paths, direct, nbytes) -> None:
    rows = [(3, 0, 10, 0), (3, 299_990, nbytes, 0), (3, 299_980, nbytes, 0)]
    with pytest.raises(OSError) as caught:
        read(paths, rows, 1, direct=direct)
    expected = f"read {nbytes} bytes at 299990 from {paths[3]}: file ends at 300000"
    assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (5, expected, paths[3])


def test_missing_file(native_impl, tmp_path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as caught:
        read([missing], [(0, 0, 1, -1)])
    assert caught.value.strerror == f"open {missing}: No such file or directory"


def test_directory_instead_of_file(native_impl, tmp_path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        read([str(tmp_path)], [(0, 0, 1, -1)])
    assert caught.value.strerror == f"open {tmp_path}: Is a directory"


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "link to a device"])
def test_special_file_is_refused_at_once(native_impl, tmp_path, kind, direct) -> None:
    path = tmp_path / "special"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(OSError) as caught:
        read([str(path)], [(0, 0, 1, -1)], direct=direct)
    expected = f"open {path}: it is a {kind.split()[-1]}, not a regular file"
    assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (5, expected, str(path))


@pytest.mark.parametrize(
    ("offset", "nbytes"), [((1 << 63) - 4098, 1), (0, 1 << 62), (4097, (1 << 63) - 8194)]
)
@pytest.mark.parametrize("direct", [False, True])
def test_length_that_no_file_has_is_refused_at_once(native_impl, paths, offset, nbytes, direct) -> None:
    """Looked up in the file before anything is planned for it."""
    with pytest.raises(OSError, match=rf"read {nbytes} bytes at {offset} from .*: file ends at 4096"):
        native.read_extents(
            paths, column(1), column(offset), column(nbytes), column(8), column(-1), 0, 1, 4096, direct
        )


@pytest.mark.parametrize("direct", [False, True])
def test_link_to_a_file(native_impl, paths, tmp_path, direct) -> None:
    link = tmp_path / "link"
    link.symlink_to(paths[1])
    assert read([str(link)], [(0, 0, 4096, -1)], direct=direct)[0] == [FILES[1]]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(native_impl, tmp_path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(PermissionError, match=f"open {path}: Permission denied"):
        read([str(path)], [(0, 0, 1, -1)])


def test_files_without_wanted_bytes_are_not_opened(native_impl, tmp_path) -> None:
    assert read([str(tmp_path / "missing")], [(0, 7, 0, 0)], 1) == ([b""], [0])


def test_no_descriptor_outlives_the_call(native_impl, paths) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    read(paths, [(0, 0, 500_000, -1), (3, 0, 10, -1)])
    with pytest.raises(OSError):
        read(paths, [(3, 299_999, 10, -1)])
    assert sorted(os.listdir("/proc/self/fd")) == before
