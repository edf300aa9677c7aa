# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs, at a size too small to measure anything, so that none can rot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL_COUNTS = ["--counts", "40", "80"]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--gigabytes", "0.002", "--rounds", "1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


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


def run_script(
    script: str, path: Path, *arguments: str, ranks: int = 1, name: str = "report", is_quiet: bool = False
) -> str:
    """Return the report of one script, which must leave nothing else behind, nor print more if quiet."""
    report, work = path / f"{name}.txt", path / "work"
    where = ["--path", str(work), "--output", str(report)]
    launcher = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks > 1 else []
    output = run([*launcher, str(BENCHMARKS / script), *TINY, *where, *arguments], OMP_NUM_THREADS="1")
    assert list(work.iterdir()) == []
    assert report.read_text() in output
    assert str(work) not in report.read_text(), "a report that is published names no folder of its machine"
    if is_quiet:
        assert output.strip() == report.read_text().strip()
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
    run_script("bench_growth.py", tmp_path, *SMALL_COUNTS, name="growth")
    run([str(BENCHMARKS / "plot.py"), str(tmp_path)])
    picture = (tmp_path / "throughput.svg").read_text()
    assert "durable save" in picture and "ckpt_fast DCP" in picture
    picture = (tmp_path / "growth.svg").read_text()
    assert "save_checkpoint: " in picture and "µs per tensor" in picture


@pytest.mark.long
def test_stall(tmp_path: Path) -> None:
    report = run_script("bench_stall.py", tmp_path)
    for title in ("the trainer is blocked", "the next step takes", "from the call until durable"):
        assert title in report


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_loop(tmp_path: Path, ranks: int) -> None:
    """Every contestant takes part, or is named with the reason; each has left a checkpoint."""
    report = run_script(
        "bench_loop.py", tmp_path, "--layers", "2", "--saves", "1", ranks=ranks, is_quiet=True
    )
    assert f"GPT of 2 layers of 64, bf16 with Adam: 100 tensors, 2 MB, {ranks} rank" in report
    for column in ("held up, ms", "later, ms", "durable, ms"):
        assert column in report
    for name in ("limit: no save", "limit: memcpy", "ckpt_fast ", "mcore async", "dcp.async_save"):
        assert f"\n  {name}" in report
    for name in ("mcore async, persistent writer", "nvrx async, temporary writer"):
        assert f"\n  {name}" in report or f"\nnot measured: {name} (" in report


@pytest.mark.long
def test_loop_shows_what_was_printed_before_it_failed(tmp_path: Path) -> None:
    command = [str(BENCHMARKS / "bench_loop.py"), "--layers", "2", "--hidden-size", "7"]
    result = subprocess.run(
        [sys.executable, *command, "--path", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "hidden_size" in result.stderr or "num_attention_heads" in result.stderr


@pytest.mark.long
def test_growth(tmp_path: Path) -> None:
    report = run_script("bench_growth.py", tmp_path, *SMALL_COUNTS, is_quiet=True)
    for name in ("ckpt_fast.async_save", "save_checkpoint"):
        assert f"{name}, ms" in report and f"{name}: " in report
    assert report.count("us per tensor") == 2


@pytest.mark.long
def test_plan(tmp_path: Path) -> None:
    report = run_script("bench_plan.py", tmp_path)
    assert report.count("MB of .metadata") == 6


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
