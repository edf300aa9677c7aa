# SPDX-License-Identifier: Apache-2.0
"""Lightning's Trainer with FSDP2. The script knows nothing of ckpt_fast:

    torchrun --nproc-per-node 2 -m ckpt_fast.run examples/frameworks/lightning_trainer.py --directory ckpt

Run it again, and it continues where it stopped.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import batch, layers, newest, options, report
from torch.distributed.fsdp import fully_shard


class Module(lightning.LightningModule):
    def configure_model(self) -> None:
        if hasattr(self, "layers"):
            return
        self.layers = layers()
        mesh = self.device_mesh["data_parallel"]
        for layer in self.layers:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.layers, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def training_step(self, _: Any) -> torch.Tensor:
        step = self.global_step + 1
        loss = self.layers(batch(step, self.global_rank)).pow(2).mean()
        report(step, loss)
        return loss


def main() -> None:
    arguments = options(__doc__)
    path = newest(arguments.directory)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(),
        max_steps=arguments.steps + (int(path.stem) if path else 0),
        callbacks=[
            ModelCheckpoint(
                arguments.directory,
                "{step}",
                every_n_train_steps=2,
                save_top_k=-1,
                auto_insert_metric_name=False,
            )
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(range(10_000)), ckpt_path=path)


if __name__ == "__main__":
    main()
