# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast doctor``, ``top`` and ``bench``, and what all commands have in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import ckpt_fast
from ckpt_fast import native
from ckpt_fast.cli import _COMMANDS, main
from ckpt_fast.tools import doctor
from ckpt_fast.tools.saves import read_saves
from ckpt_fast.version import RELEASE
from tests.cli.running import in_pipe, on_terminal

# --- doctor ------------------------------------------------------------------------------------------------


def facts(*arguments: str | Path) -> dict[str, dict[str, str]]:
    return {each["name"]: each for each in in_pipe("doctor", *arguments, "--json").value}


def test_doctor_looks_at_everything(tmp_path: Path) -> None:
    found = facts(tmp_path)
    assert found["torch"]["value"] == torch.__version__
    assert found["Megatron-Core"]["value"] == metadata.version("megatron-core")
    wanted = {"nvcc", "CUDA", "nvidia-resiliency-ext", "Megatron Bridge", "engine", "CPU features"}
    wanted |= {"huge pages", "open files", "memory of the cgroup", "file system", "O_DIRECT", "free space"}
    assert wanted <= set(found)
    assert os.listdir(tmp_path) == [], "nothing is left there"
    assert "engine:" in in_pipe("doctor").out
    assert "O_DIRECT" in on_terminal("doctor", tmp_path).text


def test_doctor_says_what_is_slow_and_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NATIVE", "DIRECT", "FSYNC", "VERIFY"):
        monkeypatch.setenv(f"CKPT_FAST_{name}", "0")
    found = facts()
    assert found["engine"]["level"] == "slow" and "CKPT_FAST_NATIVE" in found["engine"]["remedy"]
    assert found["engine"]["value"] == "ckpt_fast.native.fallback"
    assert found["direct I/O"]["level"] == "slow"
    assert found["fsync"]["level"] == found["checksums"]["level"] == "note"
    assert in_pipe("doctor").status == 0
    assert "[slow]" in in_pipe("doctor").out


def test_doctor_of_a_place_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_pipe("doctor", tmp_path / "nowhere").status == 1

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.tempfile, "TemporaryDirectory", fail)
    ran = in_pipe("doctor", tmp_path)
    assert ran.status == 1 and "No space left on device" in ran.out


