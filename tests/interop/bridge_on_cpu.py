# SPDX-License-Identifier: Apache-2.0
"""Megatron Bridge imported without Transformer Engine, which wants a GPU.

Bridge's adapter layers derive from Transformer Engine's classes, so that importing anything of Bridge needs
them. Only modules of Bridge get the stand-in: Megatron-Core keeps seeing that there is none.
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
    """A module that has every name asked of it: submodules in lower case, classes otherwise."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (), {}) if name[:1].isupper() else _StandIn(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


@contextlib.contextmanager
def transformer_engine_for_bridge() -> Iterator[None]:
    """``import transformer_engine`` succeeds in here, for modules of Megatron Bridge alone."""
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
    """Modules of Megatron Bridge that a training script uses. ImportError where it is not installed."""
    importlib.import_module("megatron.core.models.gpt")
    with transformer_engine_for_bridge():
        names = ("callbacks", "config", "state")
        found = {name: importlib.import_module(f"megatron.bridge.training.{name}") for name in names}
        found["instantiate"] = importlib.import_module("megatron.bridge.utils.instantiate_utils")
        found["checkpointing"] = importlib.import_module("megatron.bridge.training.checkpointing")
    return types.SimpleNamespace(**found)


def load_auto_bridge() -> Any:
    """The class ``megatron.bridge.AutoBridge``. ImportError where it is not installed."""
    importlib.import_module("megatron.core.models.gpt")
    with transformer_engine_for_bridge():
        return importlib.import_module("megatron.bridge").AutoBridge
