# SPDX-License-Identifier: Apache-2.0
"""Runs the uses on the system that this process is on: python -m tests.platforms.here"""

from __future__ import annotations

import importlib
import inspect
import sys
import tempfile
import traceback
from pathlib import Path


def run_all(directory: str) -> int:
    """Call each function of ``uses`` with a directory of its own, and print its name if it works."""
    uses = importlib.import_module("tests.platforms.uses")
    status = 0
    for name, use in inspect.getmembers(uses, inspect.isfunction):
        if use.__module__ != uses.__name__ or name.startswith("_"):
            continue
        place = Path(directory, name)
        place.mkdir()
        try:
            use(place)
            print(f"{name} works", flush=True)  # noqa: T201
        except Exception:
            status = 1
            traceback.print_exc()
    return status


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        sys.exit(run_all(root))
