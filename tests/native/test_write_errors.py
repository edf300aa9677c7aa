# SPDX-License-Identifier: Apache-2.0
"""What write_files and read_extents refuse, and how they report errors of the system."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
from contextlib import contextmanager
from typing import Any

import pytest

from ckpt_fast import native
from tests.native.memory import EXTENT, PATCH, PIECE, RANGE, WriteCase, column, named, noise

HOW: dict[str, Any] = {"threads": 2, "chunk_bytes": 4096, "direct": False}
GOOD = {
    "paths": ["a", "b"],
    "file_nbytes": column(100, 50),
    "piece_file": column(0, 0, 1),
    "piece_offset": column(0, 40, 0),
    "piece_nbytes": column(40, 40, 50),
    "piece_address": column(0, 0, 0),
    "piece_digest": column(0, -1, 1),
    "patch_file": column(0),
    "patch_offset": column(96),
    "patch_digest": column(0),
    "digest_count": 2,
    "threads": 2,
    "chunk_bytes": 4096,
    "direct": False,
    "fsync": False,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "threads is 0, not at least 1"),
        ({"chunk_bytes": 5000}, "chunk_bytes is 5000, not a positive multiple of 4096"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0, not a positive multiple of 4096"),
        ({"digest_count": -1}, "digest_count is negative"),
        ({"file_nbytes": column(100)}, "file columns differ in length: 2 and 1"),
        ({"file_nbytes": column(100, -1)}, "file 1: negative size"),
        ({"paths": ["a", "a"]}, "file 1: its path occurs twice"),
        ({"piece_digest": column(0, -1)}, "piece columns differ in length: 3 and 2"),
        ({"piece_file": column(0, 0, 2)}, "piece 2: file 2 is not one of 2"),
        ({"piece_file": column(-1, 0, 1)}, "piece 0: file -1 is not one of 2"),
        (
            {"piece_offset": column(0, 70, 0)},
            "piece 1: 40 bytes at 70 are outside its file of 100 bytes",
        ),
        ({"piece_nbytes": column(40, -1, 50)}, "piece 1: -1 bytes at 40 are outside"),
        (
            {"piece_nbytes": column(40, 2**63 - 1, 50)},
            "piece 1: 9223372036854775807 bytes at 40 are outside",
        ),
        ({"piece_offset": column(0, 39, 0)}, "piece 1: begins before the piece ahead of it ends"),
        (
            {"piece_file": column(0, 1, 0), "piece_nbytes": column(9, 9, 9)},
            "piece 2: begins before the piece ahead of it ends",
        ),
        ({"piece_digest": column(0, 0, 2)}, "piece 2: digest 2 is not one of 2"),
        ({"piece_digest": column(0, -2, 1)}, "piece 1: digest -2 is not one of 2"),
        ({"piece_digest": column(0, -1, 0)}, "piece 2: digest 0 began in another file"),
        ({"patch_offset": column(96, 0)}, "patch columns differ in length: 1 and 2"),
        ({"patch_file": column(2)}, "patch 0: file 2 is not one of 2"),
        ({"patch_offset": column(97)}, "patch 0: 4 bytes at 97 are outside its file of 100 bytes"),
        ({"patch_digest": column(-1)}, "patch 0: digest -1 is not one of 2"),
        ({"patch_offset": column(39)}, "patch 0: does not lie behind the end of digest 0"),
        ({"patch_digest": column(1)}, "patch 0: does not lie behind the end of digest 1"),
        (
            {"patch_file": column(0, 0), "patch_offset": column(93, 90), "patch_digest": column(0, 0)},
            "patches overlap at 93 of a",
        ),
    ],
)
def test_bad_write_requests(native_impl, tmp_path, monkeypatch, change, message) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        native.write_files(**{**GOOD, **change})
    assert os.listdir(tmp_path) == [], "a file was touched before the request was checked"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((1, 0, 10), "extent 0: file 1 is not one of 1"),
        ((0, -1, 10), "extent 0: 10 bytes at -1 are not a valid range"),
        ((0, 0, -1), "extent 0: -1 bytes at 0 are not a valid range"),
        (
            (0, 2**62, 2**62),
            "extent 0: 4611686018427387904 bytes at 4611686018427387904 are not a valid range",
        ),
    ],
)
def test_bad_read_requests(native_impl, row, message) -> None:
    file, offset, nbytes = (column(value) for value in row)
    with pytest.raises(ValueError, match=re.escape(message)):
        native.read_extents(
            ["a"], **named(EXTENT, [file, offset, nbytes, column(0)]), **named(RANGE, [column()] * 4), **HOW
        )


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(1, 0, 10, 1)], "range 0: file 1 is not one of 1"),
        ([(0, 0, 10, 1), (0, -1, 10, 1)], "range 1: 10 bytes at -1 are not a valid range"),
        ([(0, 0, 10, 0)], "range 0: its blocks have no bytes"),
        ([(0, 9, 10, 5), (0, 0, 10, 5)], "range 0: overlaps range 1"),
    ],
)
def test_bad_checked_ranges(native_impl, ranges, message) -> None:
    columns = [column(*values) for values in zip(*ranges, strict=True)]
    with pytest.raises(ValueError, match=re.escape(message)):
        native.read_extents(["a"], **named(EXTENT, [column(0)] * 4), **named(RANGE, columns), **HOW)


def big_case(directory) -> WriteCase:
    """Return one stream of 100 chunks whose patch waits for all of them."""
    case = WriteCase(directory)
    case.add_file()
    case.add_piece(noise(100 * 4096), digest=0)
    case.add_piece(b"tail")
    case.add_patch(100 * 4096, 0)
    return case


@contextmanager
def file_size_limit(nbytes: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("direct", [False, True])
def test_write_beyond_the_file_size_limit(native_impl, tmp_path, direct) -> None:
    case = big_case(tmp_path)
    with file_size_limit(8 * 4096), pytest.raises(OSError) as caught:
        case.write(threads=1, direct=direct)
    path = case.paths()[0]
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, path)
    found = re.fullmatch(
        rf"write 4096 bytes at (\d+) to {re.escape(path)}: File too large", caught.value.strerror
    )
    # Past the page cache several chunks are in flight at once, and any of them may be the first to fail.
    assert found and int(found[1]) in ((32768, 36864, 40960) if direct else (32768,))


@pytest.mark.timeout(60)
def test_failure_wakes_threads_that_wait_for_a_stream(native_impl, tmp_path) -> None:
    case = big_case(tmp_path)
    for limit in range(0, 100, 9):
        with file_size_limit(limit * 4096), pytest.raises(OSError):
            case.write(threads=4)


def test_missing_directory(native_impl, tmp_path) -> None:
    case = big_case(tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as caught:
        case.write(direct=True)
    path = case.paths()[0]
    assert caught.value.strerror == f"open {path}: No such file or directory"
    assert caught.value.filename == path


def test_path_is_a_directory(native_impl, tmp_path) -> None:
    (tmp_path / "file0").mkdir()
    with pytest.raises(IsADirectoryError, match=r"rename .*file0: Is a directory"):
        big_case(tmp_path).write()


def test_name_that_is_not_utf8(native_impl, tmp_path) -> None:
    directory = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff")
    with pytest.raises(FileNotFoundError) as caught:
        native.write_files(
            [directory + "/x"],
            file_nbytes=column(0),
            **named(PIECE, [column()] * 5),
            **named(PATCH, [column()] * 3),
            digest_count=0,
            fsync=False,
            **HOW,
        )
    assert caught.value.filename == directory + "/x"


@pytest.mark.parametrize("wrong", [bytearray(80), memoryview(bytes(80)).cast("i")])
def test_columns_of_the_wrong_type(wrong) -> None:
    with native.using("engine"), pytest.raises(TypeError, match="piece_file is not a one-dimensional buffer"):
        native.write_files(**{**GOOD, "piece_file": wrong})


@pytest.mark.parametrize("direct", [False, True])
def test_files_get_their_names_when_all_are_whole(native_impl, tmp_path, direct) -> None:
    """Until then, a file with that name stays as it is; readers that have it open keep it."""
    case = big_case(tmp_path)
    path = case.paths()[0]
    with open(path, "wb") as file:
        file.write(b"of another save")
    with file_size_limit(8 * 4096), pytest.raises(OSError, match="File too large"):
        case.write(direct=direct)
    assert os.listdir(tmp_path) == ["file0"], "a partial file is left"
    with open(path, "rb") as before:
        case.write(direct=direct)
        assert before.read() == b"of another save"
    with open(path, "rb") as after:
        assert after.read() == case.images[0]
    assert os.listdir(tmp_path) == ["file0"]


def test_progress_counts_and_stops(native_impl, tmp_path) -> None:
    case = big_case(tmp_path)
    path = case.paths()[0]
    progress = native.Progress()
    assert (progress.nbytes, progress.stopped, progress.renaming) == (0, False, False)
    case.write(progress=progress)
    assert progress.nbytes == sum(map(len, case.images)) and not progress.renaming
    os.unlink(path)
    progress.stop()
    assert progress.stopped
    with pytest.raises(OSError, match=r"write .*file0: Operation canceled") as caught:
        case.write(threads=1, progress=progress)
    assert (caught.value.errno, caught.value.filename) == (errno.ECANCELED, path)
    assert os.listdir(tmp_path) == []


def test_no_rename_begins_once_it_is_stopped(native_impl) -> None:
    progress = native.Progress()
    assert progress.begin_rename() and progress.begin_rename()
    progress.stop()
    assert not progress.begin_rename() and progress.renaming
    progress.end_rename()
    assert progress.renaming, "the other one is still under way"
    progress.end_rename()
    assert not progress.renaming


def test_a_read_that_is_stopped(native_impl, tmp_path) -> None:
    case = big_case(tmp_path)
    case.write()
    into, progress = ctypes.create_string_buffer(100 * 4096), native.Progress()
    extent = [column(0), column(0), column(100 * 4096), column(ctypes.addressof(into))]
    request = {**named(EXTENT, extent), **named(RANGE, [column()] * 4), **HOW, "progress": progress}
    native.read_extents(case.paths(), **request)
    assert progress.nbytes == 100 * 4096
    progress.stop()
    with pytest.raises(OSError, match=r"read .*file0: Operation canceled") as caught:
        native.read_extents(case.paths(), **request)
    assert caught.value.errno == errno.ECANCELED
