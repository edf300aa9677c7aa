# SPDX-License-Identifier: Apache-2.0
"""The documentation is correct: links resolve, snippets run, tables match the code."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import serialization

import ckpt_fast
from ckpt_fast import compat, settings
from ckpt_fast.checkpointing import create_checkpoint_manager
from ckpt_fast.config import CheckpointConfig
from ckpt_fast.format.archive import item_nbytes, tensor_archive
from ckpt_fast.format.names import SIDECAR_FILE
from tests import models
from tests.frameworks.test_frameworks import EXAMPLES
from tests.helpers import run_ranks

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PARTS = ("doors", "megatron", "native", "pipeline", "trainer")
TOP_FOLDERS = ("benchmarks", "ckpt_fast", "csrc", "docs", "examples", "scripts", "tests")

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(document: Path) -> str:
    """Return the text without its fenced blocks."""
    return FENCE.sub("", document.read_text())


def blocks(document: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(document.read_text()) if found == language]


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings."""
    titles = re.findall(r"^#+ (.*)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# --- What all documents hold ------------------------------------------------------------------------------


@documents
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@documents
def test_tests_that_are_named_exist(document: Path) -> None:
    for name, path in re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", document.read_text()):
        assert f"def {name}(" in (document.parent / path).read_text(), name


@documents
def test_paths_exist(document: Path) -> None:
    """Paths in code spans, from the top of the repository or from the package; others are in a checkpoint."""
    for path in re.findall(r"`((?:\w+/)+[\w.*/-]*)`", prose(document)):
        top = path.partition("/")[0]
        if top in TOP_FOLDERS:
            assert list(ROOT.glob(path.rstrip("/"))), path
        elif top in PARTS:
            assert list((ROOT / "ckpt_fast").glob(path.rstrip("/"))), path


@documents
def test_dotted_names_exist(document: Path) -> None:
    for name in re.findall(r"`(ckpt_fast(?:\.\w+)+)(?:\(\))?`", prose(document)):
        if name == SIDECAR_FILE:
            continue
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


@documents
def test_make_targets_exist(document: Path) -> None:
    makefiles = (ROOT / "Makefile").read_text() + (ROOT / "csrc" / "targets.mk").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefiles, re.M))
    mentioned = re.findall(r"(?:^|`)make ([a-z][a-z-]*)", document.read_text(), re.M)
    assert targets >= set(mentioned)


@documents
def test_environment_variables_exist(document: Path) -> None:
    code = (ROOT / "ckpt_fast" / "settings.py").read_text() + (ROOT / "setup.py").read_text()
    for name in re.findall(r"CKPT_FAST_[A-Z_]+[A-Z]", document.read_text()):
        assert re.search(rf"\b{name}\b", code), name


# --- README -----------------------------------------------------------------------------------------------


def variables() -> dict[str, tuple[str, str]]:
    """Map each environment variable to (default, meaning), from the docstrings of ``settings``."""
    found = {}
    for _, function in inspect.getmembers(settings, inspect.isfunction):
        first = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
        match = re.match(r"``(CKPT_FAST_\w+)``(?: \(([^)]*)\))?: (.*)", first)
        if match:
            meaning, _, default = match[3].replace("``", "`").partition(" Default: ")
            found[match[1]] = (match[2] or default.rstrip("."), meaning.rstrip("."))
    return found


def test_table_of_environment_variables() -> None:
    rows = re.findall(r"^\| `(CKPT_FAST_\w+)` \| ([^|]*) \| ([^|]*) \|$", README.read_text(), re.M)
    table = {name: (default.strip(), meaning.strip()) for name, default, meaning in rows}
    assert table == variables()


def run_snippet(code: str, names: dict[str, Any], forget: Callable[[], None]) -> None:
    """Execute the statements of a snippet; ``forget`` is called before the last one."""
    *first, last = ast.parse(code).body
    exec(compile(ast.Module(first, []), "README.md", "exec"), names)
    forget()
    exec(compile(ast.Module([last], []), "README.md", "exec"), names)


