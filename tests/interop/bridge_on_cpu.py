# SPDX-License-Identifier: Apache-2.0
"""Imports Megatron Bridge without Transformer Engine, which needs a GPU.

Bridge's adapter layers derive from Transformer Engine's classes, so importing anything from Bridge needs
them. Only Bridge's modules get the stand-in: Megatron-Core still sees none.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import types
from collections.abc import Iterator
from typing import Any

_PACKAGE = "transformer_engine"


class _StandIn(types.ModuleType):
    """A module in which every name exists: submodules if lower case, classes otherwise."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (), {}) if name[:1].isupper() else _StandIn(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


@contextlib.contextmanager
def transformer_engine_for_bridge() -> Iterator[None]:
    """Make ``import transformer_engine`` succeed in this block, for Megatron Bridge's modules only."""
    real_import, root = builtins.__import__, _StandIn(_PACKAGE)

    def stand_in(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        importer = str((globals or {}).get("__name__", ""))
        if level or name.partition(".")[0] != _PACKAGE or not importer.startswith("megatron.bridge"):
            return real_import(name, globals, locals, fromlist, level)
        module: Any = root
        for part in name.split(".")[1:]:
            module = getattr(module, part)
        return module if fromlist else root

    builtins.__import__ = stand_in
    try:
        yield
    finally:
        builtins.__import__ = real_import


def load_bridge() -> types.SimpleNamespace:
    """Return the Megatron Bridge modules that a training script uses. ImportError if it is not installed."""
    importlib.import_module("megatron.core.models.gpt")
    with transformer_engine_for_bridge():
        names = ("callbacks", "config", "state")
        found = {name: importlib.import_module(f"megatron.bridge.training.{name}") for name in names}
        found["instantiate"] = importlib.import_module("megatron.bridge.utils.instantiate_utils")
        found["checkpointing"] = importlib.import_module("megatron.bridge.training.checkpointing")
    return types.SimpleNamespace(**found)


def load_auto_bridge() -> Any:
    """Return the class ``megatron.bridge.AutoBridge``. ImportError if it is not installed."""
    importlib.import_module("megatron.core.models.gpt")
    with transformer_engine_for_bridge():
        return importlib.import_module("megatron.bridge").AutoBridge
