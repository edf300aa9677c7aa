# SPDX-License-Identifier: Apache-2.0
"""What one save collects: everything, or, while its tensors are known, all the rest."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch

from ckpt_fast import compat, native
from ckpt_fast.doors.megatron.reuse import Inventory, Outline
from ckpt_fast.errors import CheckpointError
from ckpt_fast.glu.layout import (
    Sizes,
    _is_model_section,
    contiguous_chunks,
    require_whole_parameters,
    rows_in_stored_order,
)
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.ranks.world import note_rank_0
from ckpt_fast.trainer.contents.rng import get_rng_state
from ckpt_fast.trainer.contents.state_dict import (
    apply_peft_adapter_filter_to_state_dict,
    generate_state_dict,
    uses_distributed_optimizer,
)
from ckpt_fast.trainer.save.run import SaveRun
from ckpt_fast.trainer.save.staging import torch_optimizers
from ckpt_fast.trainer.save.target import SaveTarget

_EXTRA_STATE = "._extra_state"
_SHARDING_TYPE = "distrib_optim_sharding_type"


class Collection:
    """The state of a run as one save collects it; as local as what Megatron does for it.

    Args:
        run, target: the save.
        metadata: tells model and optimizer how to shape their sharded state dicts.
        sizes: interleave sizes of gated layers.
        capture: run first of all, once.
        prebuilt: taken instead of what model and optimizer give.
    """

    def __init__(
        self,
        run: SaveRun,
        target: SaveTarget,
        metadata: dict[str, Any],
        sizes: Sizes,
        capture: Callable[[], None],
        prebuilt: dict[str, Any] | None = None,
    ) -> None:
        self._run = run
        self._target = target
        self._metadata = metadata
        self._sizes = sizes
        self._capture = capture
        self._prebuilt = prebuilt

    @cached_property
    def _states(self) -> tuple[Any, Any]:
        """The states of random numbers, which take a collective, and of Megatron's rerun machine."""
        self._capture()
        run, ckpt_cfg = self._run, self._run.ckpt_cfg
        if self._prebuilt is not None:
            return None, None
        rng_state = None
        if ckpt_cfg.save_rng:
            rng_state = get_rng_state(
                data_parallel_random_init=run.cfg.rng.data_parallel_random_init,
                ckpt_format=ckpt_cfg.ckpt_format,
                pg_collection=run.pg_collection,
                module_name=run.module_name,
            )
        rerun_state = compat.get_rerun_state_machine().state_dict(
            data_iterator=run.iterator, ckpt_format=ckpt_cfg.ckpt_format
        )
        return rng_state, rerun_state

    def everything(self) -> dict[str, Any]:
        """The state dict in the layout of the format.

        Raises:
            CheckpointError: there is no model.
        """
        run, is_torch_dist = self._run, self._target.is_torch_dist(self._run.ckpt_cfg)
        _ = self._states
        if self._prebuilt is not None:
            note_rank_0("Using pre-built state dict (low-memory save)")
            return self._to_layout(self._prebuilt)
        if not run.model:
            raise CheckpointError(
                "there is no model to save: pass its chunks, or prebuilt_state_dict together with "
                "pg_collection"
            )
        if _SHARDING_TYPE in self._metadata:
            note_rank_0(
                f"Storing distributed optimizer sharded state of type {self._metadata[_SHARDING_TYPE]}"
            )
        chunks = contiguous_chunks(run.model, self._sizes, False) if is_torch_dist else run.model
        state_dict = self._generate(chunks, run.optimizer)
        if "optimizer" in state_dict:
            require_whole_parameters(
                chunks, self._metadata, "Set dist_ckpt_optim_fully_reshardable=True, or save_optim=False."
            )
        return self._to_layout(state_dict)

    def outline(self, state_dict: dict[str, Any]) -> Outline | None:
        """What there is besides tensors in ``everything``; None where those are not accounted for."""
        if self._stand_in is None:
            return None
        extra_states: dict[str, list[weakref.ref[torch.nn.Module]]] = {}
        sections = [content for section, content in state_dict.items() if _is_model_section(section)]
        for chunk, section in zip(self._run.model, sections, strict=True):
            for name, entry in section.items():
                if isinstance(entry, (compat.ShardedTensor, compat.ShardedTensorFactory)):
                    continue
                module = _module_of(chunk, name, entry)
                if module is None:
                    return None
                if compat.is_main_replica(entry.replica_id):
                    extra_states.setdefault(entry.unique_key, []).append(weakref.ref(module))
        return Outline(extra_states, compat.padding_in(state_dict.get("optimizer")))

    def objects(self) -> dict[str, Any]:
        """``everything`` without the model and without the tensors that ``inventory`` accounts for."""
        assert self._stand_in is not None
        return self._generate([], self._stand_in[0])

    @without_collections
    def inventory(self) -> Inventory | None:
        """What decides the tensors in ``everything``; None if only building it can tell."""
        run = self._run
        if self._stand_in is None:
            return None
        try:
            owners, tensors, names = native.walk_modules(run.model)
            facts = [repr(tuple(self._conditions())).encode(), names]
            for optimizer in torch_optimizers(run.optimizer):
                owners.append(optimizer)
                found, names = native.walk_optimizer(optimizer.param_groups, optimizer.state, torch.Tensor)
                tensors += found
                facts.append(names)
        except (TypeError, KeyError, RecursionError):
            return None
        return Inventory(owners, tensors, b"\0\0".join(facts))

    @cached_property
    def _stand_in(self) -> tuple[Any] | None:
        """The optimizer without the state of parameters; None where that cannot be had."""
        run = self._run
        if self._prebuilt is not None or run.cfg.peft is not None or not run.model:
            return None
        if not self._target.is_torch_dist(run.ckpt_cfg):
            return None
        optimizer = run.optimizer
        if not run.ckpt_cfg.save_optim or optimizer is None or getattr(optimizer, "is_stub_optimizer", False):
            return (optimizer,)
        if self._metadata.get(_SHARDING_TYPE) != "dp_reshardable":
            return None
        stand_in = compat.without_parameter_state(optimizer)
        return None if stand_in is None else (stand_in,)

    def _conditions(self) -> Iterator[Any]:
        run = self._run
        yield repr(compat.clean_metadata_for_serialization(self._metadata))
        yield self._sizes
        yield (run.ckpt_cfg.save_optim, uses_distributed_optimizer(run.cfg), run.module_name)
        yield [id(group) for group in vars(run.pg_collection).values()]

    def _generate(self, chunks: list[Any], optimizer: Any) -> dict[str, Any]:
        run = self._run
        rng_state, rerun_state = self._states
        return generate_state_dict(
            run.ckpt_cfg,
            chunks,
            optimizer,
            run.scheduler,
            rng_state,
            iteration=run.state.train_state.step,
            optim_sd_kwargs={"metadata": self._metadata},
            model_sd_kwargs={"metadata": self._metadata},
            rerun_state=rerun_state,
            pg_collection=run.pg_collection,
        )

    def _to_layout(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """GLU rows in the order of the format, and adapters only, if that is what is trained."""
        run = self._run
        if self._sizes != (None, None):
            state_dict = rows_in_stored_order(
                state_dict,
                self._sizes,
                is_local=self._target.is_local,
                is_arranged=self._target.is_torch_dist(run.ckpt_cfg) and self._prebuilt is None,
                use_megatron_fsdp=bool(getattr(run.cfg.ddp, "use_megatron_fsdp", False)),
            )
        if run.cfg.peft is not None:
            state_dict = apply_peft_adapter_filter_to_state_dict(state_dict, run.cfg.peft)
        return state_dict


def _module_of(chunk: torch.nn.Module, name: str, entry: Any) -> torch.nn.Module | None:
    """The module whose extra state an object of a model section is; None if it is anything else."""
    if not isinstance(entry, compat.ShardedObject) or not name.endswith(_EXTRA_STATE):
        return None
    try:
        return chunk.get_submodule(name.removesuffix(_EXTRA_STATE))
    except AttributeError:
        return None
