# SPDX-License-Identifier: Apache-2.0
"""Parts of a checkpoint that nobody requests: counted, and reported if they are whole sections."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from ckpt_fast import FastStorageReader
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.pipeline.load.unasked import Unasked, sections_of
from tests.doors.dcp.states import blank, training_state
from tests.helpers import run_ranks
from tests.models import Run, Setup, other

SETUP = Setup(bf16=True, distributed=True, reshardable=True, layers=2)


@pytest.mark.parametrize(
    ("fqn", "path", "sections"),
    [
        ("step", None, []),
        ("step", ("step",), []),
        ("model.0.weight", ("model", "0.weight"), ["model"]),
        ("model.weight", ("model.weight",), []),
        (
            "optimizer.state.0.exp_avg",
            ("optimizer", "state", 0, "exp_avg"),
            ["optimizer", "optimizer.state", "all exp_avg of the optimizer"],
        ),
        (
            "optimizer.state.param.decoder.weight",
            None,
            ["optimizer", "all param of the optimizer"],
        ),
        ("decoder.param", None, ["decoder"]),
        ("rng_state/shard_0.0_1.1", None, []),
        ("decoder.layers._extra_state/shard_0_2", None, ["decoder"]),
    ],
)
def test_sections_of_names(fqn: str, path: tuple[Any, ...] | None, sections: list[str]) -> None:
    assert sections_of(fqn, path) == sections


class Warnings:
    """Collects what our modules log as warnings meanwhile."""

    def __enter__(self) -> list[str]:
        self.lines: list[str] = []
        self.handler = logging.Handler(logging.WARNING)
        self.handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("ckpt_fast").addHandler(self.handler)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("ckpt_fast").removeHandler(self.handler)


def load(directory: Path, state: dict[str, Any], **options: Any) -> tuple[list[str], Unasked]:
    reader = FastStorageReader(directory)
    with Warnings() as lines:
        dcp.load(state, storage_reader=reader, **options)
    assert reader.unasked is not None
    return lines, reader.unasked


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    dcp.save(training_state(), checkpoint_id=directory)
    return directory


def test_a_load_of_everything_says_nothing(saved: Path) -> None:
    lines, unasked = load(saved, blank(training_state()))
    assert (lines, unasked.nbytes, unasked.names, unasked.sections) == ([], 0, [], [])
    assert unasked.total_nbytes > 50_000


def test_moments_that_an_optimizer_does_not_have_yet(saved: Path) -> None:
    """As in public bug reports: the state dict was taken before the first step."""
    state = blank(training_state())
    state["optimizer"]["state"] = {}
    (line,), unasked = load(saved, state)
    assert [section.name for section in unasked.sections] == ["optimizer.state"]
    assert f"parts of {saved}: optimizer.state ({len(unasked.names)} items, " in line
    assert all(name.startswith("optimizer.state.") for name in unasked.names)
    assert 0 < unasked.nbytes < unasked.total_nbytes


def test_one_kind_of_moments(saved: Path) -> None:
    state = blank(training_state())
    for moments in state["optimizer"]["state"].values():
        del moments["exp_avg_sq"]
    (line,), unasked = load(saved, state)
    assert [section.name for section in unasked.sections] == ["all exp_avg_sq of the optimizer"]
    assert "all exp_avg_sq of the optimizer" in line


def test_what_is_no_section_is_only_counted(saved: Path) -> None:
    state = blank(training_state())
    del state["model"]["0.weight"], state["step"]
    lines, unasked = load(saved, state)
    assert (lines, unasked.sections, sorted(unasked.names)) == ([], [], ["model.0.weight", "step"])
    assert unasked.nbytes > 96 * 48 * 4


def test_a_load_that_is_partial_on_purpose(saved: Path) -> None:
    state = {"model": blank(training_state()["model"])}
    (line,), unasked = load(saved, dict(state))
    assert [section.name for section in unasked.sections] == ["optimizer", "trainer"]
    assert "optimizer (" in line and "trainer (" in line and "allow_partial_load=True" in line
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    lines, unasked = load(saved, dict(state), planner=planner)
    assert not lines and len(unasked.sections) == 2
    with Warnings() as lines:
        _load_state_dict_from_keys("model", storage_reader=FastStorageReader(saved))
    assert not lines


def load_in_parts(rank: int, directory: str, everything: bool) -> tuple[list[str], bool]:
    """Load with different parts of the state dict on each rank, as with pipeline parallelism."""
    state = blank(training_state())
    mine = {key: value for key, value in state.items() if (key == "optimizer") is (rank == 1)}
    if rank == 1 and not everything:
        mine["optimizer"]["state"] = {}
    reader = FastStorageReader(directory)
    with Warnings() as lines:
        dcp.load(mine, storage_reader=reader)
    return lines, reader.unasked is not None


@pytest.mark.parametrize("everything", [True, False])
def test_what_another_rank_asks_for_is_asked_for(everything: bool, saved: Path) -> None:
    (lines, counted), (others, counted_too) = run_ranks(load_in_parts, 2, str(saved), everything)
    assert (counted, counted_too, others) == (True, False, [])
    assert len(lines) == (not everything) and all("optimizer.state (" in line for line in lines)


# --- the Megatron-Core door -------------------------------------------------------------------------------


def save_run(rank: int, root: str) -> None:
    with Run(SETUP, save=root) as run:
        run.train(1)
        run.save()


def load_run(rank: int, root: str) -> dict[str, list[str]]:
    """Return the warnings of loads of everything, of less and less, and of weights alone."""
    found = {}
    setup = other(replace(SETUP, pp=dist.get_world_size()))
    with Run(setup, load=root) as run:
        run.train(1)
        with Warnings() as found["all"]:
            run.load()
        run.state.cfg.checkpoint.load_optim = False
        with Warnings() as found["weights"]:
            run.load()
        for kind in ("exp_avg", "exp_avg_sq"):
            state = run.sharded_state_dict(is_loading=True)
            del state["rng_state"]  # of the checkpoint saved by the other number of ranks
            _drop(state, f"optimizer.state.{kind}.")
            with Warnings() as found[kind]:
                torch_dist.load(state, f"{root}/iter_0000001")
    return found


def _drop(state: Any, beginning: str) -> None:
    """Remove all entries whose keys have this prefix."""
    for key, value in list(state.items()) if isinstance(state, dict) else []:
        if getattr(value, "key", "").startswith(beginning):
            del state[key]
        else:
            _drop(value, beginning)


@pytest.mark.parametrize("ranks", [1, 2])
def test_loads_of_a_run(ranks: int, tmp_path: Path) -> None:
    run_ranks(save_run, 1, str(tmp_path))
    first, *others = run_ranks(load_run, ranks, str(tmp_path))
    assert all(lines == [] for found in others for lines in found.values())
    for kind in ("all", "weights"):
        # Another layout is warned of as well: it has nothing to do with what was asked for.
        assert ["mismatch after resume" in line for line in first[kind]] == [True] * (ranks - 1)
    for kind in ("exp_avg", "exp_avg_sq"):
        (line,) = first[kind]
        assert f"all {kind} of the optimizer (" in line and "was saved" not in line


def test_bytes_are_those_of_the_items(saved: Path) -> None:
    metadata = FastStorageReader(saved).read_metadata()
    total = sum(info.length for info in metadata.storage_data.values())
    _, unasked = load(saved, {"step": 0})
    assert unasked.total_nbytes == total and 0.9 * total < unasked.nbytes < total
