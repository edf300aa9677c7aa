# SPDX-License-Identifier: Apache-2.0
"""Importing what may not be installed."""

from __future__ import annotations

import importlib
from typing import Any

from ckpt_fast.errors import UnavailableError


def without_megatron_core(error: ModuleNotFoundError) -> ImportError:
    """The error to raise when Megatron-Core cannot be imported; ``error`` if it is there but incomplete."""
    if error.name not in ("megatron", "megatron.core"):
        return error
    return UnavailableError(
        "this part of ckpt_fast needs Megatron-Core: pip install megatron-core, or install ckpt_fast as "
        "ckpt_fast[megatron]. CheckpointManager, the command line and the doors of torch DCP do without it."
    )


class _Unavailable:
    """Stands for a module that could not be imported; any use of it raises UnavailableError."""

    def __init__(self, name: str, cause: ImportError) -> None:
        self._name, self._cause = name, cause

    def _refuse(self) -> UnavailableError:
        return UnavailableError(f"{self._name} is needed here but cannot be imported: {self._cause}")

    def __getattr__(self, attribute: str) -> Any:
        # hasattr, copy and pickle probe for special names and must get the ordinary answer.
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise self._refuse() from self._cause

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse() from self._cause


def safe_import(name: str) -> tuple[Any, bool]:
    """Import a module that may be missing.

    Returns:
        (module, True), or (placeholder that raises UnavailableError on use, False). Only ImportError is
        caught: a package that is present but broken says so.
    """
    try:
        return importlib.import_module(name), True
    except ImportError as error:
        return _Unavailable(name, error), False


def import_names(module: str, *names: str) -> tuple[Any, ...]:
    """The named attributes of a module: all of them, or None for each when the module or one is missing."""
    found, present = safe_import(module)
    if not present or not all(hasattr(found, name) for name in names):
        return (None,) * len(names)
    return tuple(getattr(found, name) for name in names)
