# SPDX-License-Identifier: Apache-2.0
"""What packages say of themselves, and that every place where checks run calls the same script."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckpt_fast.version import RELEASE

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()


def table(name: str) -> dict[str, list[str]]:
    """The lists of strings in a table of ``pyproject.toml``; Python 3.10 has no reader for it."""
    (text,) = re.findall(rf"^\[{re.escape(name)}\]\n(.*?)(?=^\[|\Z)", PROJECT, re.M | re.S)
    return {
        key: re.findall(r'"([^"]*)"', values)
        for key, values in re.findall(r"^([\w-]+) = \[(.*?)\](?= *(?:#.*)?$)", text, re.M | re.S)
    }


def workflow() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    return loaded


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_changelog_begins_with_this_release() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == RELEASE


def test_the_release_is_written_in_one_place() -> None:
    assert (
        "version"
        not in re.sub(r'dynamic = \["version"\]|requires-python|target-version', "", PROJECT).split()
    )
    assert f'RELEASE = "{RELEASE}"' in (ROOT / "ckpt_fast" / "version.py").read_text()
    assert RELEASE not in PROJECT + (ROOT / "setup.py").read_text().split('"""', 2)[2]


def test_the_extra_all_is_all() -> None:
    extras = table("project.optional-dependencies")
    (every,) = extras.pop("all")
    assert every == f"ckpt_fast[{','.join(extras)}]"
    assert set(extras) == {"megatron", "nvrx", "cli", "msc", "hf"}


def test_the_command_line_works_without_its_extra() -> None:
    assert set(table("project.optional-dependencies")["cli"]) <= set(table("project")["dependencies"])


def test_licenses_of_what_is_bundled_are_there() -> None:
    named = re.findall(r"\]\(([\w.]+\.txt)\)", (ROOT / "licenses" / "README.md").read_text())
    assert sorted(named) == sorted(path.name for path in (ROOT / "licenses").glob("*.txt"))
    assert table("project")["license-files"] == ["LICENSE", "licenses/*"]


def test_classified_pythons_are_those_that_wheels_are_built_for() -> None:
    pythons = re.findall(r"Python :: (3\.\d+)", PROJECT)
    built = re.findall(r"for version in ([\d. ]+);", (ROOT / "Makefile").read_text())
    assert set(pythons) <= set(built[0].split())


def test_wheels_are_built_for_the_pythons_that_there_are(tmp_path: Path) -> None:
    """Also where the newest is missing."""
    python = tmp_path / "python3.10"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    environment = {**os.environ, "PATH": os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"])}
    command = ["make", "--silent", "--eval", "pythons: ; @echo $(PYTHONS)", "pythons"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "python3.10" in ran.stdout.split()


def test_the_workflow_calls_what_is_called_here() -> None:
    jobs = workflow()["jobs"]
    assert commands(jobs["tests"])[-1] == ".ci/run"
    assert commands(jobs["wheels"])[1:] == ["make wheels", "make smoke"]


def test_the_workflow_installs_what_wheels_of_another_processor_need() -> None:
    package = re.findall(r"Debian: binutils, ([\w-]+)", (ROOT / "scripts" / "wheels.py").read_text())[0]
    assert package in commands(workflow()["jobs"]["wheels"])[0].split()


@pytest.mark.parametrize("name", ["tests", "wheels", "laptops"])
def test_the_workflow_may_only_read(name: str) -> None:
    assert workflow()["permissions"] == {"contents": "read"}
    assert "permissions" not in workflow()["jobs"][name]
    assert workflow()["jobs"][name]["timeout-minutes"] <= 120
