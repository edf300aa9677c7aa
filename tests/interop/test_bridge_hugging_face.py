# SPDX-License-Identifier: Apache-2.0
"""Hugging Face weights converted by Megatron Bridge itself, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import get_megatron_optimizer

from tests.helpers import run_ranks
from tests.interop.bridge_on_cpu import load_auto_bridge
from tests.models import VOCABULARY, Run, Setup, differences, identical, megatron_on_cpu, other

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="needs megatron-bridge: make test-bridge"
)

SETUP = Setup(tp=2)


def save_a_llama(directory: Path) -> None:
    """Save a small, untrained transformers model, with a tokenizer that knows numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words = WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="0").save_pretrained(directory)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from transformers import LlamaForCausalLM

    return dict(LlamaForCausalLM.from_pretrained(directory).state_dict())


def take_bridges_model(run: Run, source: str) -> None:
    """Give the run the model that Bridge builds for ``source``, from layers without Transformer Engine."""
    provider = load_auto_bridge().from_hf_pretrained(source).to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = run.setup.tp
    provider.use_cpu_initialization = True
    provider.bf16 = provider.fp16 = False
    provider.params_dtype = provider.pipeline_dtype = torch.float32
    provider.persist_layer_norm = provider.apply_rope_fusion = False
    provider.bias_activation_fusion = provider.bias_dropout_fusion = False
    provider.masked_softmax_fusion = False
    provider.finalize_model_grads_func = run.model[0].config.finalize_model_grads_func
    provider.transformer_layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    provider.finalize()
    with megatron_on_cpu():
        gpt = provider.provide(pre_process=True, post_process=True)
        run.model = [DistributedDataParallel(run.model[0].config, run.model[0].ddp_config, gpt)]
        run.optimizer = get_megatron_optimizer(run.state.cfg.optimizer, run.model)
        run.scheduler.optimizer = run.optimizer


def start_train_and_save(rank: int, source: str, root: str) -> dict[str, Any]:
    export = {"also_save_hf_checkpoint": True, "hf_source_path": source}
    # Bridge also asks for the current GPU.
    with megatron_on_cpu(), Run(SETUP, save=root, pretrained_checkpoint=source, **export) as run:
        take_bridges_model(run, source)
        found: dict[str, Any] = {"started": run.load()}
        run.save()
        run.train(1)
        run.save()
        trained = run.fingerprint()
    with megatron_on_cpu(), Run(other(SETUP), pretrained_checkpoint=f"{root}/iter_0000001/hf") as run:
        take_bridges_model(run, source)
        run.load()
        wrong = differences(trained, run.fingerprint())
        found["from copy"] = [name for name in wrong if name.startswith("model.")]
    with Run(other(SETUP), load=root) as run:
        take_bridges_model(run, source)
        run.load()
        found["resumed"] = differences(trained, run.fingerprint())
    return found


def test_a_run_starts_from_and_exports_hugging_face_weights(tmp_path: Path) -> None:
    source, root = tmp_path / "llama", tmp_path / "run"
    save_a_llama(source)
    for found in run_ranks(start_train_and_save, 2, str(source), str(root), timeout_s=300):
        assert found == {"started": (0, 0), "from copy": [], "resumed": []}
    start = weights(source)
    assert identical(weights(root / "iter_0000000/hf"), start)
    trained = weights(root / "iter_0000001/hf")
    assert [name for name in start if identical(start[name], trained[name])] == []
