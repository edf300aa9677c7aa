# SPDX-License-Identifier: Apache-2.0
"""The garbage collector is off while planning, and on again afterwards, whatever happened."""

from __future__ import annotations

import gc

import pytest

from ckpt_fast.pipeline.memory import garbage
from ckpt_fast.pipeline.memory.garbage import without_collections


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@without_collections
def is_enabled() -> bool:
    return gc.isenabled()


@without_collections
def nested() -> bool:
    return is_enabled() or gc.isenabled()


def test_collector_is_off_inside() -> None:
    assert gc.isenabled()
    assert not nested()
    assert gc.isenabled()


def test_left_alone_if_it_is_off() -> None:
    gc.disable()
    try:
        assert not is_enabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_interruption_at_the_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = garbage._begin

    def begin_and_stop(pause: garbage._Pause) -> None:
        begin(pause)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(garbage, "_begin", begin_and_stop)
        with pytest.raises(KeyboardInterrupt):
            nested()
    assert gc.isenabled()


def test_an_interruption_at_the_end_is_made_good_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(garbage, "_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            is_enabled()
    assert not nested()
    assert gc.isenabled()
