# SPDX-License-Identifier: Apache-2.0
"""read_extents compared with slices taken in Python."""

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
from tests.native.memory import EXTENT, RANGE, Memory, column, named, noise

FILES = [noise(700_001, seed=1), noise(4096, seed=2), b"", noise(300_000, seed=3)]

offsets = st.one_of(st.sampled_from([0, 1, 4095, 4096, 65_536, 299_999]), st.integers(0, 700_001))
sizes = st.one_of(st.sampled_from([0, 1, 4096, 262_144, 400_000]), st.integers(0, 9000))
extents = st.lists(st.tuples(st.integers(0, len(FILES) - 1), offsets, sizes), max_size=25)
# Gap before the range, its length, the length of its blocks.
checked = st.lists(st.tuples(sizes, sizes, st.sampled_from([1, 7, 1000, 4096, 65_536, 1 << 20])), max_size=6)


@pytest.fixture(scope="module")
def paths():
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / f"file{i}" for i in range(len(FILES))]
        for path, content in zip(paths, FILES, strict=True):
            path.write_bytes(content)
        yield [str(path) for path in paths]


def read(paths, wanted, ranges=(), threads=2, chunk_bytes=4096, direct=False):
    """Read (file, offset, nbytes) extents; return their bytes, and CRCs of (file, offset, nbytes, block)."""
    memory = [Memory(bytes(nbytes), misalign=i % 5) for i, (_, _, nbytes) in enumerate(wanted)]
    columns = [column(*values) for values in zip(*wanted, strict=True)] or [column()] * 3
    addresses = column(*(m.address for m in memory))
    checks = [column(*values) for values in zip(*ranges, strict=True)] or [column()] * 4
    crcs = native.read_extents(
        paths,
        **named(EXTENT, [*columns, addresses]),
        **named(RANGE, checks),
        threads=threads,
        chunk_bytes=chunk_bytes,
        direct=direct,
    )
    return [m.content() for m in memory], list(memoryview(crcs).cast("q"))


def expected_crcs(wanted, ranges):
    """By definition: the CRC of each block that an extent touches."""
    crcs = []
    for file, offset, nbytes, block in ranges:
        for begin in range(offset, offset + nbytes, block):
            end = min(begin + block, offset + nbytes)
            touched = any(f == file and at < end and at + n > begin for f, at, n in wanted if n)
            crcs.append(zlib.crc32(FILES[file][begin:end]) if touched else -1)
    return crcs


