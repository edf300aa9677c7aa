# SPDX-License-Identifier: Apache-2.0
"""The error types: what they can be caught as, what they say, and that they pickle."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
from pathlib import Path

import pytest

from ckpt_fast import errors
from ckpt_fast.errors import CheckpointError, CheckpointNotFoundError, CheckpointWriteError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CheckpointError)]
BUILTIN = {
    "CheckpointError": Exception,
    "CheckpointNotFoundError": FileNotFoundError,
    "CheckpointCorruptError": Exception,
    "DamagedFileError": RuntimeError,
    "CheckpointMismatchError": ValueError,
    "UnknownFormatError": FileNotFoundError,
    "CheckpointWriteError": OSError,
    "UnsafeCheckpointError": Exception,
    "AsyncSaveError": RuntimeError,
}


def test_all_kinds_are_listed_here() -> None:
    assert {kind.__name__ for kind in KINDS} == set(BUILTIN)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_kind(kind: type[CheckpointError]) -> None:
    error = kind("what failed, where, what to do")
    assert isinstance(error, BUILTIN[kind.__name__])
    assert str(error) == "what failed, where, what to do"
    with pytest.raises(CheckpointError):
        raise error


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_kind_travels(kind: type[CheckpointError], protocol: int) -> None:
    for other in (pickle.loads(pickle.dumps(kind("text"), protocol)), copy.copy(kind("text"))):
        assert type(other) is kind and str(other) == "text"


def test_write_error_keeps_errno_and_path() -> None:
    error = CheckpointWriteError("text", errno.ENOSPC, Path("/data/file"))
    for other in (error, pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (other.errno, other.filename, str(other)) == (errno.ENOSPC, "/data/file", "text")


def test_write_error_without_an_errno() -> None:
    error = CheckpointWriteError("text")
    assert (error.errno, error.filename, str(error)) == (None, None, "text")


def test_not_found_is_one_plain_message() -> None:
    error = CheckpointNotFoundError("text")
    assert str(error) == "text" and error.errno is None
