# SPDX-License-Identifier: Apache-2.0
"""Checkpoint contents other than the model: the data loader's position, the tokenizer files."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, TypeVar

from ckpt_fast import settings
from ckpt_fast.compat import SoloGroup, get_pg_collection
from ckpt_fast.pipeline.load.decode import decode_object
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.ranks.world import (
    get_rank_safe,
    is_distributed,
    note_rank_0,
    on_all_ranks,
    on_rank_0,
    warn_rank_0,
)
from ckpt_fast.storage import objects
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.storage.small_files import LARGEST_FILE
from ckpt_fast.trainer.contents.data_position import FILES_KEY, places_of, read_recorded, record_for
from ckpt_fast.trainer.places.paths import (
    ensure_directory_exists,
    file_exists,
    get_checkpoint_name,
    join_paths,
    read_file,
    sync_files,
    write_file,
)
from ckpt_fast.trainer.save.loader_position import (
    STATE,
    STATES_OF_STAGES,
    LoaderPosition,
    iterators_of,
    position_file,
    rank_in,
)

if TYPE_CHECKING:
    from ckpt_fast.compat import MegatronModule, ProcessGroupCollection
    from ckpt_fast.config import TokenizerConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")

TOKENIZER_DIR = "tokenizer"

# tokenizer_type -> (field of the configuration, name in the checkpoint)
_TOKENIZER_FILES: dict[str, tuple[tuple[str, str], ...]] = {
    "BertWordPieceLowerCase": (("vocab_file", "vocab.txt"),),
    "BertWordPieceCase": (("vocab_file", "vocab.txt"),),
    "GPT2BPETokenizer": (("vocab_file", "vocab.json"), ("merge_file", "merges.txt")),
    "SentencePieceTokenizer": (("tokenizer_model", "tokenizer.model"),),
    "GPTSentencePieceTokenizer": (("tokenizer_model", "tokenizer.model"),),
    "Llama2Tokenizer": (("tokenizer_model", "tokenizer.model"),),
    "TikTokenizer": (("tokenizer_model", "tokenizer.json"),),
}
_HF_TOKENIZERS = ("HuggingFaceTokenizer", "MultimodalTokenizer")


# --- Data loader -----------------------------------------------------------------------------------------


def can_restore_position(train_iterator: Any) -> bool:
    """Whether the iterator, or each of a list of them, can be put at a position."""
    iterators = iterators_of(train_iterator)
    return bool(iterators) and all(
        hasattr(getattr(each, "iterable", None), "restore_state") for each in iterators
    )


def maybe_save_dataloader_state(
    model: list[MegatronModule] | MegatronModule,
    train_iterator: Any,
    iteration: int,
    dataloader_save_path: str | None = None,
    *,
    pg_collection: ProcessGroupCollection | None = None,
) -> None:
    """Save the data loader's position as ``<path>/iter_<N>/train_dataloader_dprank<R>.pt``.

    For each data-parallel rank the first of its tensor, pipeline and context groups writes. Files of an
    earlier save of the same iteration are removed first: they may come from more data-parallel ranks.
    Collective over the data-parallel group; a failure on one of its ranks is raised on all of them.

    Args:
        model: asked for the process groups if ``pg_collection`` is None.
        train_iterator: its ``iterable`` has ``save_state()``. A list holds one iterator for each virtual
            pipeline stage. None saves nothing.
        iteration: the iteration of the checkpoint.
        dataloader_save_path: root directory; None or "" saves nothing.
        pg_collection: process groups.

    Raises:
        RuntimeError: the iterator has no ``save_state``.
        CheckpointError: a rank could not save its state.
    """
    if not iterators_of(train_iterator) or not dataloader_save_path:
        return
    groups = pg_collection if pg_collection is not None else get_pg_collection(model)
    position = LoaderPosition(train_iterator, iteration, dataloader_save_path, groups)
    position.require_known()
    if not position.is_saved_here:
        return
    ranks = _data_parallel_ranks(groups.dp)
    ranks.agree(position.capture)
    ranks.decide(position.prepare)
    ranks.agree(position.write)


def maybe_load_dataloader_state(
    train_iterator: Any,
    iteration: int,
    dataloader_load_path: str | None = None,
    *,
    pg_collection: ProcessGroupCollection,
) -> None:
    """Put the data loader where it was at ``iteration``. Every rank restores its own.

    Nothing happens without an iterator that has ``iterable.restore_state``, without a path, and where no
    state was saved for this iteration: the data then starts from its beginning.

    Raises:
        RuntimeError: states were saved, but by fewer data-parallel ranks than there are now.
        UnsafeCheckpointError: the file holds more than plain data; nothing of it has been run.
    """
    if not dataloader_load_path or not file_exists(dataloader_load_path):
        return
    directory = get_checkpoint_name(dataloader_load_path, iteration)
    if not file_exists(directory):
        warn_rank_0(f"no dataloader state in {directory}: the data starts from its beginning")
        return
    _restore_dataloader(train_iterator, iteration, dataloader_load_path, pg_collection)


def _restore_dataloader(
    train_iterator: Any, iteration: int, root: str, pg_collection: Any, files: Any = ()
) -> None:
    if not can_restore_position(train_iterator):
        return
    iterables: list[Any] = [each.iterable for each in iterators_of(train_iterator)]
    path = position_file(root, iteration, rank_in(pg_collection.dp))
    directory, name = path.rsplit("/", 1)
    if not any(file_exists(join_paths(place, name)) for place in places_of(directory)):
        raise RuntimeError(
            f"{path} does not exist: the dataloader state was saved with a smaller data-parallel size. "
            "Resume with that size, or remove the directory to start the data from its beginning."
        )
    record = record_for(path, files)
    if record is not None and settings.verify_on_load():
        content = read_recorded(path, record)
    else:
        content = read_file(path, LARGEST_FILE)
    loaded = decode_object(content, path, verify=False)
    states = loaded.get(STATES_OF_STAGES) or [loaded[STATE]]
    if len(states) != len(iterables):
        # All stages read the same data, so any of the states will do.
        states = [loaded[STATE]] * len(iterables)
    for iterable, state in zip(iterables, states, strict=True):
        iterable.restore_state(state)


def resume_dataloader(
    state: Any,
    train_iterator: Any,
    checkpointing_context: dict[str, Any] | None = None,
    *,
    pg_collection: ProcessGroupCollection | None = None,
) -> None:
    """Put the data loader where the loaded checkpoint left it; called after ``load_checkpoint``. Collective.

    Args:
        state: GlobalState; nothing happens at step 0, where no run was resumed.
        train_iterator: as for ``save_checkpoint``.
        checkpointing_context: what ``load_checkpoint`` was given: it holds where the state lies, unless
            ``dataset.dataloader_load`` names another root ("" restores nothing).
        pg_collection: process groups; Megatron's own when None.

    Raises:
        RuntimeError: states were saved, but by fewer data-parallel ranks than there are now.
        UnsafeCheckpointError: a file holds more than plain data; nothing of it has been run.
        CheckpointCorruptError: a file is not what was saved with the checkpoint.
        CheckpointError: on the ranks that could read, naming the one that could not.
    """
    step = int(state.train_state.step)
    root = getattr(state.cfg.dataset, "dataloader_load", None)
    if root is None:
        root = (checkpointing_context or {}).get("dataloader_state_dir")
    if step <= 0 or root == "":
        return
    wants = can_restore_position(train_iterator)
    if root is None:
        if wants:
            warn_rank_0(
                "the position in the data is not restored: nobody says where it is. Pass the "
                "checkpointing_context of load_checkpoint, or set dataset.dataloader_load."
            )
        return
    # Rank 0 looks for the directory: the others would start their data anew where they do not see it yet.
    directory = get_checkpoint_name(root, step)
    if not on_rank_0(lambda: bool(places_of(directory))):
        if wants:
            warn_rank_0(f"no dataloader state in {directory}: the data starts from its beginning")
        return
    groups = pg_collection if pg_collection is not None else get_pg_collection([])
    files = (checkpointing_context or {}).get(FILES_KEY)
    on_all_ranks(lambda: _restore_dataloader(train_iterator, step, root, groups, files))
    if wants:
        note_rank_0(f"  position in the data restored from {directory}")
    else:
        warn_rank_0(
            f"the position in the data is not restored from {directory}: the train dataloader "
            f"{type(train_iterator).__name__} has no restore_state"
        )


def _data_parallel_ranks(group: Any) -> ControlGroup:
    """The ranks that save together: a process group, or this process alone where there is none."""
    alone = group is None or isinstance(group, SoloGroup) or not is_distributed()
    return ControlGroup.of_one() if alone else ControlGroup(group)


# --- Tokenizer -------------------------------------------------------------------------------------------


def save_tokenizer_assets(tokenizer: Any, tokenizer_config: TokenizerConfig, checkpoint_path: str) -> None:
    """Copy the tokenizer's files into ``<checkpoint_path>/tokenizer``: the checkpoint needs nothing else.

    Rank 0 acts, others return. A failure is logged and does not fail the save: the weights are worth more.

    Args:
        tokenizer: Hugging Face tokenizers save themselves; None saves nothing.
        tokenizer_config: says of which type it is and where the files of other types are.
        checkpoint_path: the iteration's directory.
    """
    if tokenizer is None or get_rank_safe() != 0:
        return
    directory = join_paths(checkpoint_path, TOKENIZER_DIR)
    try:
        if object_storage(directory):
            with tempfile.TemporaryDirectory(prefix="ckpt_fast_") as local:
                _collect(tokenizer, tokenizer_config, local)
                _upload(local, directory)
        else:
            ensure_directory_exists(directory, check_parent=False)
            _collect(tokenizer, tokenizer_config, directory)
            sync_files(directory)
    except Exception:
        logger.exception("cannot save the tokenizer to %s: the checkpoint is without it", directory)


def _collect(tokenizer: Any, config: Any, directory: str) -> None:
    """Put the files of the tokenizer into a local directory."""
    kind = getattr(config, "tokenizer_type", None)
    if kind in _HF_TOKENIZERS:
        # Megatron's wrappers keep the Hugging Face object under _tokenizer.
        inner = tokenizer if hasattr(tokenizer, "save_pretrained") else getattr(tokenizer, "_tokenizer", None)
        if inner is not None and hasattr(inner, "save_pretrained"):
            inner.save_pretrained(directory)
    for field, name in _TOKENIZER_FILES.get(kind or "", ()):
        source = getattr(config, field, None)
        if source and file_exists(source):
            _copy(source, os.path.join(directory, name))
        else:
            logger.debug("%s has no %s to copy: %r", kind, field, source)


def _copy(source: str, target: str) -> None:
    if not object_storage(source):
        shutil.copy2(source, target)
        return
    with open(target, "wb") as writer:
        writer.write(objects.read(source))


def _upload(local: str, directory: str) -> None:
    for name in sorted(os.listdir(local)):
        source = os.path.join(local, name)
        if os.path.isfile(source):
            with open(source, "rb") as reader:
                write_file(join_paths(directory, name), reader.read())
