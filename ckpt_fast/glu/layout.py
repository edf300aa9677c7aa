# SPDX-License-Identifier: Apache-2.0
"""The stored order of GLU rows: where it is recorded, and how a state dict is adapted to it.

torch_dist: model and optimizer have contiguous rows, whatever the run that saved them. The content metadata
and the manifest say so under ``glu_rows``; a checkpoint that says nothing is taken for contiguous as well.
fsdp_dtensor: the model's rows are contiguous, the optimizer's as they were in memory; the interleave sizes
are those of ``run_config.yaml``. Local checkpoints: everything as it was in memory, with the sizes beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.glu.factory import InterleavedFactory, interleaved
from ckpt_fast.glu.model import (
    _is_swiglu_fc1_checkpoint_key,
    _process_state_dict_for_model_glu_interleaving,
    permute_value,
)
from ckpt_fast.ranks.world import note_rank_0, warn_rank_0

Sizes = tuple[int | None, int | None]

GLU_ROWS_KEY = "glu_rows"
CONTIGUOUS = "contiguous"
INTERLEAVED = "interleaved"
LOCAL_SIZES_KEY = "glu_interleave_sizes"
# Each parameter's state is whole in these; in the others it is cut with no regard to rows. None: the
# optimizer is not distributed.
_WHOLE_PARAMETERS = (None, "fully_reshardable")


class ContiguousChunk:
    """A model chunk whose sharded state dict shows interleaved fc1 rows in the checkpoint's order.

    An optimizer that is given this state dict describes its master weights and moments in the same way.

    Attributes:
        late: keys whose values cannot be filled in that order: to be reordered after the load.
        trains_rows: whether any of the rows belong to parameters that are being trained.
    """

    def __init__(self, chunk: Any, sizes: Sizes, is_loading: bool) -> None:
        self._chunk, self._sizes, self._is_loading = chunk, sizes, is_loading
        self.late: list[str] = []
        self.trains_rows = False

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        section: dict[str, Any] = self._chunk.sharded_state_dict(*args, **kwargs)
        return {key: self._arranged(key, value) for key, value in section.items()}

    @classmethod
    def of_section(cls, section: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
        """A section that is to be saved, in the checkpoint's order."""
        chunk = cls(None, sizes, is_loading=False)
        return {key: chunk._arranged(key, value) for key, value in section.items()}

    def _arranged(self, key: str, value: Any) -> Any:
        size = _size_for(key, self._sizes)
        if size is None:
            return value
        if isinstance(value, (compat.ShardedTensor, compat.ShardedTensorFactory)):
            self.trains_rows |= getattr(value.data, "requires_grad", True)
            return interleaved(value, size)
        if self._is_loading:
            self.late.append(key)
            return value
        return permute_value(key, value, size, interleave=False)

    def reorder_late(self, section: dict[str, Any]) -> None:
        """Reorder, in the loaded section, what could not be filled in order."""
        for key in set(self.late) & section.keys():
            size = _size_for(key, self._sizes)
            assert size is not None
            section[key] = permute_value(key, section[key], size, interleave=True)


def contiguous_chunks(model: Sequence[Any], sizes: Sizes, is_loading: bool) -> list[Any]:
    """The chunks as they are without interleaving, as ContiguousChunks with it."""
    if sizes == (None, None):
        return list(model)
    return [ContiguousChunk(chunk, sizes, is_loading) for chunk in model]


def reorder_late(chunks: Sequence[Any], state_dict: dict[str, Any]) -> None:
    """``ContiguousChunk.reorder_late`` for the loaded section of every chunk."""
    for number, chunk in enumerate(chunks):
        section = "model" if len(chunks) == 1 else f"model{number}"
        if isinstance(chunk, ContiguousChunk) and section in state_dict:
            chunk.reorder_late(state_dict[section])


def rows_in_stored_order(
    state_dict: dict[str, Any], sizes: Sizes, *, is_local: bool, is_arranged: bool, use_megatron_fsdp: bool
) -> dict[str, Any]:
    """Final preparation of a state dict before it is saved. Collective with Megatron FSDP.

    Args:
        state_dict: of the whole checkpoint.
        sizes: interleave sizes, not both None.
        is_local: for a local checkpoint.
        is_arranged: built from ContiguousChunks.
        use_megatron_fsdp: the model's values are its DTensors.

    Raises:
        CheckpointMismatchError: rows cannot be paired, or optimizer state is cut with no regard to them.
    """
    if is_local:
        return {**state_dict, LOCAL_SIZES_KEY: list(sizes)}
    note_rank_0(f"[GLU Interleaving] De-interleaving for the checkpoint (sizes {sizes[0]}, {sizes[1]})")
    if is_arranged:
        return state_dict
    state_dict = dict(state_dict)
    for section in sorted(filter(_is_model_section, state_dict)):
        if use_megatron_fsdp:
            state_dict[section] = _process_state_dict_for_model_glu_interleaving(
                state_dict[section], *sizes, interleave=False, use_megatron_fsdp=True
            )
        else:
            state_dict[section] = ContiguousChunk.of_section(state_dict[section], sizes)
    if "optimizer" in state_dict and not use_megatron_fsdp:
        state_dict["optimizer"] = compat.dict_list_map_outplace(
            lambda entry: _arranged_state(entry, sizes), state_dict["optimizer"]
        )
    return state_dict


