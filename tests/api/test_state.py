# SPDX-License-Identifier: Apache-2.0
"""TrainState, FaultToleranceState and GlobalState."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from ckpt_fast.config import CheckpointConfig, ConfigContainer, LoggerConfig
from ckpt_fast.run.signal_handler import DistributedSignalHandler
from ckpt_fast.state import FaultToleranceState, GlobalState, TrainState
from tests.helpers import run_ranks

FULL = TrainState(
    step=1000,
    consumed_train_samples=2**40,
    skipped_train_samples=3,
    consumed_valid_samples=4,
    floating_point_operations_so_far=123_456_789_012_345.0,
    do_train=True,
    do_test=True,
)


# --- TrainState ------------------------------------------------------------------------------------------


def test_train_state_survives_a_safe_load():
    buffer = io.BytesIO()
    torch.save(FULL.state_dict(), buffer)
    buffer.seek(0)
    back = TrainState()
    back.load_state_dict(torch.load(buffer, weights_only=True))
    assert back == FULL


def test_train_state_types():
    dtypes = {name: tensor.dtype for name, tensor in FULL.state_dict().items()}
    counters = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    flags = ("do_train", "do_valid", "do_test")
    assert dtypes == {
        **dict.fromkeys(counters, torch.int64),
        "floating_point_operations_so_far": torch.float64,
        **dict.fromkeys(flags, torch.bool),
    }
    assert all(tensor.ndim == 0 for tensor in FULL.state_dict().values())


def test_train_state_is_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert FULL.state_dict()["step"].item() == 1000


def test_large_operation_counts_keep_their_digits():
    state = TrainState(floating_point_operations_so_far=10**25 + 10**10)
    assert state.state_dict()["floating_point_operations_so_far"].item() == float(10**25 + 10**10)


def test_older_files_with_narrow_types():
    narrow = {
        name: tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor
        for name, tensor in TrainState(step=5, floating_point_operations_so_far=8.0).state_dict().items()
    }
    narrow["step"] = narrow["step"].to(torch.int32)
    back = TrainState()
    back.load_state_dict(narrow)
    assert back == TrainState(step=5, floating_point_operations_so_far=8.0)
    assert type(back.step) is int


def test_an_incomplete_state_dict_changes_nothing():
    incomplete = FULL.state_dict()
    del incomplete["do_test"]
    state = TrainState(step=1)
    with pytest.raises(KeyError, match="do_test"):
        state.load_state_dict(incomplete)
    assert state == TrainState(step=1)


def test_fault_tolerance_defaults():
    assert FaultToleranceState() == FaultToleranceState(None, False, False, False, False, 0, 0, 0)


# --- GlobalState -----------------------------------------------------------------------------------------


def test_second_init_changes_nothing():
    state = GlobalState()
    state.train_state.step = 7
    started = state.start_time
    state.__init__()
    assert (state.train_state.step, state.start_time) == (7, started)


def test_lazy_parts_are_made_once_and_can_be_set():
    state = GlobalState()
    assert state.train_state is state.train_state
    assert state.fault_tolerance_state is state.fault_tolerance_state
    state.train_state = FULL
    state.fault_tolerance_state = FaultToleranceState(seen_checkpoints_cnt=2)
    assert state.train_state is FULL
    assert state.fault_tolerance_state.seen_checkpoints_cnt == 2


def test_nothing_is_made_without_a_configuration():
    state = GlobalState()
    assert state.cfg is None
    assert (state.wandb_logger, state.mlflow_logger, state.comet_logger) == (None, None, None)
    assert (state.tensorboard_logger, state.tokenizer, state.signal_handler) == (None, None, None)
    assert (state.async_calls_queue, state.energy_monitor, state.nvrx_straggler_manager) == (None, None, None)
    state.initialize_async_checkpoint_worker()
    assert state.async_calls_queue is None


def test_the_queue_is_read_only():
    with pytest.raises(AttributeError):
        GlobalState().async_calls_queue = object()


@pytest.mark.parametrize(
    ("checkpoint", "made"),
    [
        (CheckpointConfig(save="x", async_save=True), True),
        (CheckpointConfig(save="x"), False),
        (CheckpointConfig(async_save=True), False),
    ],
)
def test_the_queue_is_made_for_saves_in_the_background(checkpoint, made):
    state = GlobalState()
    state.cfg = ConfigContainer(checkpoint=checkpoint)
    state.initialize_async_checkpoint_worker()
    queue = state.async_calls_queue
    assert (queue is not None) == made
    state.initialize_async_checkpoint_worker()
    assert state.async_calls_queue is queue


def test_timers_work_on_this_machine():
    state = GlobalState()
    state.cfg = ConfigContainer(logger=LoggerConfig(timing_log_level=2))
    state.timers("save-checkpoint", log_level=0).start(barrier=False)
    state.timers("save-checkpoint").stop()
    assert state.timers is state.timers


def test_restart_forgets_the_run_and_keeps_the_rest():
    state = GlobalState()
    state.cfg = ConfigContainer(checkpoint=CheckpointConfig(save="x", async_save=True))
    state.initialize_async_checkpoint_worker()
    state.rank_monitor_client = object()
    kept = (state.cfg, state.async_calls_queue, state.rank_monitor_client, state.start_time)
    state.fault_tolerance_state.seen_checkpoints_cnt = 3
    state.train_state.step, state.tokenizer, timers = 9, "tokenizer", state.timers
    state.reset_for_restart()
    assert (state.cfg, state.async_calls_queue, state.rank_monitor_client, state.start_time) == kept
    assert state.fault_tolerance_state.seen_checkpoints_cnt == 3
    assert (state.train_state, state.tokenizer) == (TrainState(), None)
    assert state.timers is not timers


# --- Loggers ---------------------------------------------------------------------------------------------


class FakeRun:
    """Stands in for a tracking package that need not be installed."""

    def __init__(self, fail=False):
        self.fail, self.started = fail, []

    def init(self, **settings):
        self.started.append(settings)
        if self.fail:
            raise ConnectionError("no network")


@pytest.fixture
def wandb(monkeypatch):
    package = FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return package


def with_wandb(**checkpoint):
    state = GlobalState()
    logger = LoggerConfig(wandb_project="p", wandb_exp_name="e")
    state.cfg = ConfigContainer(logger=logger, checkpoint=CheckpointConfig(**checkpoint))
    return state


def test_wandb_is_started_once_in_the_checkpoint_directory(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", " key\n")
    state = with_wandb(save=str(tmp_path))
    assert state.wandb_logger is state.wandb_logger is wandb
    (settings,) = wandb.started
    assert (settings["project"], settings["name"]) == ("p", "e")
    assert settings["dir"] == str(tmp_path / "wandb")
    assert os.path.isdir(settings["dir"])
    assert settings["config"]["checkpoint"]["save"] == str(tmp_path)
    assert os.environ["WANDB_API_KEY"] == "key"


def test_wandb_without_a_checkpoint_directory(wandb):
    assert with_wandb().wandb_logger is wandb
    assert wandb.started[0]["dir"] is None


def test_a_logger_that_cannot_be_started_is_tried_once(wandb, caplog):
    wandb.fail = True
    state = with_wandb()
    assert state.wandb_logger is None
    assert state.wandb_logger is None
    assert len(wandb.started) == 1
    assert "no network" in caplog.text


def test_a_logger_whose_package_is_missing(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    state = GlobalState()
    state.cfg = ConfigContainer(logger=LoggerConfig(mlflow_experiment="x"))
    assert state.mlflow_logger is None
    assert "mlflow" in caplog.text


def test_other_ranks_have_no_loggers(wandb, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert with_wandb().wandb_logger is None
    assert wandb.started == []


def tensorboard_on_rank(rank, directory):
    state = GlobalState()
    state.cfg = ConfigContainer(logger=LoggerConfig(tensorboard_dir=directory))
    return state.tensorboard_logger is not None


def test_the_last_rank_logs(tmp_path):
    pytest.importorskip("tensorboard")
    assert run_ranks(tensorboard_on_rank, 2, str(tmp_path)) == [False, True]


# --- Exit signal -----------------------------------------------------------------------------------------


def test_the_configured_signal_is_noticed_and_released():
    before = signal.getsignal(signal.SIGUSR1)
    state = GlobalState()
    state.cfg = ConfigContainer(train=SimpleNamespace(exit_signal=signal.SIGUSR1))
    assert state.signal_handler.signals_received() == [False]
    os.kill(os.getpid(), signal.SIGUSR1)
    assert state.signal_handler.signals_received() == [True]
    state.reset_for_restart()
    assert state.signal_handler is None
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_new_configuration_replaces_the_handler():
    before = signal.getsignal(signal.SIGUSR1)
    state = GlobalState()
    state.cfg = ConfigContainer(train=SimpleNamespace(exit_signal=signal.SIGUSR1))
    state.cfg = ConfigContainer()
    assert state.signal_handler is None
    assert signal.getsignal(signal.SIGUSR1) is before


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGUSR1)
    handler = DistributedSignalHandler(signal.SIGUSR1)
    thread = threading.Thread(target=handler.__enter__)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is before
    assert handler.release() is False


def signal_rank_1(rank):
    with DistributedSignalHandler(signal.SIGUSR1) as handler:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return handler.signals_received()


def test_every_rank_learns_who_got_the_signal():
    # Pool ranks call functions in their main thread, so the handler can be installed there.
    assert run_ranks(signal_rank_1, 2) == [[False, True], [False, True]]
