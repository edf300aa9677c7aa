# SPDX-License-Identifier: Apache-2.0
"""What W&B, MLflow, Comet, the progress log and fault tolerance are told.

The services need accounts and a network, so stubs record the calls; MLflow and W&B each have one offline
test."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import pytest

from ckpt_fast.config import ConfigContainer, LoggerConfig
from ckpt_fast.state import FaultToleranceState, GlobalState
from ckpt_fast.trainer.experiment_loggers import (
    append_to_progress_log,
    on_checkpoint_loaded,
    on_checkpointing_end,
    on_checkpointing_start,
    on_load_checkpoint_success,
    on_save_checkpoint_success,
)
from tests.helpers import run_ranks


class Recorder:
    """Accepts any method call; records calls by name."""

    def __init__(self, fail=False):
        self.calls, self._fail = [], fail

    def __getattr__(self, name):
        def call(*args, **options):
            self.calls.append((name, args, options))
            if self._fail:
                raise ConnectionError("no network")

        return call


class Wandb(Recorder):
    def __init__(self, fail=False):
        super().__init__(fail)
        self.run = Recorder(fail)
        self.run.entity, self.run.project = "team", "project"
        self.artifact = Recorder()

    def Artifact(self, *args, **options):  # noqa: N802
        self.calls.append(("Artifact", args, options))
        return self.artifact


def state(wandb=None, mlflow=None, comet=None, **cfg):
    return SimpleNamespace(
        cfg=ConfigContainer(**cfg), wandb_logger=wandb, mlflow_logger=mlflow, comet_logger=comet
    )


@pytest.fixture
def paths(tmp_path):
    root = tmp_path / "runs" / "llama"
    checkpoint = root / "iter_0000007"
    checkpoint.mkdir(parents=True)
    return str(checkpoint), str(root)


def test_wandb_learns_of_a_save_and_of_the_load(paths):
    wandb = Wandb()
    on_save_checkpoint_success(state(wandb), *paths, 7)
    assert wandb.calls == [("Artifact", ("llama",), {"type": "model", "metadata": {"iteration": 7}})]
    assert wandb.artifact.calls == [("add_reference", (f"file://{paths[0]}",), {"checksum": False})]
    assert wandb.run.calls == [("log_artifact", (wandb.artifact,), {"aliases": ["iter_0000007"]})]
    with open(os.path.join(paths[1], "latest_wandb_artifact_path.txt")) as file:
        assert file.read() == "team/project"
    wandb.run.calls.clear()
    on_load_checkpoint_success(state(wandb), *paths)
    assert wandb.run.calls == [("use_artifact", ("team/project/llama:iter_0000007",), {})]


def test_wandb_without_its_tracker(paths):
    wandb = Wandb()
    on_load_checkpoint_success(state(wandb), *paths)
    assert wandb.run.calls == [("use_artifact", ("llama:iter_0000007",), {})]


def test_mlflow(paths):
    mlflow = Recorder()
    on_save_checkpoint_success(state(mlflow=mlflow), *paths, 7)
    assert mlflow.calls == [("log_artifacts", (paths[0],), {"artifact_path": "llama/iter_0000007"})]
    mlflow.calls.clear()
    on_load_checkpoint_success(state(mlflow=mlflow), *paths)
    assert mlflow.calls[0][1][0] == {"last_loaded_checkpoint": paths[0], "last_loaded_root": paths[1]}


def test_mlflow_may_be_told_not_to_upload(paths):
    mlflow = Recorder()
    on_save_checkpoint_success(state(mlflow=mlflow), *paths, 7, to_mlflow=False)
    assert mlflow.calls == []


def test_comet(paths):
    comet = Recorder()
    on_save_checkpoint_success(state(comet=comet), *paths, 7)
    logged = {args[0]: args[1] for _, args, _ in comet.calls}
    assert logged == {"last_saved_checkpoint": paths[0], "last_saved_iteration": 7}


def test_the_real_mlflow_stores_the_checkpoint(paths, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    Path(paths[0], "train_state.pt").write_bytes(b"state")
    run = GlobalState()
    store = (tmp_path / "store").as_uri()
    run.cfg = ConfigContainer(logger=LoggerConfig(mlflow_experiment="e", mlflow_tracking_uri=store))
    try:
        on_save_checkpoint_success(run, *paths, 7)
        on_load_checkpoint_success(run, *paths)
        uri = mlflow.get_artifact_uri("llama/iter_0000007/train_state.pt")
        tags = mlflow.get_run(mlflow.active_run().info.run_id).data.tags
    finally:
        mlflow.end_run()
    assert Path(urlparse(uri).path).read_bytes() == b"state"
    assert tags["last_loaded_checkpoint"] == paths[0]


def test_the_real_wandb_logs_the_checkpoint_as_an_artifact(paths, tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = GlobalState()
    logger = LoggerConfig(wandb_project="p", wandb_exp_name="e", wandb_save_dir=str(tmp_path / "wandb"))
    run.cfg = ConfigContainer(logger=logger)
    try:
        on_save_checkpoint_success(run, *paths, 7)
    finally:
        wandb.finish()
    assert "failed to tell" not in caplog.text
    with open(os.path.join(paths[1], "latest_wandb_artifact_path.txt")) as file:
        assert file.read().endswith("/p")
    (log,) = (tmp_path / "wandb").rglob("*.wandb")
    assert b"iter_0000007" in log.read_bytes()


def test_relative_paths_are_made_absolute(paths, monkeypatch):
    monkeypatch.chdir(os.path.dirname(paths[1]))
    wandb, mlflow = Wandb(), Recorder()
    on_save_checkpoint_success(state(wandb, mlflow), "llama/iter_0000007", "llama/", 7)
    assert wandb.artifact.calls[0][1] == (f"file://{paths[0]}",)
    assert mlflow.calls == [("log_artifacts", (paths[0],), {"artifact_path": "llama/iter_0000007"})]


def test_one_failing_service_does_not_affect_the_others(paths, caplog):
    wandb, mlflow, comet = Wandb(fail=True), Recorder(fail=True), Recorder()
    on_save_checkpoint_success(state(wandb, mlflow, comet), *paths, 7)
    on_load_checkpoint_success(state(wandb, mlflow, comet), *paths)
    assert len(comet.calls) == 4
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 4
    assert all("no network" in line for line in lines)


def test_nothing_is_configured(paths, caplog):
    on_save_checkpoint_success(state(), *paths, 7)
    on_load_checkpoint_success(state(), *paths)
    assert os.listdir(paths[1]) == ["iter_0000007"]
    assert caplog.messages == []


# --- Progress log ----------------------------------------------------------------------------------------


def test_progress_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    root = str(tmp_path / "new")
    append_to_progress_log(root, "Saved async checkpoint\tIteration: 7")
    append_to_progress_log(root, "Saved async checkpoint\tIteration: 8", barrier=False)
    first, second = (tmp_path / "new" / "progress.txt").read_text().splitlines()
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\tJob ID: 17\t# GPUs: 1\tSaved async checkpoint\tIteration: 7"
    assert re.fullmatch(line, first)
    assert second.endswith("Iteration: 8")


def test_no_directory_no_line():
    append_to_progress_log(None, "x")


def test_a_full_disk_does_not_stop_training(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "file").write_text("")
    append_to_progress_log(str(tmp_path / "file"), "x")
    assert "progress.txt" in caplog.text


def log_from_all(rank, root):
    append_to_progress_log(root, "x")


def test_rank_0_alone_writes(tmp_path):
    run_ranks(log_from_all, 2, str(tmp_path))
    (line,) = (tmp_path / "progress.txt").read_text().splitlines()
    assert "# GPUs: 2" in line


# --- Fault tolerance -------------------------------------------------------------------------------------


class Monitor:
    """The interface of nvidia-resiliency-ext's RankMonitorClient; the real one needs its launcher."""

    def __init__(self, fail=False):
        self.sections, self.updated, self.fail = [], [], fail

    def start_section(self, name):
        if self.fail:
            raise ConnectionError("launcher is gone")
        self.sections.append(f"+{name}")

    def end_section(self, name):
        self.sections.append(f"-{name}")

    def calculate_and_set_section_timeouts(
        self, *, selected_sections, calc_out_of_section, skip_if_not_ready
    ):
        self.updated.append(selected_sections)
        assert skip_if_not_ready and not calc_out_of_section
        return True

    def state_dict(self):
        return {"timeouts": self.updated[-1]}


