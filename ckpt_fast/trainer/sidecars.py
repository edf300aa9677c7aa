# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint carries beside the model: the position of the data loader, the tokenizer's files."""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ckpt_fast import settings
from ckpt_fast.megatron import SoloGroup, get_pg_collection, object_storage
from ckpt_fast.pipeline.commit import make_directory
from ckpt_fast.pipeline.encode import file_record
from ckpt_fast.pipeline.group import ControlGroup
from ckpt_fast.pipeline.small_files import LARGEST_FILE
from ckpt_fast.pipeline.types import FileRecord
from ckpt_fast.trainer.data_position import FILES_KEY, record_for, require_content
from ckpt_fast.trainer.inert_load import inert_load
from ckpt_fast.trainer.paths import (
    ensure_directory_exists,
    file_exists,
    get_checkpoint_name,
    join_paths,
    read_file,
    sync_files,
    write_file,
)
from ckpt_fast.trainer.ranks import get_rank_safe, is_distributed, on_all_ranks, on_rank_0, print_rank_0

if TYPE_CHECKING:
    from ckpt_fast.config import TokenizerConfig
    from ckpt_fast.megatron import MegatronModule, ProcessGroupCollection

logger = logging.getLogger(__name__)
T = TypeVar("T")

_STATE = "dataloader_state_dict"
_STATES_OF_STAGES = "dataloader_state_dicts"
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


def can_save_position(train_iterator: Any) -> bool:
    """Whether the iterator, or each of a list of them, can give its position."""
    iterators = _iterators(train_iterator)
    return bool(iterators) and all(
        hasattr(getattr(each, "iterable", None), "save_state") for each in iterators
    )


def can_restore_position(train_iterator: Any) -> bool:
    """Whether the iterator, or each of a list of them, can be put at a position."""
    iterators = _iterators(train_iterator)
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
    if not _iterators(train_iterator) or not dataloader_save_path:
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


