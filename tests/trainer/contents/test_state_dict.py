# SPDX-License-Identifier: Apache-2.0
"""What a state dict contains under which options, and how strictly a model loads one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt_fast import compat
from ckpt_fast.checkpointing import (
    _build_sharded_state_dict_metadata,
    _generate_model_state_dict,
    _is_model_section,
    _load_model_state_dict,
    apply_peft_adapter_filter_to_state_dict,
    delete_extra_state,
    generate_state_dict,
)
from ckpt_fast.config import CheckpointConfig
from ckpt_fast.errors import CheckpointMismatchError


class Chunk(torch.nn.Module):
    """A model chunk that records what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def sharded_state_dict(self, **kwargs: Any) -> dict[str, Any]:
        return {"weight": compat.ShardedTensor.from_rank_offsets("weight", self.weight), "asked": kwargs}

    def state_dict_for_save_checkpoint(self) -> dict[str, Any]:
        return {"plain": self.weight}


class Optimizer:
    """An optimizer that records what it was asked for."""

    def __init__(self, is_stub: bool = False) -> None:
        self.is_stub_optimizer = is_stub

    def sharded_state_dict(self, model_state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {"sections": sorted(model_state_dict), "asked": kwargs}

    def state_dict(self) -> dict[str, Any]:
        return {"plain": 1}


SCHEDULER = SimpleNamespace(state_dict=lambda: {"num_steps": 3})


def generate(ckpt_cfg: CheckpointConfig | None = None, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": [Chunk()],
        "optimizer": Optimizer(),
        "opt_param_scheduler": SCHEDULER,
        "rng_state": "rng",
        "iteration": 7,
        "rerun_state": {"r": 1},
        **changes,
    }
    return generate_state_dict(ckpt_cfg or CheckpointConfig(), **arguments)


def test_everything_in_the_documented_order() -> None:
    state_dict = generate()
    assert list(state_dict) == [
        "checkpoint_version",
        "iteration",
        "model",
        "optimizer",
        "opt_param_scheduler",
        "rerun_state_machine",
        "rng_state",
    ]
    assert state_dict["checkpoint_version"] == 3.0
    assert state_dict["iteration"] == 7
    # The optimizer finds its parameters' sharding in the model sections.
    assert "model" in state_dict["optimizer"]["sections"]


@pytest.mark.parametrize(
    "changes, missing",
    [
        ({"iteration": None}, {"iteration"}),
        ({"rerun_state": None}, {"rerun_state_machine"}),
        ({"optimizer": None}, {"optimizer"}),
        ({"optimizer": Optimizer(is_stub=True)}, {"optimizer"}),
        ({"opt_param_scheduler": None}, {"opt_param_scheduler"}),
        ({"model": []}, {"model"}),
    ],
)
def test_what_there_is_not_is_left_out(changes: dict[str, Any], missing: set[str]) -> None:
    assert generate().keys() - generate(**changes).keys() == missing


def test_save_options() -> None:
    bare = CheckpointConfig(save_optim=False, save_rng=False)
    assert generate(bare).keys() == {"checkpoint_version", "iteration", "model", "rerun_state_machine"}
    # A scaffold requests what the checkpoint has, whatever this run will save.
    loading = {"optim_sd_kwargs": {"is_loading": True}}
    assert generate(bare, **loading).keys() == generate().keys()
    assert "rng_state" not in generate(bare, **loading, rng_state=None)
    # Saved even if there is none: readers expect the key.
    assert generate(rng_state=None)["rng_state"] is None


def test_arguments_reach_model_and_optimizer() -> None:
    state_dict = generate(
        model_sd_kwargs={"metadata": {"a": 1}}, optim_sd_kwargs={"metadata": {"b": 2}, "is_loading": True}
    )
    assert state_dict["model"]["asked"] == {"metadata": {"a": 1}}
    assert state_dict["optimizer"]["asked"] == {"metadata": {"b": 2}, "is_loading": True}


def test_other_formats() -> None:
    fsdp = CheckpointConfig(ckpt_format="fsdp_dtensor")
    kwargs: dict[str, Any] = {}
    state_dict = generate(fsdp, optim_sd_kwargs=kwargs)
    assert state_dict["model"].keys() == {"plain"}
    assert state_dict["optimizer"]["asked"] == {"metadata": {}}
    assert kwargs == {}
    assert generate(CheckpointConfig(ckpt_format="torch"))["optimizer"] == {"plain": 1}


def test_several_chunks_get_sections_of_their_own() -> None:
    assert _generate_model_state_dict([Chunk()]).keys() == {"model"}
    assert list(_generate_model_state_dict([Chunk() for _ in range(3)])) == ["model0", "model1", "model2"]
    assert _generate_model_state_dict([]) == {}


@pytest.mark.parametrize("name", ["model", "model0", "model00", "model12"])
def test_model_sections(name: str) -> None:
    assert _is_model_section(name)


@pytest.mark.parametrize(
    "name", ["", "models", "model_", "modelx", "model1x", "my_model", "optimizer", "mode"]
)
def test_other_sections(name: str) -> None:
    assert not _is_model_section(name)


@pytest.mark.parametrize(
    "distributed, fields, expected",
    [
        (False, {}, {}),
        (True, {}, {"distrib_optim_sharding_type": "dp_reshardable"}),
        (True, {"ckpt_format": "fsdp_dtensor"}, {"distrib_optim_sharding_type": "fsdp_dtensor"}),
        (
            True,
            {"dist_ckpt_optim_fully_reshardable": True},
            {
                "distrib_optim_sharding_type": "fully_reshardable",
                "distrib_optim_fully_reshardable_mem_efficient": False,
            },
        ),
        (False, {"dist_ckpt_optim_fully_reshardable": True}, {}),
    ],
)
def test_content_metadata(distributed: bool, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    always = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    found = _build_sharded_state_dict_metadata(distributed, CheckpointConfig(**fields))
    assert found == {**always, **expected}


class WithoutKeys:
    def keys(self) -> Any:
        raise RuntimeError("not now")


def test_deleting_extra_state() -> None:
    def content() -> dict[Any, Any]:
        return {"a._extra_state": 1, "_extra_state.b": 2, "x_extra_state1": 3, "weight": 4, 5: 6}

    whole = {"model": content(), "optimizer": {"_extra_state": 1}}
    assert delete_extra_state(whole) is whole
    assert whole == {"model": {"weight": 4, 5: 6}, "optimizer": {"_extra_state": 1}}
    model = content()
    assert delete_extra_state(model) is model
    assert model == {"weight": 4, 5: 6}
    for other in (None, [1], "text", WithoutKeys()):
        assert delete_extra_state(other) is other


def test_adapter_filter() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = {"anything": 1}
    state_dict = {
        "iteration": 1,
        "model": {
            "layer.weight": 1,
            "layer.adapter.weight": parameter,
            "layer.adapter._extra_state": 2,
        },
        "model1": {"layer.weight": 1},
        "optimizer": optimizer,
    }
    peft = SimpleNamespace(adapter_key_filter=lambda key: ".adapter." in key)
    filtered = apply_peft_adapter_filter_to_state_dict(state_dict, peft)
    assert list(filtered) == list(state_dict)
    assert filtered["model"] == {"layer.adapter.weight": parameter}
    assert filtered["model1"] == {}
    assert filtered["optimizer"] is optimizer
    assert len(state_dict["model"]) == 3


# --- loading into a module -------------------------------------------------------------------------------


def network(width: int = 3, depth: int = 2) -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(depth)))


