# SPDX-License-Identifier: Apache-2.0
"""The documentation is correct: links resolve, names exist, tables match the code and the reports."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from statistics import median

import pytest
import torch

from ckpt_fast import settings
from ckpt_fast.format.archive import item_nbytes, tensor_archive
from ckpt_fast.format.names import SIDECAR_FILE
from tests.frameworks.test_frameworks import EXAMPLES
from tests.repository.documents.pages import DOCUMENTS, README, ROOT, anchors, blocks, prose

PARTS = ("doors", "megatron", "native", "pipeline", "trainer")
TOP_FOLDERS = ("benchmarks", "ckpt_fast", "csrc", "docs", "examples", "scripts", "tests")
PAGE_OF_FRAMEWORKS = ROOT / "docs" / "frameworks.md"

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


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


# --- docs/configuration.md --------------------------------------------------------------------------------


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
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `(CKPT_FAST_\w+)` \| ([^|]*) \| ([^|]*) \|$", page, re.M)
    table = {name: (default.strip(), meaning.strip()) for name, default, meaning in rows}
    assert table == variables()


# --- README -----------------------------------------------------------------------------------------------

# Report, table in it, and names of its rows: ours, Megatron-Core's, torch DCP's and the limit.
DURABLE = ("save", 0, ["ckpt_fast", "mcore", "DCP, 1 thread", "limit: direct write + fsync"])
COLD = ("load", 1, ["ckpt_fast", "mcore", "DCP, 1 thread", "limit: direct read, 8 threads"])
WARM = ("load", 0, ["ckpt_fast", "mcore", "DCP, 1 thread", "limit: memcpy, 2 threads"])
CALL = ("stall", 0, ["ckpt_fast", "mcore async", "DCP async_save"])
NEXT_STEP = ("stall", 1, ["ckpt_fast", "mcore async", "DCP async_save"])


def test_table_of_measurements() -> None:
    """It shows the medians of the published reports, in milliseconds."""
    table = README.read_text().partition("| ms | ckpt_fast |")[2].partition("\n\n")[0]
    rows = [re.findall(r"\| (\d+)", row) for row in table.splitlines()[2:]]
    expected = []
    for report, number, names in (DURABLE, COLD, WARM, CALL, NEXT_STEP):
        tables = json.loads((ROOT / "benchmarks" / "results" / f"{report}.json").read_text())["tables"]
        expected.append([f"{median(tables[number]['seconds'][name]) * 1e3:.0f}" for name in names])
    assert rows == expected


def test_table_of_the_demo() -> None:
    """The sample has the rows that the demo prints."""
    demo = (ROOT / "examples" / "demo.py").read_text()
    (sample,) = [block for block in blocks(README, "") if "identical" in block]
    shown = re.findall(r"^  ([\w/ -]+): ", sample, re.M)
    positions = [demo.rindex(f'"{name}": ') for name in shown]
    assert len(shown) > 5
    assert positions == sorted(positions)


# --- docs/frameworks.md -----------------------------------------------------------------------------------


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
