# SPDX-License-Identifier: Apache-2.0
"""The choice between the engine, its fallback and the CUDA part."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import re
import sys
from pathlib import Path

import pytest

from ckpt_fast import native
from ckpt_fast.native import fallback


def test_engine_is_the_default(monkeypatch) -> None:
    monkeypatch.delenv("CKPT_FAST_NATIVE", raising=False)
    assert native.engine().__name__ == "ckpt_fast.native._engine"


def test_variable_switches_native_code_off(monkeypatch) -> None:
    monkeypatch.setenv("CKPT_FAST_NATIVE", "0")
    assert native.engine() is fallback
    assert native.write_files is fallback.write_files
    assert native.cuda() is None


def test_using_nests_and_restores() -> None:
    before = native.engine()
    with native.using("fallback"):
        with native.using("engine"):
            assert native.engine().__name__ == "ckpt_fast.native._engine"
        assert native.engine() is fallback
        assert native.cuda() is None
    assert native.engine() is before


def test_engine_that_is_not_built_is_reported_once(monkeypatch, caplog) -> None:
    native._compiled_engine.cache_clear()
    monkeypatch.setitem(sys.modules, "ckpt_fast.native._engine", None)
    try:
        with caplog.at_level(logging.WARNING, logger="ckpt_fast.native"):
            assert native.engine() is fallback
            assert native.engine() is fallback
    finally:
        native._compiled_engine.cache_clear()
    assert len(caplog.records) == 1
    assert "_engine" in caplog.records[0].getMessage()


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError):
        native.no_such_function  # noqa: B018


def test_all_three_declare_the_same_arguments() -> None:
    stub = Path(inspect.getfile(native)).with_name("_engine.pyi").read_text(encoding="utf-8")
    declared = {
        node.name: [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        for node in ast.parse(stub).body
        if isinstance(node, ast.FunctionDef)
    }
    compiled = importlib.import_module("ckpt_fast.native._engine")
    assert set(declared) <= set(native.__all__)
    for name, arguments in declared.items():
        assert list(inspect.signature(getattr(fallback, name)).parameters) == arguments
        signature = getattr(compiled, name).__doc__.splitlines()[0]
        assert re.findall(r"[(,] ?(\w+): ", signature) == arguments
