# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs, at a size too small to measure anything, so that none can rot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--gigabytes", "0.002", "--rounds", "1"]


def run(command: list[str], **environment: str) -> str:
    """Return the output of a command, which must succeed."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def run_script(script: str, path: Path, *arguments: str) -> str:
    """Return the report of one script, which must leave nothing else behind."""
    report, work = path / "report.txt", path / "work"
    where = ["--path", str(work), "--output", str(report)]
    output = run([str(BENCHMARKS / script), *TINY, *where, *arguments])
    assert list(work.iterdir()) == []
    assert report.read_text() in output
    for table in json.loads(report.with_suffix(".json").read_text())["tables"]:
        assert table["title"] in output and set(table["nbytes"]) == set(table["seconds"])
    return report.read_text()


@pytest.mark.long
def test_save(tmp_path: Path) -> None:
    report = run_script("bench_save.py", tmp_path)
    for name in ("limit: ", "ckpt_fast ", "ckpt_fast DCP ", "mcore ", "DCP, 2 threads ", "torch.save "):
        assert f"\n  {name}" in report


@pytest.mark.long
def test_load(tmp_path: Path) -> None:
    """Loads are compared with what was saved, so passing means more than that the script ends."""
    report = run_script("bench_load.py", tmp_path)
    for title in ("warm load", "cold load", "along axis 0", "along axis 1"):
        assert title in report


@pytest.mark.long
def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_script("bench_save.py", tmp_path)
    run([str(BENCHMARKS.parent / "scripts" / "plot_benchmarks.py"), str(tmp_path)])
    picture = (tmp_path / "throughput.svg").read_text()
    assert "durable save" in picture and "ckpt_fast DCP" in picture


@pytest.mark.long
def test_stall(tmp_path: Path) -> None:
    report = run_script("bench_stall.py", tmp_path)
    for title in ("the trainer is blocked", "the next step takes", "from the call until durable"):
        assert title in report


@pytest.mark.long
def test_loop(tmp_path: Path) -> None:
    report = run_script("bench_loop.py", tmp_path, "--layers", "2")
    for title in ("training is held up", "later steps take longer", "from the call until durable"):
        assert title in report
    for name in ("limit: memcpy", "ckpt_fast ", "mcore async", "dcp.async_save"):
        assert f"\n  {name}" in report


@pytest.mark.long
def test_plan(tmp_path: Path) -> None:
    report = run_script("bench_plan.py", tmp_path)
    assert report.count("MB of .metadata") == 4


@pytest.mark.long
@pytest.mark.parametrize("implementation", ["1", "0"], ids=["engine", "fallback"])
def test_parts(implementation: str) -> None:
    run(
        ["-m", "pytest", "-p", "no:cacheprovider", "--benchmark-disable", str(BENCHMARKS / "bench_parts.py")],
        CKPT_FAST_NATIVE=implementation,
        CKPT_FAST_BENCH_TENSORS="20",
        CKPT_FAST_BENCH_MB="1",
    )


@pytest.mark.long
def test_objects(tmp_path: Path) -> None:
    report = run_script("bench_objects.py", tmp_path)
    for name in (
        "save to",
        "load from",
        "  limit: upload ",
        "  ckpt_fast ",
        "  mcore ",
        "  DCP msc, 1 thread ",
    ):
        assert name in report


@pytest.mark.long
def test_glu(tmp_path: Path) -> None:
    report = run_script("bench_glu.py", tmp_path)
    for title in ("8B, dense, into new memory", "64 experts, into used memory", "durable save", "warm load"):
        assert title in report


def test_all_benchmarks_are_tested() -> None:
    tested = Path(__file__).read_text()
    for script in BENCHMARKS.glob("bench_*.py"):
        assert f'"{script.name}"' in tested
