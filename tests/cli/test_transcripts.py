# SPDX-License-Identifier: Apache-2.0
"""docs/cli.md shows what the commands print, and every command does the same in a pipe and on a terminal."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckpt_fast
from ckpt_fast.cli import _COMMANDS
from tests.cli.running import Ran, in_pipe, on_terminal, state

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


@pytest.fixture
def places(
    runs: dict[str, Path],
    dcp_checkpoints: dict[str, Path],
    local_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The directory that the page's commands are run in."""
    shutil.copytree(runs["ours"], tmp_path / "run")
    shutil.copytree(runs["stock"], tmp_path / "stock_run")
    for name in ("ours", "stock"):
        shutil.copytree(dcp_checkpoints[name], tmp_path / f"dcp_{name}")
    shutil.copytree(local_checkpoint, tmp_path / "local")
    other = state()
    other["model"]["weight"][3, 4] += 0.5
    other["step"] = 8
    dcp.save(other, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp_later"), no_dist=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CKPT_FAST_METRICS", str(tmp_path / "saves.jsonl"))
    for step in (100, 200, 300):
        ckpt_fast.save({"w": torch.ones(100_000)}, tmp_path / "more" / f"step_{step}", no_dist=True)
    return tmp_path


def transcripts() -> list[tuple[str, str]]:
    """(command, output) of every example of the page."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    found = []
    for block in blocks:
        for example in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = example.partition("\n")
            found.append((command, output))
    return found


def skeleton(text: str) -> list[str]:
    """The words of each line; numbers, and what only they decide (bars, units, alignment), are left out."""
    text = re.sub(r"[█▁▂▃▄▅▆▇]+", "", text)
    text = re.sub(r"\b[0-9a-f]{32}\b", "ID", text)
    text = re.sub(r"\b(CRC-32|instead of) [0-9a-f]{8}\b", r"\1 0", text)
    text = re.sub(r"-?\d[\d.,]*(?:e[+-]?\d+)?(?:\+\w+)?\b", "0", text)
    text = re.sub(r"\b0 ([kMGT]?B|s|min|h|d)\b", "0", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


# What a machine is like is another on every machine.
SAME_WORDS_AT_THE_BEGINNING = {"doctor": 1, "bench": 2}


def test_the_page_shows_what_is_printed(places: Path) -> None:
    shown = set()
    for command, output in transcripts():
        name, *arguments = shlex.split(command)
        assert name == "ckpt-fast"
        ran = in_pipe(*arguments)
        shown.add(arguments[0])
        printed, expected = skeleton(ran.out + ran.err), skeleton(output)
        words = SAME_WORDS_AT_THE_BEGINNING.get(arguments[0])
        if words is None:
            assert printed == expected, command
        else:
            first = [[line.split()[:words] for line in lines] for lines in (printed, expected)]
            assert [each for each in first[1] if each not in first[0]] == [], command
    assert shown >= set(_COMMANDS)


def test_the_page_names_every_option() -> None:
    page = PAGE.read_text()
    for name in _COMMANDS:
        assert f"\n## `{name}" in page
        options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", in_pipe(name, "--help").out, re.M)
        section = page.split(f"\n## `{name}")[1].split("\n## ")[0]
        missing = [each for each in options if each not in section and each not in ("--help", "--json")]
        assert missing == [], name


MATRIX = {
    "inspect": ["inspect", "{}"],
    "verify": ["verify", "--deep", "{}"],
    "diff": ["diff", "{}", "{}"],
    "ls": ["ls", "{}"],
    "prune": ["prune", "{}", "--keep", "2"],
    "convert": ["convert", "{}", "converted", "--to", "safetensors"],
    "doctor": ["doctor", "{}"],
    "top": ["top", "saves.jsonl"],
    "bench": ["bench", "{}", "--size", "1", "--rounds", "1"],
}


# They look at the storage or at a report, not at a checkpoint.
ANYWHERE = {"doctor", "top", "bench"}


@pytest.mark.parametrize("checkpoint", ["run", "stock_run", "dcp_ours", "dcp_stock", "local"])
def test_every_command_on_ours_and_on_stock_in_a_pipe_and_on_a_terminal(
    checkpoint: str, places: Path
) -> None:
    assert {*MATRIX, "run"} == set(_COMMANDS)  # which prints what its script prints
    for name, template in MATRIX.items():
        if name in ANYWHERE and checkpoint != "run":
            continue
        arguments = [each.format(checkpoint) for each in template]
        ran: list[Ran] = []
        for run in (in_pipe, on_terminal, lambda *each: in_pipe(*each, "--json")):
            shutil.rmtree("converted", ignore_errors=True)
            ran.append(run(*arguments))
        plain, shown, as_json = ran
        expected = 2 if (name, checkpoint) == ("convert", "local") else 0
        assert [each.status for each in ran] == [expected] * 3, (arguments, [each.err for each in ran])
        assert "\x1b" not in plain.out
        if expected == 0:
            first = as_json.out.splitlines()[0] if name == "verify" else as_json.out  # an object for each
            assert isinstance(json.loads(first), (dict, list))
            assert shown.text