def documented_api_snippet(rank: int, code: str, directory: str) -> None:
    """The snippet resumes what was saved, and then saves."""
    with models.Run(models.Setup(), save=directory, load=directory) as run:
        run.train()
        run.save()
        saved = run.fingerprint()
        run.train()
        parts = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler}
        names: dict[str, Any] = {"state": run.state, **parts}
        tracker = Path(directory) / "latest_checkpointed_iteration.txt"
        run_snippet(code, names, forget=tracker.unlink)
        assert (names["iteration"], names["flops"]) == (1, models.FLOPS)
        assert models.differences(saved, run.fingerprint()) == []
        assert tracker.read_text() == "1"


def megatron_core_snippet(rank: int, code: str, directory: str) -> None:
    """The snippet saves the weights and restores them after they were lost."""
    with models.Run(models.Setup()) as run, models.megatron_on_cpu():
        chunk = compat.unwrap_model(run.model)[0]
        weights = {name: value.detach().clone() for name, value in chunk.named_parameters()}

        def forget() -> None:
            for parameter in chunk.parameters():
                parameter.data.zero_()

        names: dict[str, Any] = {"model": chunk, "directory": directory}
        run_snippet(code, names, forget)
        chunk.load_state_dict(names["state_dict"])
        assert models.identical(weights, dict(chunk.named_parameters()))


def torch_dcp_snippet(rank: int, code: str, directory: str) -> None:
    """The snippet saves a tensor and restores it after it was lost."""
    weight = torch.arange(12.0).view(3, 4)
    names = {"state_dict": {"weight": weight, "step": 7}, "directory": directory}
    run_snippet(code, names, forget=weight.zero_)  # type: ignore[arg-type]
    assert torch.equal(weight, torch.arange(12.0).view(3, 4))


def manager_snippet(rank: int, code: str, directory: str) -> None:
    """The snippet trains until it is told to stop, saves then, and goes on when it is run again."""
    state = {"weight": torch.zeros(3)}

    def train(step: int) -> None:
        state["weight"] += 1
        if step % 3 == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    names: dict[str, Any] = {"state_dict": state, "directory": directory, "steps": 100, "train": train}
    for expected in (3, 6):
        exec(compile(code, "README.md", "exec"), names)
        assert names["step"] == expected and state["weight"].tolist() == [expected] * 3
        state["weight"].zero_()
    assert names["manager"].latest() == 6


def install_snippet(rank: int, code: str, directory: str) -> None:
    """The snippet makes our strategy the one that Megatron-Core builds by default."""
    try:
        exec(compile(code, "README.md", "exec"), {})
        strategy = serialization.get_default_save_sharded_strategy()
    finally:
        ckpt_fast.uninstall()
    assert isinstance(strategy, ckpt_fast.FastSaveStrategy)


def bridge_snippet(rank: int, code: str, directory: str) -> None:
    """The snippet's last line names our manager; the rest needs Bridge (tests/interop)."""
    names = {"config": types.SimpleNamespace(checkpoint=CheckpointConfig())}
    exec(compile(ast.Module([ast.parse(code).body[-1]], []), "README.md", "exec"), names)
    manager = create_checkpoint_manager(names["config"].checkpoint)
    assert isinstance(manager, ckpt_fast.FastCheckpointManager)


def listener_snippet(rank: int, code: str, directory: str) -> None:
    """The snippet's listener prints a line for each save, until it is removed."""
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
        dcp.save({"weight": torch.ones(3)}, storage_writer=ckpt_fast.FastStorageWriter(directory))
        names["leave"]()
        dcp.save({"weight": torch.ones(3)}, storage_writer=ckpt_fast.FastStorageWriter(directory))
    assert re.fullmatch(rf"{re.escape(directory)} [\d.]+ [\d.]+\n", printed.getvalue())


