# SPDX-License-Identifier: Apache-2.0
"""How each Python snippet of the documentation is run, and what it has to have done. Run on the ranks."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import serialization
from megatron.core.msc_utils import MultiStorageClientFeature

import ckpt_fast
from ckpt_fast import compat
from ckpt_fast.checkpointing import create_checkpoint_manager
from ckpt_fast.config import CheckpointConfig
from tests import models
from tests.trainer.contents.test_sidecars import Loader

Runner = Callable[[int, str, str], None]


def execute(code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a snippet with the names that the text around it says are there; return all names."""
    names = {} if names is None else names
    exec(compile(code, "snippet", "exec"), names)
    return names


def run_snippet(code: str, names: dict[str, Any], forget: Callable[[], object]) -> None:
    """Execute the statements of a snippet; ``forget`` is called before the last one."""
    *first, last = ast.parse(code).body
    exec(compile(ast.Module(first, []), "snippet", "exec"), names)
    forget()
    exec(compile(ast.Module([last], []), "snippet", "exec"), names)


def documented_api(rank: int, code: str, directory: str) -> None:
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


def data_position(rank: int, code: str, directory: str) -> None:
    """The snippet saves the position of a data loader; run again, it restores it."""
    with models.Run(models.Setup(), save=directory, load=directory) as run:
        run.train()
        parts = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler}
        execute(
            code, {"state": run.state, **parts, "train_iterator": types.SimpleNamespace(iterable=Loader(5))}
        )
        again = types.SimpleNamespace(iterable=Loader(0))
        execute(code, {"state": run.state, **parts, "train_iterator": again})
        assert again.iterable.position == 5


def megatron_core(rank: int, code: str, directory: str) -> None:
    """The snippet saves the weights and restores them after they were lost."""
    with models.Run(models.Setup()) as run, models.megatron_on_cpu():
        chunk = compat.unwrap_model(run.model)[0]
        weights = {name: value.detach().clone() for name, value in chunk.named_parameters()}

        def forget() -> None:
            for parameter in chunk.parameters():
                parameter.data.zero_()

        os.makedirs(directory, exist_ok=True)
        names: dict[str, Any] = {"model": chunk, "directory": directory}
        run_snippet(code, names, forget)
        chunk.load_state_dict(names["state_dict"])
        assert models.identical(weights, dict(chunk.named_parameters()))


def torch_dcp(rank: int, code: str, directory: str) -> None:
    """The snippet saves a tensor and restores it after it was lost."""
    weight = torch.arange(12.0).view(3, 4)
    names = {"state_dict": {"weight": weight, "step": 7}, "directory": directory}
    run_snippet(code, names, forget=weight.zero_)
    assert torch.equal(weight, torch.arange(12.0).view(3, 4))


def manager(rank: int, code: str, directory: str) -> None:
    """The snippet trains until it is told to stop, saves then, and goes on when it is run again."""
    state = {"weight": torch.zeros(3)}

    def train(step: int) -> None:
        state["weight"] += 1
        if step % 3 == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    names: dict[str, Any] = {"state_dict": state, "directory": directory, "steps": 100, "train": train}
    for expected in (3, 6):
        execute(code, names)
        assert names["step"] == expected and state["weight"].tolist() == [expected] * 3
        state["weight"].zero_()
    assert names["manager"].latest() == 6


def install(rank: int, code: str, directory: str) -> None:
    """The snippet makes our strategy the one that Megatron-Core builds by default."""
    try:
        execute(code)
        strategy = serialization.get_default_save_sharded_strategy()
    finally:
        ckpt_fast.uninstall()
    assert isinstance(strategy, ckpt_fast.FastSaveStrategy)


def installed_for_a_while(rank: int, code: str, directory: str) -> None:
    """The snippet prints what is changed, and undoes it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        execute(code)
    assert "FileSystemWriter" in printed.getvalue()
    assert ckpt_fast.uninstall() == ()


def bridge(rank: int, code: str, directory: str) -> None:
    """The snippet's last line names our manager; the rest needs Bridge (tests/interop)."""
    names = {"config": types.SimpleNamespace(checkpoint=CheckpointConfig())}
    exec(compile(ast.Module([ast.parse(code).body[-1]], []), "snippet", "exec"), names)
    made = create_checkpoint_manager(names["config"].checkpoint)
    assert isinstance(made, ckpt_fast.FastCheckpointManager)


def listener(rank: int, code: str, directory: str) -> None:
    """The snippet's listener prints a line for each save, until it is removed."""
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        execute(code, names)
        dcp.save({"weight": torch.ones(3)}, storage_writer=ckpt_fast.FastStorageWriter(directory))
        names["leave"]()
        dcp.save({"weight": torch.ones(3)}, storage_writer=ckpt_fast.FastStorageWriter(directory))
    assert re.fullmatch(rf"{re.escape(directory)} [\d.]+ [\d.]+\n", printed.getvalue())


def configuration(rank: int, code: str, directory: str) -> None:
    """The snippet makes a configuration that is accepted."""
    execute(code)["checkpoint"].finalize()


def object_storage(rank: int, code: str, directory: str) -> None:
    """The snippet enables object storage, and names it."""
    configuration(rank, code, directory)
    assert MultiStorageClientFeature.is_enabled()


def complete(rank: int, code: str, directory: str) -> None:
    """The snippet needs nothing, and shows nothing."""
    execute(code)


def storage(rank: int, code: str, directory: str) -> None:
    """The snippet loads from its storage what it has saved there."""
    names = execute(code)
    assert torch.equal(names["loaded"], names["weight"])
    assert {".metadata", "__0_0.distcp"} <= names["shelf"].files.keys()


def door(rank: int, code: str, directory: str) -> None:
    """Each rank gets its tensor back, from files that torch reads."""
    names = execute(code, {"directory": directory})
    assert torch.equal(names["mine"][f"weight.{rank}"], torch.full((3, 4), float(rank)))
    other = {f"weight.{1 - rank}": torch.zeros(3, 4)}
    dcp.load(other, storage_reader=dcp.FileSystemReader(directory))
    assert torch.equal(other[f"weight.{1 - rank}"], torch.full((3, 4), float(1 - rank)))


# By page: a string that is in this snippet and in no other of the page, and how it is run.
SNIPPETS: dict[str, dict[str, Runner]] = {
    "README.md": {
        "ckpt_fast.checkpointing": documented_api,
        "FastSaveStrategy": megatron_core,
        "ckpt_fast.save(": torch_dcp,
        "FastStorageWriter": torch_dcp,
        "ckpt_fast.install()": install,
        "CheckpointManager(": manager,
        "FastCheckpointManager": bridge,
    },
    "docs/guide.md": {
        "on_save_in_progress": configuration,
        "reserve_host_memory": complete,
        "add_listener": listener,
        "resume_dataloader": data_position,
        "non_persistent_ckpt_type": configuration,
        "MultiStorageClientFeature": object_storage,
    },
    "docs/extending.md": {"class Shelf": storage, "def save_mine": door},
    "docs/frameworks.md": {
        "with ckpt_fast.install()": installed_for_a_while,
        "\nckpt_fast.install()": install,
    },
    "docs/retention.md": {"KeepBest": configuration},
    "docs/troubleshooting.md": {"logging.basicConfig": complete},
}
# Programs that other tests run.
ELSEWHERE = {"docs/configuration.md": "../test_configuration.py", "docs/quickstart.md": "test_quickstart.py"}
# Those that change their process.
IN_NEW_PROCESSES = {object_storage, complete}
ON_TWO_RANKS = {door}