def watched(monitor, ft=True, **seen):
    return SimpleNamespace(
        cfg=ConfigContainer(ft=object() if ft else None),
        rank_monitor_client=monitor,
        fault_tolerance_state=FaultToleranceState(**seen),
    )


def test_the_monitor_has_the_methods_that_are_called():
    client = pytest.importorskip("nvidia_resiliency_ext.fault_tolerance.rank_monitor_client")
    for name in ("start_section", "end_section", "calculate_and_set_section_timeouts", "state_dict"):
        assert callable(getattr(client.RankMonitorClient, name))


def test_sections_and_the_count_of_saves():
    run = watched(Monitor())
    on_checkpointing_start(run)
    on_checkpointing_end(global_state=run, is_async_finalization=False)
    on_checkpointing_start(run)
    on_checkpointing_end(global_state=run, is_async_finalization=True)
    assert run.rank_monitor_client.sections == ["+checkpointing", "-checkpointing"] * 2
    assert run.fault_tolerance_state.seen_checkpoints_cnt == 1
    assert run.rank_monitor_client.updated == []


@pytest.mark.parametrize("run", [watched(Monitor(), ft=False), watched(None)])
def test_unwatched_runs(run):
    on_checkpointing_start(run)
    on_checkpointing_end(global_state=run, is_async_finalization=False)
    on_checkpoint_loaded(is_local_chkpt=False, global_state=run)
    assert run.fault_tolerance_state == FaultToleranceState()


@pytest.mark.parametrize(
    ("seen", "sections"),
    [
        ({}, ["checkpointing"]),
        ({"seen_tr_iters_cnt": 16}, ["step", "checkpointing"]),
        ({"is_persistent_chkpt_loaded": True, "seen_tr_iters_cnt": 15}, ["setup", "checkpointing"]),
        ({"is_async_chkpt_enabled": True, "seen_tr_iters_cnt": 20}, ["step"]),
    ],
)
def test_timeouts_come_from_what_was_seen(seen, sections, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "ft_state.json"
    run = watched(Monitor(), is_calculating_timeouts=True, ft_state_path=str(path), **seen)
    on_checkpointing_end(global_state=run, is_async_finalization=False)
    assert run.rank_monitor_client.updated == [sections]
    assert json.loads(path.read_text()) == {"timeouts": sections}


def test_nothing_seen_nothing_derived():
    run = watched(Monitor(), is_calculating_timeouts=True, is_async_chkpt_enabled=True)
    on_checkpointing_end(global_state=run, is_async_finalization=False)
    assert run.rank_monitor_client.updated == []


@pytest.mark.parametrize("local", [True, False])
def test_the_kind_of_load_is_noted(local):
    run = watched(Monitor())
    on_checkpoint_loaded(is_local_chkpt=local, global_state=run)
    assert run.fault_tolerance_state.is_persistent_chkpt_loaded is not local


def test_a_dead_launcher_does_not_stop_the_save(caplog):
    on_checkpointing_start(watched(Monitor(fail=True)))
    assert "launcher is gone" in caplog.text
