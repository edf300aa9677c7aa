# SPDX-License-Identifier: Apache-2.0
"""``docs/configuration.md`` explains every field, with its default, and its script trains."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import checkpointing
from ckpt_fast.checkpointing import CheckpointConfig, ConfigContainer, GlobalState, TrainState
from ckpt_fast.run.config_checks import UNUSED
from tests import models
from tests.helpers import run_ranks
from tests.repository.documents.pages import ROOT, blocks

PAGE = ROOT / "docs" / "configuration.md"
ROW = re.compile(r"^\| `(\w+)` \| `([^`]*)` \| (.*) \|$", re.M)
NO_EFFECT = "Accepted, no effect: "


def fields_in_page() -> dict[str, tuple[str, str]]:
    """Map each field of CheckpointConfig to its (default, effect) in the page."""
    return {name: (default, effect) for name, default, effect in ROW.findall(PAGE.read_text())}


def test_every_field_is_explained_once() -> None:
    rows = [name for name, _, _ in ROW.findall(PAGE.read_text())]
    assert sorted(rows) == sorted(field.name for field in dataclasses.fields(CheckpointConfig))


@pytest.mark.parametrize("field", dataclasses.fields(CheckpointConfig), ids=lambda field: field.name)
def test_a_field(field: dataclasses.Field[Any]) -> None:
    default, effect = fields_in_page()[field.name]
    assert default.replace('"', "'") == repr(field.default)
    assert len(effect) > 10
    if field.name in UNUSED:
        assert effect.endswith(f"{NO_EFFECT}{UNUSED[field.name]}.")
    else:
        assert NO_EFFECT not in effect


def test_the_other_classes() -> None:
    page = PAGE.read_text()
    for name in re.findall(r"^\| `([a-z_`, ]+)` \| [^`]", page, re.M):
        owners = (GlobalState(), ConfigContainer(), TrainState())
        for each in name.split("`, `"):
            assert any(hasattr(owner, each) for owner in owners), each
    for counter in vars(TrainState()):
        assert f"`{counter}`" in page


def test_all_classes_come_from_the_documented_module() -> None:
    for name in re.findall(r"`([A-Z][A-Za-z]+(?:Config|Container|State))`", PAGE.read_text()):
        assert name in checkpointing.__all__, name


def train_as_documented(rank: int, code: str, directory: str, in_background: bool) -> list[Any]:
    """Train 3 steps, saving every 2; then resume and train up to 5. Return the steps made each time."""
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    made: list[Any] = []
    for last_step in (3, 5):
        with models.Run(models.Setup()) as run:
            steps: list[int] = []

            def train_step(run: models.Run = run, steps: list[int] = steps) -> int:
                run.train()
                steps.append(run.state.train_state.step)
                return models.BATCH

            names["train"](
                run.model,
                run.optimizer,
                run.scheduler,
                {
                    "transformer": run.model[0].config,
                    "optimizer": run.state.cfg.optimizer,
                    "ddp": run.model[0].ddp_config,
                },
                train_step,
                CheckpointConfig(
                    save=directory, load=directory, save_interval=2, async_save=in_background, most_recent_k=1
                ),
                last_step,
            )
            made.append(len(steps))
    tracker = torch.load(Path(directory) / "latest_train_state.pt", weights_only=True)
    deadline = time.monotonic() + 60
    while (Path(directory) / "iter_0000002").exists() and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread removes it
    iterations = sorted(path.name for path in Path(directory).glob("iter_*"))
    return [*made, int(tracker["step"]), int(tracker["consumed_train_samples"]), iterations]


@pytest.mark.parametrize("in_background", [False, True])
def test_the_script_trains_and_resumes(tmp_path: Path, in_background: bool) -> None:
    (code,) = blocks(PAGE, "python")
    (result,) = run_ranks(train_as_documented, 1, code, str(tmp_path), in_background)
    # The second run begins after the step that was saved last.
    assert result == [3, 3, 4, 4 * models.BATCH, ["iter_0000004"]]
