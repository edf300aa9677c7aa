# SPDX-License-Identifier: Apache-2.0
"""Errors of background saves that nobody may ask for: logged when they happen, and again at exit."""

from __future__ import annotations

import atexit
import logging

logger = logging.getLogger(__name__)
_failures: dict[str, str] = {}


def report(directory: str, error: BaseException) -> None:
    """Log that a background save failed on this rank."""
    _failures[directory] = f"{type(error).__name__}: {error}"
    logger.error("the save to %s in the background failed: %s", directory, _failures[directory])


def forget(directory: str | None = None) -> None:
    """The caller waiting for this save got its error; None: a newer save of this process was published."""
    if directory is None:
        _failures.clear()
    else:
        _failures.pop(directory, None)


@atexit.register
def say_again() -> None:
    """At exit: log the errors since the newest published save that no caller was told about."""
    for directory, text in _failures.items():
        logger.error(
            "this process ends, and its save to %s had failed: %s. There is no checkpoint of it.",
            directory,
            text,
        )
    _failures.clear()
