# SPDX-License-Identifier: Apache-2.0
"""Scripts as modules, which they are not on the import path."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.repository.documents.pages import ROOT


def script(name: str) -> ModuleType:
    """Import ``scripts/<name>.py``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