class LoaderPosition:
    """The data loader's position on its way beside a checkpoint. All methods are local.

    Args:
        train_iterator: see ``maybe_save_dataloader_state``.
        iteration: the iteration of the checkpoint.
        root: where positions are saved; None or "": nowhere.
        groups: process groups. The first ranks of the tensor, pipeline and context groups save.

    Attributes:
        records: what this rank saves, by the name of the file and that of its directory; known once it is
            captured.
    """

    def __init__(self, train_iterator: Any, iteration: int, root: str | None, groups: Any) -> None:
        self.records: list[FileRecord] = []
        self._iterator, self._iteration, self._root = train_iterator, iteration, root
        self._content = b""
        self.is_saved_here = bool(_iterators(train_iterator) and root) and all(
            _rank_in(getattr(groups, name, None)) == 0 for name in ("tp", "pp", "cp")
        )
        self._path = _dataloader_file(root, iteration, _rank_in(groups.dp)) if root else ""

    def require_known(self) -> None:
        """Raise RuntimeError if there is an iterator that cannot tell its position."""
        if _iterators(self._iterator) and self._root and not can_save_position(self._iterator):
            raise RuntimeError(
                f"Could not find a save_state in the train dataloader {type(self._iterator).__name__}; give "
                "its iterable a save_state method or unset dataset.dataloader_save"
            )

    def capture(self) -> None:
        """Take the position as it is now; RuntimeError as in ``require_known``."""
        self.require_known()
        if not self.is_saved_here:
            return
        print_rank_0(f"saving dataloader checkpoint at iteration {self._iteration} to {self._root}")
        states = [each.iterable.save_state() for each in _iterators(self._iterator)]
        self._content = _serialise(states)
        name = "/".join(self._path.rsplit("/", 2)[-2:])
        self.records = [file_record(name, self._content)]

    def prepare(self) -> None:
        """For one rank: remove what an earlier save of the iteration, maybe by more ranks, has left."""
        if self.records:
            _prepare_directory(os.path.dirname(self._path))

    def write(self) -> list[FileRecord]:
        """Write what was captured, durably; returns ``records``."""
        if self.records:
            write_file(self._path, self._content)
        return self.records


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
        RefusedPickleError: the file holds more than plain data; nothing of it has been run.
    """
    if not dataloader_load_path or not file_exists(dataloader_load_path):
        return
    directory = get_checkpoint_name(dataloader_load_path, iteration)
    if not file_exists(directory):
        print_rank_0(f"WARNING: no dataloader state in {directory}: the data starts from its beginning")
        return
    _restore_dataloader(train_iterator, iteration, dataloader_load_path, pg_collection)


def _restore_dataloader(
    train_iterator: Any, iteration: int, root: str, pg_collection: Any, files: Any = ()
) -> None:
    if not can_restore_position(train_iterator):
        return
    iterables: list[Any] = [each.iterable for each in _iterators(train_iterator)]
    path = _dataloader_file(root, iteration, _rank_in(pg_collection.dp))
    if not file_exists(path):
        raise RuntimeError(
            f"{path} does not exist: the dataloader state was saved with a smaller data-parallel size. "
            "Resume with that size, or remove the directory to start the data from its beginning."
        )
    content = read_file(path, LARGEST_FILE)
    record = record_for(path, files)
    if record is not None and settings.verify_on_load():
        require_content(path, content, record)
    loaded = inert_load(io.BytesIO(content))
    states = loaded.get(_STATES_OF_STAGES) or [loaded[_STATE]]
    if len(states) != len(iterables):
        # All stages read the same data, so any of the states will do.
        states = [loaded[_STATE]] * len(iterables)
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
        RefusedPickleError: a file holds more than plain data; nothing of it has been run.
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
            print_rank_0(
                "WARNING: the position in the data is not restored: nobody says where it is. Pass the "
                "checkpointing_context of load_checkpoint, or set dataset.dataloader_load."
            )
        return
    # Rank 0 looks for the directory: the others would start their data anew where they do not see it yet.
    directory = get_checkpoint_name(root, step)
    if not on_rank_0(lambda: file_exists(directory)):
        if wants:
            print_rank_0(f"WARNING: no dataloader state in {directory}: the data starts from its beginning")
        return
    groups = pg_collection if pg_collection is not None else get_pg_collection([])
    files = (checkpointing_context or {}).get(FILES_KEY)
    on_all_ranks(lambda: _restore_dataloader(train_iterator, step, root, groups, files))
    if wants:
        print_rank_0(f"  position in the data restored from {directory}")
    else:
        print_rank_0(
            f"WARNING: the position in the data is not restored from {directory}: the train dataloader "
            f"{type(train_iterator).__name__} has no restore_state"
        )


def _iterators(train_iterator: Any) -> list[Any]:
    several = isinstance(train_iterator, (list, tuple))
    return [each for each in (train_iterator if several else [train_iterator]) if each is not None]


def _rank_in(group: Any) -> int:
    """0 where a program has no such group."""
    return 0 if group is None else int(group.rank())


def _dataloader_file(root: str, iteration: int, data_parallel_rank: int) -> str:
    name = f"train_dataloader_dprank{data_parallel_rank:03d}.pt"
    return join_paths(get_checkpoint_name(root, iteration), name)


def _serialise(states: list[Any]) -> bytes:
    content = {_STATE: states[0]}
    if len(states) > 1:
        content[_STATES_OF_STAGES] = states
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _prepare_directory(directory: str) -> None:
    storage = object_storage(directory)
    if storage:
        if storage.os.path.isdir(directory):
            storage.delete(directory, recursive=True)
        return
    if os.path.isdir(directory):
        shutil.rmtree(directory)
    make_directory(directory)


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
    storage = object_storage(source)
    if not storage:
        shutil.copy2(source, target)
        return
    with storage.open(source, "rb") as reader, open(target, "wb") as writer:
        shutil.copyfileobj(reader, writer)


def _upload(local: str, directory: str) -> None:
    for name in sorted(os.listdir(local)):
        source = os.path.join(local, name)
        if os.path.isfile(source):
            with open(source, "rb") as reader:
                write_file(join_paths(directory, name), reader.read())
