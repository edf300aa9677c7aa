# SPDX-License-Identifier: Apache-2.0
"""What is worth saying once in a process: a fact that every save would repeat."""

from __future__ import annotations

_said: set[str] = set()


def first_time(what: str) -> bool:
    """Whether this has not been asked before in this process; ``what`` names the fact."""
    is_first = what not in _said
    _said.add(what)
    return is_first
