# SPDX-License-Identifier: Apache-2.0
"""Finalizers that are run before their object goes."""

from __future__ import annotations

import weakref
from typing import Any


def run(finalizer: weakref.finalize[..., Any]) -> None:
    """Do what ``finalizer`` does, which may be done twice, and let it do nothing later.

    Calling it would forget it first: what a signal keeps it from would never be done.
    """
    call = finalizer.peek()
    if call is not None:
        _, function, arguments, _ = call
        function(*arguments)
        finalizer.detach()