def _arranged_state(entry: Any, sizes: Sizes) -> Any:
    """An entry of the optimizer: by the key it has in the checkpoint, which names the parameter too."""
    size = _size_for(entry.key, sizes) if isinstance(entry, compat.ShardedBase) else None
    if size is None or isinstance(entry, InterleavedFactory):
        return entry
    if not isinstance(entry, compat.ShardedTensorFactory):
        raise CheckpointMismatchError(
            f"{entry.key} in the prebuilt state dict is cut into pieces, but its GLU rows are interleaved "
            "and cannot be stored in order any more. Build it with factories, or without optimizer."
        )
    return interleaved(entry, size)


def _size_for(key: str, sizes: Sizes) -> int | None:
    """The interleave size of the rows under a state dict key; None where there are none to reorder."""
    routed, shared = sizes
    if routed is not None and _is_swiglu_fc1_checkpoint_key(key):
        return routed
    if shared is not None and _is_swiglu_fc1_checkpoint_key(
        key, include_routed_experts=False, include_shared_experts=True, include_dense=False
    ):
        return shared
    return None


def require_whole_parameters(chunks: Sequence[Any], metadata: Mapping[str, Any], remedy: str) -> None:
    """Refuse an optimizer whose sharding hides where the rows are.

    Args:
        chunks: from ``contiguous_chunks``; their state dicts have been taken.
        metadata: content metadata with the optimizer's sharding type.
        remedy: what to do, a sentence.

    Raises:
        CheckpointMismatchError: the optimizer has state of interleaved rows in such a sharding.
    """
    kind = metadata.get("distrib_optim_sharding_type")
    trains = any(isinstance(chunk, ContiguousChunk) and chunk.trains_rows for chunk in chunks)
    if trains and kind not in _WHOLE_PARAMETERS:
        raise CheckpointMismatchError(
            f"the optimizer state of type {kind} is cut into pieces with no regard to rows, so that the "
            f"interleaved rows of gated MLPs cannot be told in it and stored contiguous. {remedy}"
        )


def sizes_to_undo(
    metadata: Mapping[str, Any], run_config: Mapping[str, Any] | None, ckpt_cfg: Any, sizes: Sizes
) -> Sizes:
    """The interleaving that differs between a torch_dist checkpoint and this run: (None, None) if they agree.

    Args:
        metadata: the checkpoint's content metadata.
        run_config: the configuration it was saved with, if known.
        ckpt_cfg: ``load_glu_rows`` overrides what the checkpoint says.
        sizes: this run's interleave sizes.

    Raises:
        CheckpointMismatchError: the rows are stored interleaved with other sizes than this run's, or in an
            order unknown to this version.
    """
    saved = _sizes_in(run_config)
    order = getattr(ckpt_cfg, "load_glu_rows", "recorded")
    if order == "recorded":
        order = metadata.get(GLU_ROWS_KEY, CONTIGUOUS)
        if GLU_ROWS_KEY not in metadata and saved not in (None, (None, None)):
            warn_rank_0(
                "the checkpoint does not say in which order its GLU rows are, and was saved by a "
                f"run with interleave sizes (routed, shared) {saved}. They are taken for contiguous. If they "
                "are not, which is so after an ordinary torch_dist save of Megatron Bridge, set "
                f"load_glu_rows={INTERLEAVED!r}."
            )
    if order == CONTIGUOUS:
        return sizes
    if order != INTERLEAVED:
        raise CheckpointMismatchError(
            f"the GLU rows of the checkpoint are in an order {order!r} that this version does not know"
        )
    require_same_sizes(saved or sizes, sizes, "The rows of gated MLPs")
    return None, None


def require_same_sizes(saved: Sequence[int | None], current: Sizes, what: str) -> None:
    """Refuse rows that were stored as they were in memory, where this run has them otherwise.

    Raises:
        CheckpointMismatchError: the sizes differ.
    """
    if tuple(saved) != current:
        raise CheckpointMismatchError(
            f"{what} are in the checkpoint as they were in memory, with GLU interleave sizes (routed, "
            f"shared) {tuple(saved)}; this run has {current}, so that they would end up in the wrong places. "
            "Use the same sizes, or leave out what does not fit (load_optim=False)."
        )


def require_same_fsdp_optimizer(run_config: Mapping[str, Any] | None, current: Sizes) -> None:
    """``require_same_sizes`` for the optimizer state of an fsdp_dtensor checkpoint that tells its sizes."""
    require_same_sizes(_sizes_in(run_config) or current, current, "The rows of the optimizer state")


def _sizes_in(run_config: Mapping[str, Any] | None) -> Sizes | None:
    """The interleave sizes in a run's configuration; None where it does not say."""
    names = ("moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size")
    model = (run_config or {}).get("model") or {}
    return (model.get(names[0]), model.get(names[1])) if any(name in model for name in names) else None


def _is_model_section(section_key: str) -> bool:
    """Whether a key names a model section: ``model``, or ``model`` followed by digits."""
    prefix, rest = section_key[:5], section_key[5:]
    return prefix == "model" and (rest == "" or rest.isdigit())
