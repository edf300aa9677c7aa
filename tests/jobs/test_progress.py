# SPDX-License-Identifier: Apache-2.0
"""The progress line on the terminal."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ckpt_fast
from ckpt_fast import native
from ckpt_fast.jobs import progress
from tests.pipeline.layouts import whole
from tests.pipeline.save.test_save import FILES
from tests.saves import save

pytestmark = pytest.mark.usefixtures("no_fsync")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    # pytest replaces sys's streams after the fixtures have run.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=found))
    monkeypatch.setattr(progress, "_AFTER_S", 0.05)
    monkeypatch.setattr(progress, "_EVERY_S", 0.01)
    return found


def test_a_long_save_shows_how_far_it_is(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = native.write_files

    def slowly(*arguments: object, **options: object) -> object:
        time.sleep(0.3)
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(native.engine(), "write_files", slowly)
    save([whole("w", torch.zeros(500_000))], str(tmp_path), **FILES)
    text = terminal.getvalue()
    assert f"saving {tmp_path}: 0 % of 2.0 MB, 0.00 GB/s" in text
    assert text.endswith("\r\x1b[K"), "the line is wiped"


def test_a_short_save_shows_nothing(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_AFTER_S", 60.0)
    save([whole("w", torch.zeros(500_000))], str(tmp_path), **FILES)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("is_hidden", [False, True])
def test_a_long_load_shows_how_far_it_is(
    is_hidden: bool, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt_fast.save({"w": torch.ones(500_000)}, tmp_path)
    original, found = native.read_extents, torch.zeros(500_000)

    def slowly(*arguments: object, **options: object) -> object:
        time.sleep(0.3)
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(native.engine(), "read_extents", slowly)
    terminal.seek(0)
    with progress.hidden() if is_hidden else contextlib.nullcontext():
        ckpt_fast.load({"w": found}, tmp_path)
    assert bool(found.all())
    text = terminal.getvalue()
    assert (f"loading {tmp_path}: 0 % of 2.0 MB, 0.00 GB/s" in text) is not is_hidden
