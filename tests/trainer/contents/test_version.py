# SPDX-License-Identifier: Apache-2.0
"""The process-wide checkpoint version."""

from __future__ import annotations

import pytest

from ckpt_fast.trainer.contents import version


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "_CHECKPOINT_VERSION", None)


def test_version_is_set_once() -> None:
    assert version.get_checkpoint_version() is None
    version.set_checkpoint_version(3.0)
    version.set_checkpoint_version(3.0)
    assert version.get_checkpoint_version() == 3.0
    with pytest.raises(AssertionError, match="checkpoint versions do not match"):
        version.set_checkpoint_version(0)
    assert version.get_checkpoint_version() == 3.0


def test_version_zero_counts_as_set() -> None:
    version.set_checkpoint_version(0)
    with pytest.raises(AssertionError):
        version.set_checkpoint_version(3.0)
