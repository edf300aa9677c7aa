# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with FSDP2, which saves through Accelerate. The script knows nothing of ckpt_fast:

    torchrun --nproc-per-node 2 -m ckpt_fast.run examples/frameworks/transformers_trainer.py --directory ckpt

Run it again, and it continues where it stopped.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from tiny import options, report
from transformers.trainer_utils import get_last_checkpoint


class Trainer(transformers.Trainer):
    """The Trainer, sharding without a GPU as well, and printing each rank's loss."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Accelerate takes the plugin where there is an accelerator, and drops it elsewhere.
        state = self.accelerator.state
        if state.distributed_type is DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        report(self.state.global_step + 1, loss)
        return loss


def main() -> None:
    arguments = options(__doc__)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    path = get_last_checkpoint(arguments.directory)
    done = int(path.rpartition("-")[2]) if path else 0
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(1)
    settings = transformers.TrainingArguments(
        output_dir=str(arguments.directory),
        max_steps=done + arguments.steps,
        per_device_train_batch_size=4,
        save_steps=2,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        fsdp=True,
        fsdp_config={
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        },
    )
    tokens = torch.randint(64, (4096, 16), generator=torch.Generator().manual_seed(2))
    examples = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(transformers.LlamaForCausalLM(config), settings, train_dataset=examples).train(path)


if __name__ == "__main__":
    main()
