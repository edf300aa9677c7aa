# SPDX-License-Identifier: Apache-2.0
"""``docs/api.md`` is correct, and every documented name has a home and a docstring."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ckpt_fast import checkpointing

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "api_table.py"
CODE = [name for name in checkpointing.__all__ if callable(getattr(checkpointing, name))]


@pytest.fixture(scope="module")
def api_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(api_table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--check"])
    assert api_table.main() == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("leave_ckpt_num: int | None = 1", "leave_ckpt_num: int | None = 2"),
        ("| `read_metadata` |", "| `read_meta` |"),
        ("../tests/trainer/places/test_trackers.py", "../tests/trainer/contents/test_version.py"),
        ("../tests/trainer/places/test_trackers.py", "../tests/trainer/no_such_test.py"),
        ("lists: 54 names", "lists: 53 names"),
    ],
)
def test_a_wrong_page_is_noticed(api_table: ModuleType, old: str, new: str) -> None:
    page = api_table.PAGE.read_text()
    assert old in page
    assert api_table.problems(page) == []
    assert api_table.problems(page.replace(old, new)) != []


def test_a_page_may_show_fewer_tests_than_there_are(api_table: ModuleType) -> None:
    link = ", [test_locate](../tests/trainer/places/test_locate.py)"
    page = api_table.PAGE.read_text()
    assert link in page
    assert api_table.problems(page.replace(link, "")) == []


@pytest.mark.parametrize("name", CODE)
def test_name_is_its_homes_own(name: str) -> None:
    value = getattr(checkpointing, name)
    homes = ("callbacks", "config", "glu.", "run.config_parts", "state", "trainer.")
    assert value.__module__.startswith(tuple(f"ckpt_fast.{home}" for home in homes))
    assert getattr(importlib.import_module(value.__module__), name) is value


@pytest.mark.parametrize("name", CODE)
def test_name_says_what_it_does(name: str) -> None:
    value = getattr(checkpointing, name)
    first = (value.__doc__ or "").strip().split("\n")[0]
    assert len(first) > 10
    # A dataclass without a docstring gets its signature as one.
    assert not first.startswith(f"{name}(")


@pytest.mark.parametrize("name", ["CheckpointManager", "DefaultCheckpointManager"])
def test_methods_say_what_they_do(name: str) -> None:
    for method, function in inspect.getmembers(getattr(checkpointing, name), inspect.isfunction):
        if not method.startswith("_"):
            assert function.__doc__, method


def test_importing_the_api_starts_nothing() -> None:
    """A program that only imports must neither join a group, nor touch a GPU, nor start a thread.

    Nor has it loaded a version of a checkpoint.
    """
    program = (
        "import threading, torch\n"
        "import ckpt_fast.checkpointing\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert ckpt_fast.checkpointing._CHECKPOINT_VERSION is None\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