def test_table_of_the_demo() -> None:
    """The sample has the rows that the demo prints."""
    demo = (ROOT / "examples" / "demo.py").read_text()
    (sample,) = [block for block in blocks(README, "") if "identical" in block]
    shown = re.findall(r"^  ([\w/ -]+): ", sample, re.M)
    positions = [demo.rindex(f'"{name}": ') for name in shown]
    assert len(shown) > 5
    assert positions == sorted(positions)


PAGE_OF_FRAMEWORKS = ROOT / "docs" / "frameworks.md"

# A string that occurs in this door's snippet and in no other.
DOORS = {
    "ckpt_fast.checkpointing": documented_api_snippet,
    "FastSaveStrategy": megatron_core_snippet,
    "ckpt_fast.save(": torch_dcp_snippet,
    "FastStorageWriter": torch_dcp_snippet,
    "ckpt_fast.install()": install_snippet,
    "CheckpointManager(": manager_snippet,
    "FastCheckpointManager": bridge_snippet,
    "add_listener": listener_snippet,
}


@pytest.mark.parametrize("door", DOORS)
def test_snippet_runs(door: str, tmp_path: Path) -> None:
    (code,) = [block for block in blocks(README, "python") if door in block]
    run_ranks(DOORS[door], 1, code, str(tmp_path))


def test_every_snippet_is_run() -> None:
    for block in blocks(README, "python"):
        assert len([door for door in DOORS if door in block]) == 1


# --- docs/frameworks.md -----------------------------------------------------------------------------------


def test_snippets_for_frameworks(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        for block in blocks(PAGE_OF_FRAMEWORKS, "python"):
            exec(compile(block, "frameworks.md", "exec"), {})
    finally:
        ckpt_fast.uninstall()
    assert "FileSystemWriter" in capsys.readouterr().out


def test_frameworks_are_tested_in_these_versions() -> None:
    files = [(ROOT / "requirements" / f"{name}.txt").read_text() for name in ("frameworks", "torchtune")]
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", "\n".join(files), re.M))
    rows = re.findall(
        r"^\| `([\w-]+)`[^|]*\| ([\d.]+) \|.*/(\w+\.py)\) \|$", PAGE_OF_FRAMEWORKS.read_text(), re.M
    )
    assert [version for _, version, _ in rows] == [pinned[name] for name, _, _ in rows]
    assert {example for *_, example in rows} == {name.split()[0] for name in EXAMPLES}


# --- docs/format.md ---------------------------------------------------------------------------------------


def test_example_of_an_item() -> None:
    shape, raw_nbytes = (256, 256), 256 * 256 * 4
    archive = tensor_archive(torch.float32, shape)
    item = archive.head + bytes(raw_nbytes) + archive.tail
    locals_ = [match.start() for match in re.finditer(rb"PK\x03\x04", archive.head)]
    tail = len(archive.head) + raw_nbytes
    directory = tail + archive.tail.index(b"PK\x01\x02")
    end = tail + archive.tail.index(b"PK\x05\x06")
    descriptor_crc, directory_crc = (tail + offset for offset in archive.crc_offsets)
    expected = [*locals_, len(archive.head), tail, directory, end, item_nbytes(archive, raw_nbytes)]
    page = (ROOT / "docs" / "format.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.M)
    assert [int(offset) for offset, _ in rows] == expected
    assert expected[-1] == len(item)
    assert f"CRC-32 at {descriptor_crc}" in page
    assert f"CRC-32 of the raw bytes at {directory_crc}" in page


# --- docs/decisions ---------------------------------------------------------------------------------------


def test_decisions_are_numbered_listed_and_complete() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
    assert [path.name[:4] for path in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    index = (folder / "README.md").read_text()
    for path in pages:
        text = path.read_text()
        title = text.split("\n", 1)[0].removeprefix(f"# {path.name[:4]}. ")
        assert f"| {path.name[:4]} | [{title}]({path.name}) |" in index
        assert re.findall(r"^## (.*)$", text, re.M) == ["Context", "Decision", "Consequences"]
