# SPDX-License-Identifier: Apache-2.0
"""Which entries of a model state dict are reordered, and what each kind of value becomes."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.glu.model import (
    _deinterleave_glu_tensor,
    _get_model_glu_interleave_sizes,
    _interleave_glu_tensor,
    _is_swiglu_fc1_checkpoint_key,
    _process_state_dict_for_glu_interleaving,
    _process_state_dict_for_model_glu_interleaving,
)

ROUTED = "decoder.layers.0.mlp.experts.linear_fc1.weight3"
SHARED = "decoder.layers.0.mlp.shared_experts.linear_fc1.weight"
DENSE = "decoder.layers.0.mlp.linear_fc1.bias"
OTHER = "decoder.layers.0.mlp.linear_fc2.weight"


@pytest.fixture(autouse=True)
def dense_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USE_ACT_FUSION_FOR_DENSE", raising=False)


def rows(count: int = 8) -> torch.Tensor:
    return torch.arange(count * 3.0).reshape(count, 3)


def sharded(data: torch.Tensor, rank: int = 0, ranks: int = 1) -> Any:
    return compat.ShardedTensor.from_rank_offsets(
        "experts.weight", data, (0, 2, 4), (1, rank, ranks), replica_id=(0, 0, 1), prepend_axis_num=1
    )


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (ROUTED, "routed"),
        ("decoder.layers.1.mlp.experts.local_experts.7.linear_fc1.weight", "routed"),
        ("mtp.layers.0.mlp.experts.linear_fc1.bias12", "routed"),
        (SHARED, "shared"),
        ("decoder.layers.1.mlp.shared_experts.linear_fc1.bias", "shared"),
        (DENSE, "dense"),
        ("decoder.layers.1.mlp.linear_fc1.weight", "dense"),
        ("decoder.layers.1.linear_fc1.weight", None),
        ("decoder.layers.1.mlp.experts.linear_fc1._extra_state", None),
        ("decoder.layers.1.mlp.experts.linear_fc1.layer_norm_weight", None),
        ("decoder.layers.1.mlp.experts.linear_fc1.adapter.linear_in.weight", None),
        ("decoder.layers.1.mlp.experts.linear_fc2.weight0", None),
        ("decoder.layers.1.mlp.router.weight", None),
    ],
)
def test_keys(key: str, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_ACT_FUSION_FOR_DENSE", "1")
    for wanted in ("routed", "shared", "dense"):
        selected = _is_swiglu_fc1_checkpoint_key(
            key,
            include_routed_experts=wanted == "routed",
            include_shared_experts=wanted == "shared",
            include_dense=wanted == "dense",
        )
        assert selected == (kind == wanted)
    assert _is_swiglu_fc1_checkpoint_key(key) == (kind in ("routed", "dense"))


def test_dense_mlps_follow_the_environment_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, selected in (("1", True), ("0", False), ("true", False), ("1", True)):
        monkeypatch.setenv("USE_ACT_FUSION_FOR_DENSE", value)
        assert _is_swiglu_fc1_checkpoint_key(DENSE) is selected
        result = _process_state_dict_for_glu_interleaving({DENSE: rows()}, 2)
        assert torch.equal(result[DENSE], _interleave_glu_tensor(rows(), 2) if selected else rows())


def test_result_is_a_new_sorted_dict_and_the_input_is_left_alone() -> None:
    values = {SHARED: rows(), OTHER: rows(), ROUTED: rows(), "a": b"bytes", "b": None}
    before = dict(values)
    result = _process_state_dict_for_glu_interleaving(values, 2)
    assert list(result) == sorted(values) and type(result) is dict
    assert list(values) == list(before) and all(values[key] is before[key] for key in before)
    assert all(result[key] is values[key] for key in values if key != ROUTED)
    assert torch.equal(result[ROUTED], _interleave_glu_tensor(rows(), 2))
    assert torch.equal(values[ROUTED], rows())


@pytest.mark.parametrize("state", [None, [rows()], "text"])
def test_anything_but_a_dict_is_returned(state: Any) -> None:
    assert _process_state_dict_for_glu_interleaving(state, 2) is state


@pytest.mark.parametrize(
    ("interleave", "permute"), [(True, _interleave_glu_tensor), (False, _deinterleave_glu_tensor)]
)
def test_sharded_tensor(interleave: bool, permute: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    value = sharded(rows(), rank=1, ranks=2)
    result = _process_state_dict_for_glu_interleaving({ROUTED: value}, 2, interleave)[ROUTED]
    assert torch.equal(result.data, permute(rows(), 2)) and torch.equal(value.data, rows())
    for name in ("key", "dtype", "local_shape", "global_shape", "global_offset", "axis_fragmentations"):
        assert getattr(result, name) == getattr(value, name)
    assert (result.replica_id, result.prepend_axis_num) == ((0, 0, 1), 1)


def test_sharded_object_with_a_tensor() -> None:
    value = compat.ShardedObject("k", rows(), (4,), (2,), replica_id=3)
    result = _process_state_dict_for_glu_interleaving({ROUTED: value}, 4, interleave=False)[ROUTED]
    assert torch.equal(result.data, _deinterleave_glu_tensor(rows(), 4))
    assert result.data.data_ptr() != value.data.data_ptr()
    assert (result.key, result.global_shape, result.global_offset, result.replica_id) == ("k", (4,), (2,), 3)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("singleton", [False, True])
def test_factory_stores_the_contiguous_halves(ranks: int, singleton: bool) -> None:
    gate, up = rows(8), -rows(8) - 1
    stored: dict[str, torch.Tensor] = {}
    for rank in range(ranks):
        contiguous = torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
        runtime = _interleave_glu_tensor(contiguous, 2)
        whole = compat.ShardedTensor.from_rank_offsets("fc1", runtime, (0, rank, ranks), replica_id=rank)
        factory = apply_swiglu_sharded_factory(whole, (), singleton)
        result = _process_state_dict_for_glu_interleaving({ROUTED: factory}, 2, interleave=False)[ROUTED]
        assert result is not factory and torch.equal(factory.data, runtime)
        assert (result.key, result.replica_id, result.build_fn) == ("fc1", rank, factory.build_fn)
        shards = result.build()
        for shard in shards:
            stored.setdefault(shard.key, torch.zeros(shard.global_shape))[shard.global_slice()] = shard.data
        merged = factory.merge_fn([shard.data for shard in shards])
        loaded = _process_state_dict_for_glu_interleaving({ROUTED: merged}, 2, interleave=True)
        assert torch.equal(loaded[ROUTED], runtime)
    expected = {"fc1_w": gate, "fc1_v": up} if singleton else {"fc1": torch.cat([gate, up])}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)


def test_factory_of_a_part_of_the_rows_is_refused() -> None:
    """As newer Megatron-Core builds if FSDP2 has split the halves: one shard, inside W or inside V."""

    def build(key: str, data: torch.Tensor, *_: Any) -> list[Any]:
        return [compat.ShardedTensor.from_rank_offsets(key, data, (0, 1, 4))]

    factory = compat.ShardedTensorFactory("fc1", rows(), build, torch.cat)
    with pytest.raises(CheckpointMismatchError, match=f"{ROUTED}.*part of the gate and up rows"):
        _process_state_dict_for_glu_interleaving({ROUTED: factory}, 2, interleave=False)
    flat = compat.ShardedTensorFactory("fc1", rows().flatten(), build, torch.cat, 0, slice(0, 24))
    with pytest.raises(CheckpointMismatchError, match=ROUTED):
        _process_state_dict_for_glu_interleaving({ROUTED: flat}, 2, interleave=False)


def test_list_of_sharded_tensors_is_one_tensor() -> None:
    shards = [sharded(rows(12)[:8], 0, 2), sharded(rows(12)[8:], 2, 3)]
    result = _process_state_dict_for_glu_interleaving({ROUTED: shards}, 3, interleave=False)[ROUTED]
    assert torch.equal(torch.cat([shard.data for shard in result]), _deinterleave_glu_tensor(rows(12), 3))
    assert [shard.global_offset for shard in result] == [shard.global_offset for shard in shards]
    assert [tuple(shard.data.shape) for shard in result] == [(8, 3), (4, 3)]
    assert torch.equal(shards[0].data, rows(12)[:8])


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"bytes",
        [],
        [torch.zeros(8)],
        [sharded(rows()), torch.zeros(8)],
        [sharded(rows()), sharded(rows()).without_data()],
        sharded(rows()).without_data(),
        compat.ShardedObject("k", {"not": "a tensor"}, (1,), (0,)),
        compat.ShardedTensorFactory("k", None, lambda *_: [], torch.cat),
        compat.LocalNonpersistentObject(rows()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_without_rows_pass(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert _process_state_dict_for_glu_interleaving({ROUTED: value}, 2)[ROUTED] is value
    assert caplog.messages == []


def test_errors_name_the_key() -> None:
    for value in (rows(6), sharded(rows(6)), [sharded(rows(3)), sharded(rows(3))]):
        with pytest.raises(RuntimeError, match=rf"{ROUTED}: dim 0 of shape \(6, 3\).*size 2"):
            _process_state_dict_for_glu_interleaving({ROUTED: value}, 2)


def test_one_line_tells_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    _process_state_dict_for_glu_interleaving({ROUTED: rows(), ROUTED + "1": sharded(rows())}, 2)
    (line,) = caplog.messages
    assert "interleaved 2 " in line and "de-" not in line and "size 2" in line
    _process_state_dict_for_glu_interleaving({ROUTED: rows()}, 4, interleave=False)
    assert "de-interleaved 1 " in caplog.text


@pytest.mark.parametrize(
    ("routed", "shared", "lines"), [(2, 2, 1), (2, None, 1), (None, 1, 1), (2, 1, 2), (None, None, 0)]
)
def test_sizes_by_kind_of_mlp(
    routed: int | None,
    shared: int | None,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("USE_ACT_FUSION_FOR_DENSE", "1")
    caplog.set_level(logging.DEBUG)
    state = {key: rows() for key in (ROUTED, SHARED, DENSE, OTHER)}
    result = _process_state_dict_for_model_glu_interleaving(state, routed, shared)
    for key, size in ((ROUTED, routed), (SHARED, shared), (DENSE, routed), (OTHER, None)):
        assert torch.equal(result[key], rows() if size is None else _interleave_glu_tensor(rows(), size))
    assert len(caplog.messages) == lines
    assert (result is state) == (routed is None and shared is None)
    back = _process_state_dict_for_model_glu_interleaving(result, routed, shared, interleave=False)
    assert all(torch.equal(back[key], rows()) for key in state)


def test_megatron_fsdp_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "preprocess_state_dict_for_uneven_dtensor", None)
    with pytest.raises(RuntimeError, match="Megatron FSDP"):
        _process_state_dict_for_glu_interleaving({ROUTED: rows()}, 2, use_megatron_fsdp=True)


class Chunk(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def test_sizes_come_from_the_model_before_the_configuration() -> None:
    def sizes(**values: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(**values)

    cfg = types.SimpleNamespace(model=sizes(moe_mlp_glu_interleave_size=32))
    built = Chunk(sizes(moe_mlp_glu_interleave_size=8, moe_shared_expert_glu_interleave_size=4))
    assert _get_model_glu_interleave_sizes([built], cfg) == (8, 4)
    assert _get_model_glu_interleave_sizes([], cfg) == (32, None)
    assert _get_model_glu_interleave_sizes([object()], cfg) == (32, None)
    assert _get_model_glu_interleave_sizes([], types.SimpleNamespace()) == (None, None)
