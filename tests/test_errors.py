# SPDX-License-Identifier: Apache-2.0
"""The error types: what they can be caught as, what they say, and that they pickle."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
from pathlib import Path

import pytest

from ckpt_fast import compat, errors
from ckpt_fast.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    also_raised_as,
)
from ckpt_fast.ranks.group import ControlGroup

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
    "StorageError": OSError,
    "RankLostError": Exception,
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


class AnotherLibraryError(Exception):
    """What callers of its interface catch."""


FOREIGN = [AnotherLibraryError, compat.DistCheckpointingError]


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_of_two_kinds(kind: type[CheckpointError], foreign: type[BaseException]) -> None:
    original, cause = kind("what failed, where, what to do"), OSError("why")

    @also_raised_as(foreign)
    def fail() -> None:
        raise original from cause

    for _ in range(2):  # an error that is kept may be raised again
        with pytest.raises(kind, match=r"^what failed, where, what to do$") as raised:
            fail()
        error = raised.value
        assert error is original and isinstance(error, foreign) and error.__cause__ is cause
        assert type(error).__name__ == kind.__name__ and type(error).__module__ == kind.__module__
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error) and str(other) == str(error)


def test_errno_and_path_stay() -> None:
    with pytest.raises(CheckpointWriteError) as raised, also_raised_as(AnotherLibraryError):
        raise CheckpointWriteError("text", errno.ENOSPC, "/data/file")
    for error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert isinstance(error, AnotherLibraryError)
        assert (error.errno, error.filename, str(error)) == (errno.ENOSPC, "/data/file", "text")


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(KeyError) as raised, also_raised_as(AnotherLibraryError):
        raise KeyError("key")
    assert not isinstance(raised.value, AnotherLibraryError)


def test_an_agreement_raises_our_kind_alone() -> None:
    """Who calls a door from within has another interface."""

    @also_raised_as(AnotherLibraryError)
    def fail() -> None:
        raise CheckpointNotFoundError("text")

    with pytest.raises(CheckpointNotFoundError, match="rank 0: text") as raised:
        ControlGroup.of_one().agree(fail)
    assert type(raised.value) is CheckpointNotFoundError