def laid_out(checks):
    """Lay out ranges in one file after the other, as far as they fit."""
    ranges, file, end = [], 0, 0
    for gap, nbytes, block in checks:
        if end + gap + nbytes > len(FILES[file]):
            file, end = (file + 1) % len(FILES), 0
            if file == 0:
                break
        if end + gap + nbytes <= len(FILES[file]):
            ranges.append((file, end + gap, nbytes, max(block, nbytes // 200 + 1)))
            end += gap + nbytes
    return ranges


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    wanted=extents,
    checks=checked,
    threads=st.integers(1, 4),
    chunk_bytes=st.sampled_from([4096, 65_536, 1 << 20]),
    direct=st.booleans(),
)
def test_bytes_and_digests_are_the_models(
    native_impl, paths, wanted, checks, threads, chunk_bytes, direct
) -> None:
    in_file, ranges = [], laid_out(checks)
    for file, offset, nbytes in wanted:  # unordered, overlapping, clipped to the file's size
        offset = min(offset, len(FILES[file]))  # noqa: PLW2901
        in_file.append((file, offset, min(nbytes, len(FILES[file]) - offset)))
    contents, crcs = read(paths, in_file, ranges, threads, chunk_bytes, direct)
    for (file, offset, nbytes), content in zip(in_file, contents, strict=True):
        assert content == FILES[file][offset : offset + nbytes]
    assert crcs == expected_crcs(in_file, ranges)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("apart", [100, 150, 5000])
def test_thousands_of_small_extents(native_impl, paths, direct, apart) -> None:
    wanted = [(0, at, 100) for at in range(0, 700_000, apart)]
    ranges = [(0, 1001, 300_000, 4096), (0, 301_001, 390_000, 262_144)]
    contents, crcs = read(paths, wanted, ranges, chunk_bytes=65_536, direct=direct)
    assert contents == [FILES[0][at : at + 100] for _, at, _ in wanted]
    assert crcs == expected_crcs(wanted, ranges)


def test_blocks_that_nobody_wants_are_not_read(native_impl, tmp_path) -> None:
    """Here they could not be: the file ends before them."""
    path = tmp_path / "short"
    path.write_bytes(FILES[0][:5000])
    contents, crcs = read([str(path)], [(0, 100, 10)], [(0, 0, 9000, 4096)])
    assert (contents, crcs) == ([FILES[0][100:110]], [zlib.crc32(FILES[0][:4096]), -1, -1])


@pytest.mark.parametrize("direct", [False, True])
def test_block_that_the_file_does_not_hold(native_impl, tmp_path, direct) -> None:
    path = tmp_path / "short"
    path.write_bytes(FILES[0][:5000])
    with pytest.raises(OSError, match="file ends at 5000"):
        read([str(path)], [(0, 4500, 10)], [(0, 0, 9000, 4096)], direct=direct)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("nbytes", [100, 400_000])
def test_file_that_ends_early(native_impl, paths, direct, nbytes) -> None:
    wanted = [(3, 0, 10), (3, 299_990, nbytes), (3, 299_980, nbytes)]
    with pytest.raises(OSError) as caught:
        read(paths, wanted, direct=direct)
    expected = f"read {nbytes} bytes at 299990 from {paths[3]}: file ends at 300000"
    assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (5, expected, paths[3])


def test_missing_file(native_impl, tmp_path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as caught:
        read([missing], [(0, 0, 1)])
    assert caught.value.strerror == f"open {missing}: No such file or directory"


def test_directory_instead_of_file(native_impl, tmp_path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        read([str(tmp_path)], [(0, 0, 1)])
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
        read([str(path)], [(0, 0, 1)], direct=direct)
    expected = f"open {path}: it is a {kind.split()[-1]}, not a regular file"
    assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (5, expected, str(path))


@pytest.mark.parametrize(
    ("offset", "nbytes"), [((1 << 63) - 4098, 1), (0, 1 << 62), (4097, (1 << 63) - 8194)]
)
@pytest.mark.parametrize("direct", [False, True])
def test_length_that_no_file_has_is_refused_at_once(native_impl, paths, offset, nbytes, direct) -> None:
    """The length is compared with the file before any work is planned for it."""
    with pytest.raises(OSError, match=rf"read {nbytes} bytes at {offset} from .*: file ends at 4096"):
        native.read_extents(
            paths,
            **named(EXTENT, [column(1), column(offset), column(nbytes), column(8)]),
            **named(RANGE, [column()] * 4),
            threads=1,
            chunk_bytes=4096,
            direct=direct,
        )


@pytest.mark.parametrize("direct", [False, True])
def test_link_to_a_file(native_impl, paths, tmp_path, direct) -> None:
    link = tmp_path / "link"
    link.symlink_to(paths[1])
    assert read([str(link)], [(0, 0, 4096)], direct=direct)[0] == [FILES[1]]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(native_impl, tmp_path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(PermissionError, match=f"open {path}: Permission denied"):
        read([str(path)], [(0, 0, 1)])


def test_files_without_wanted_bytes_are_not_opened(native_impl, tmp_path) -> None:
    assert read([str(tmp_path / "missing")], [(0, 7, 0)]) == ([b""], [])


def test_no_descriptor_outlives_the_call(native_impl, paths) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    read(paths, [(0, 0, 500_000), (3, 0, 10)])
    with pytest.raises(OSError):
        read(paths, [(3, 299_999, 10)])
    assert sorted(os.listdir("/proc/self/fd")) == before


HUGE = 1 << 62


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 0, HUGE, 1)],
        [(0, 4096, 1 << 24, 4)],
        [(0, 0, HUGE, 1), (1, 0, HUGE, 1), (2, 0, HUGE, 1), (3, 0, HUGE, 1)],  # 2 ** 64 blocks
        [(1, 0, HUGE, 1)],
    ],
    ids=["one range", "of blocks behind the end", "whose sum overflows", "of another file"],
)
def test_more_blocks_than_files_have_bytes(native_impl, paths, ranges) -> None:
    """Their results alone would take more memory than there is."""
    with pytest.raises(OSError, match=r"read \d+ bytes at \d+ from .*file[0-3]: file ends at \d+"):
        read(paths, [(0, 100, 10)], ranges)


@pytest.mark.parametrize("nbytes", [700_002, HUGE])
def test_wanted_block_that_ends_behind_its_file(native_impl, paths, nbytes) -> None:
    """Nothing is planned for its length, by which a forged .metadata would occupy a load for years."""
    with pytest.raises(OSError) as caught:
        read(paths, [(0, 100, 10)], [(0, 0, nbytes, HUGE)])
    expected = f"read {nbytes} bytes at 0 from {paths[0]}: file ends at 700001"
    assert (caught.value.errno, caught.value.strerror) == (5, expected)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("gap", [0, 100, 10_000])
def test_nothing_wanted_behind_the_end(native_impl, paths, direct, gap) -> None:
    wanted = [(3, 299_000, 1000), (3, 299_500, 500), (3, 300_000 + gap, 0), (2, 0, 0), (2, gap, 0)]
    contents, _ = read(paths, wanted, direct=direct)
    assert contents == [FILES[3][299_000:], FILES[3][299_500:], b"", b"", b""]
