# SPDX-License-Identifier: Apache-2.0
"""Errors of background saves that nobody may ask for: logged when they happen, and again at exit."""

from __future__ import annotations

import atexit
import logging
from typing import NamedTuple

from ckpt_fast.errors import AsyncSaveError

logger = logging.getLogger(__name__)


class _Failure(NamedTuple):
    """What an error says. Errors themselves hold frames, and with them tensors."""

    kind: str
    text: str
    is_agreed: bool

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


_failures: dict[str, _Failure] = {}
# What was logged last, and may come again.
_logged: str | None = None


def report(directory: str, error: BaseException) -> None:
    """Log that a background save failed on this rank.

    The thread that writes reports its own error. Then the ranks agree on one, which is not logged if it says
    the same.
    """
    global _logged
    failure = _Failure(type(error).__name__, str(error), isinstance(error, AsyncSaveError))
    _failures[directory] = failure
    if not failure.is_agreed:
        logger.error("the save to %s in the background failed: %s", directory, failure)
    elif _logged is None or _logged not in failure.text:
        logger.error("%s", failure.text)
    _logged = None if failure.is_agreed else failure.text


def forget(directory: str | None = None) -> None:
    """The caller waiting for this save got its error; None: a newer save of this process was published."""
    if directory is None:
        _failures.clear()
    else:
        _failures.pop(directory, None)


@atexit.register
def say_again() -> None:
    """At exit: log the errors since the newest published save that no caller was told about."""
    for directory, failure in _failures.items():
        logger.error(
            "this process ends, and its save to %s had failed: %s. There is no checkpoint of it.",
            directory,
            failure,
        )
    _failures.clear()