@pytest.mark.parametrize(("limit", "level"), [("max", "ok"), (str(8 << 30), "note")])
def test_doctor_reads_the_limit_of_the_cgroup(
    limit: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": str(2 << 30)}
    monkeypatch.setattr(doctor, "_read", files.get)
    found = facts()["memory of the cgroup"]
    assert found["level"] == level
    assert level == "ok" or "6.44 GB not used" in found["value"]


# --- top ---------------------------------------------------------------------------------------------------


def test_top_shows_what_saves_have_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "saves.jsonl"
    monkeypatch.setenv("CKPT_FAST_METRICS", str(log))
    reports = [
        ckpt_fast.save({"w": torch.ones(1000 * step)}, tmp_path / f"step_{step}", no_dist=True)
        for step in (1, 2, 1)
    ]
    saves = in_pipe("top", log, "--json").value["saves"]
    assert [each["nbytes"] for each in saves] == [report.nbytes for report in reports]
    assert [each["held_up_s"] for each in saves] == [report.stall_s for report in reports]
    assert [os.path.basename(each["directory"]) for each in saves] == ["step_1", "step_2", "step_1"]
    assert len(in_pipe("top", log, "--last", 1).out.splitlines()) == 4
    assert "3 saves, 0 failed" in on_terminal("top", log).text


def line(directory: str, rank: int, held_up: float, error: str | None = None) -> str:
    record = {"time": 1e9, "rank": rank, "directory": directory, "nbytes": 10, "stall_s": held_up}
    return json.dumps({**record, "written_s": 2.0 + rank, "seconds": 3.0, "error": error}) + "\n"


def test_top_puts_the_ranks_of_a_save_together(tmp_path: Path) -> None:
    log = tmp_path / "saves.jsonl"
    lines = [line("a", 0, 0.1), line("b", 1, 0.2), line("a", 1, 0.3), line("b", 0, 0.1), line("a", 0, 0.5)]
    log.write_text("".join(lines) + line("c", 0, 0.1, "no room") + '{"rank": 0}\nrubbish\n{"time": 1')
    found = read_saves(log)
    assert [(each.directory, each.ranks, each.held_up_s) for each in found.saves] == [
        ("a", {0, 1}, 0.3),
        ("b", {0, 1}, 0.2),
        ("a", {0}, 0.5),
        ("c", {0}, 0.1),
    ]
    assert (found.saves[0].nbytes, found.saves[0].durable_s) == (20, 3.0)
    assert found.unreadable == 3
    ran = in_pipe("top", log)
    assert "failed: no room" in ran.out and "4 saves, 1 failed" in ran.out and "3 lines" in ran.out


def test_top_of_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        ran = in_pipe("top", path)
        assert ran.status == 2 and "CKPT_FAST_METRICS" in ran.err


# --- bench -------------------------------------------------------------------------------------------------


def test_bench_measures_all_and_leaves_nothing(tmp_path: Path) -> None:
    found = in_pipe("bench", tmp_path, "--size", 4, "--rounds", 2, "--json").value
    assert [(each["task"], each["contestant"]) for each in found] == [
        (task, name) for task in ("save", "load") for name in ("limit", "ckpt_fast", "torch DCP")
    ]
    assert all(len(each["seconds"]) == 2 and each["nbytes"] == 4 << 20 for each in found)
    assert os.listdir(tmp_path) == []
    assert "of the limit" in on_terminal("bench", tmp_path, "--size", 1, "--rounds", 1).text
    assert in_pipe("bench", tmp_path / "nowhere").status == 2
    assert in_pipe("bench", tmp_path, "--size", 1 << 40).status == 2, "there is no room"


# --- All commands ------------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    ran = in_pipe("--help")
    assert ran.status == 0
    for name in _COMMANDS:
        assert f"\n  {name} " in ran.out
        shown = in_pipe(name, "--help")
        assert shown.status == 0 and ("--json" in shown.out) == (name != "run")


def test_wrong_use() -> None:
    for arguments in (["frobnicate"], ["diff", "one"], ["inspect"], ["ls", "--frobnicate", "x"]):
        ran = in_pipe(*arguments)
        assert ran.status == 2 and "Error:" in ran.err


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The help needs no torch; whoever closes the pipe early causes no traceback."""
    code = "import sys; from ckpt_fast.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "ckpt_fast.cli", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("release", [None, (13, 0)])
def test_version_tells_what_is_built_and_installed(
    release: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "cuda_release", lambda: release)
    assert main(["--version"]) == 0
    local, cuda = ("", "not built") if release is None else ("+cu130", "built with CUDA 13.0")
    assert ckpt_fast.__version__ == RELEASE + local
    assert capsys.readouterr().out.splitlines() == [
        f"ckpt-fast {RELEASE}{local}",
        f"native engine: {'built' if find_spec('ckpt_fast.native._engine') else 'not built'}",
        f"CUDA module: {cuda}",
        f"torch: {metadata.version('torch')}",
        f"megatron-core: {metadata.version('megatron-core')}",
    ]


def test_the_cuda_release_is_that_of_the_module() -> None:
    module = pytest.importorskip("ckpt_fast.native._cuda")
    assert native.cuda_release() == divmod(module.cuda_version // 10, 100)


def test_version_without_megatron_core(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert main(["--version"]) == 0
    assert "megatron-core: not installed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ours", "stock"])
def test_verify_is_there(name: str, dcp_checkpoints: dict[str, Path]) -> None:
    assert in_pipe("verify", "--deep", dcp_checkpoints[name]).status == 0
    assert on_terminal("verify", dcp_checkpoints[name]).status == 0
