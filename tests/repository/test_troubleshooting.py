# SPDX-License-Identifier: Apache-2.0
"""``docs/troubleshooting.md`` has every error and every message, and no others."""

from __future__ import annotations

import functools
import re

import pytest

from ckpt_fast import errors
from tests.repository.messages import ERRORS, MORE_ERRORS, ROOT, all_messages, messages_in, normalized, shown

PAGE = ROOT / "docs" / "troubleshooting.md"


def listed() -> list[str]:
    return re.findall(r"^- `(.+)`$", PAGE.read_text(), re.M)


@functools.cache
def in_code() -> dict[str, str]:
    """Map what is shown of each message to where it is."""
    found = {}
    for text, (_, where) in all_messages().items():
        sentence = shown(text)
        if sentence is not None:
            found.setdefault(sentence, where)
    return found


def test_every_message_is_listed() -> None:
    shown_there = {*listed()}
    assert {where: text for text, where in in_code().items() if text not in shown_there} == {}


def test_every_listed_message_exists() -> None:
    assert [text for text in listed() if text not in in_code()] == []
    assert len(listed()) == len({*listed()})


def test_every_group_says_why_and_what_to_do() -> None:
    groups = re.split(r"^### ", PAGE.read_text(), flags=re.M)[1:]
    assert len(groups) > 30
    for group in groups:
        title = group.partition("\n")[0]
        assert re.search(r"^\*Cause\.\* \S", group, re.M), title
        assert re.search(r"^\*Remedy\.\* \S", group, re.M), title
        assert re.search(r"^- `", group, re.M), title


def test_every_error_has_its_row() -> None:
    rows = dict(re.findall(r"^\| `(\w+Error)` \| ([^|]*)\|", PAGE.read_text(), re.M))
    assert rows.keys() == ERRORS
    for name, bases in rows.items():
        error = getattr(errors, name)
        for base in re.findall(r"`(\w+)`", bases):
            assert base in [each.__name__ for each in error.__mro__], (name, base)


@pytest.mark.parametrize("name", sorted(ERRORS | MORE_ERRORS))
def test_an_error_says_what_it_means(name: str) -> None:
    value = getattr(errors, name, None)
    assert value is None or (value.__doc__ or "").strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot read %s: %s", "cannot read …"),
        ("{a} has\n no {b}", "… has no …"),
        ("plain", "plain"),
    ],
)
def test_normalized(text: str, expected: str) -> None:
    assert normalized(text) == expected


def test_messages_of_a_module(tmp_path: object) -> None:
    module = ROOT / "ckpt_fast" / "storage" / "space.py"
    (found,) = [text for _, kind, text in messages_in(module) if kind == "CheckpointWriteError"]
    assert found.startswith("cannot save to …: the checkpoint takes about … GB")