def test_a_state_dict_that_fits() -> None:
    module, state_dict = network(), network().state_dict()
    _load_model_state_dict(module, dict(state_dict), strict=True)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state_dict.items())


def test_extra_state_is_forgiven() -> None:
    state_dict = {**network().state_dict(), "0._extra_state": torch.ones(1)}
    module = network()
    _load_model_state_dict(module, dict(state_dict), strict=True)
    assert torch.equal(module[0].weight, state_dict["0.weight"])


def test_other_differences_are_not() -> None:
    state_dict = network(depth=1).state_dict()
    with pytest.raises(CheckpointMismatchError) as caught:
        _load_model_state_dict(network(depth=2), dict(state_dict), strict=True)
    assert "Missing in the checkpoint (2): 1 (2 keys)" in str(caught.value)
    _load_model_state_dict(network(depth=2), dict(state_dict), strict=False)
    with pytest.raises(CheckpointMismatchError) as caught:
        _load_model_state_dict(network(depth=1), network(depth=20).state_dict(), strict=True)
    assert "Unknown to the model (38): 1 (2 keys)" in str(caught.value)
    assert "and 13 more modules" in str(caught.value)
    assert "strict=False" in str(caught.value)


def test_other_shapes_are_named() -> None:
    for strict in (True, False):
        with pytest.raises(
            (CheckpointMismatchError, RuntimeError), match=r"(?s)0\.weight.*\[3, 3\].*\[4, 4\]"
        ):
            _load_model_state_dict(network(width=4), network(width=3).state_dict(), strict=strict)
