# SPDX-License-Identifier: Apache-2.0
"""The parts of a checkpoint other than its tensors, and when a save handles them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.save.parts import Completion
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.storage.replacement import token_of
from ckpt_fast.trainer.save.loader_position import LoaderPosition
from ckpt_fast.trainer.save.publish import Publication
from ckpt_fast.trainer.save.run import SaveRun, dataloader_path
from ckpt_fast.trainer.save.target import SaveTarget


class Surroundings(NamedTuple):
    """The parts of a checkpoint other than its tensors, in the order in which they are handled.

    Attributes:
        position: of the data loader.
        publication: the files around the tensors, and the trackers.
    """

    position: LoaderPosition
    publication: Publication

    def completion(self, notes: Mapping[str, Any]) -> Completion:
        """The coordinator's work on these parts in a pipeline save.

        Args:
            notes: for the manifest, besides those of the run.
        """
        self.publication.notes.update(notes)
        return Completion(
            prepare=lambda directory: self.position.prepare(token_of(directory)),
            finish=self.publication.complete,
            notes=self.publication.notes,
            select=self._select,
        )

    def write_position(self, directory: str) -> list[FileRecord]:
        """Local. Along with the tensors, whose files are in ``directory``."""
        return self.position.write(token_of(directory))

    def save_position(self) -> None:
        """Collective. For formats that do not save it along with the tensors."""
        group = ControlGroup()
        token = group.decide(self.position.prepare_alone)
        group.agree(lambda: self.position.write(token))

    def publish(self) -> None:
        """Collective. For formats that do not do it along with the seal."""
        ControlGroup().decide(self._select)

    def _select(self) -> None:
        self.position.take_place()
        self.publication.publish()


def surroundings_of(run: SaveRun, target: SaveTarget, flops: int) -> Surroundings:
    """The surroundings of one save."""
    return Surroundings(
        LoaderPosition(run.iterator, target.step, dataloader_path(run), run.pg_collection),
        Publication(run.state, target.checkpoint_name, target.save_dir, flops, is_local=target.is_local),
    )
