# SPDX-License-Identifier: Apache-2.0
"""Configurations as YAML: they round-trip, any object can be in them, and no file can run code."""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from ckpt_fast.config import CheckpointConfig, ConfigContainer, LoggerConfig, RNGConfig, TokenizerConfig
from ckpt_fast.errors import CheckpointMismatchError, CheckpointWriteError, UnsafeCheckpointError
from ckpt_fast.run import config_targets, config_yaml
from ckpt_fast.run.config_targets import ForeignConfig, register_config_target


@dataclasses.dataclass
class UserConfig:
    """A class defined by the user's program, outside the allowed packages."""

    depth: int = 1
    parts: list = dataclasses.field(default_factory=list)
    shape: tuple[int, ...] = ()
    tags: set[str] | None = None
    computed: int = dataclasses.field(init=False, default=0)
    _hidden: int = 5

    def __post_init__(self):
        self.computed = self.depth * 2


class Colour(enum.Enum):
    RED = "red"


def megatron_config() -> ConfigContainer:
    model = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        bf16=True,
        params_dtype=torch.bfloat16,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        attention_backend=AttnBackend.flash,
    )
    return ConfigContainer(
        model=model,
        optimizer=OptimizerConfig(lr=1e-3, bf16=True),
        ddp=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer"),
        checkpoint=CheckpointConfig(save="/ckpt", most_recent_k=2),
        rng=RNGConfig(seed=7),
    )


def differing_fields(one, other) -> list[str]:
    names = [field.name for field in dataclasses.fields(one)]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def test_megatron_objects_survive_a_round_trip(tmp_path):
    cfg, path = megatron_config(), str(tmp_path / "run_config.yaml")
    cfg.to_yaml(path)
    back = ConfigContainer.from_yaml(path)
    assert back.checkpoint == cfg.checkpoint
    assert back.optimizer == cfg.optimizer
    assert back.ddp == cfg.ddp
    assert differing_fields(back, cfg) == ["model"]
    # Partials do not define equality.
    for name in differing_fields(back.model, cfg.model):
        mine, theirs = getattr(cfg.model, name), getattr(back.model, name)
        assert (mine.func, mine.args, mine.keywords) == (theirs.func, theirs.args, theirs.keywords), name
    assert back.model.params_dtype is torch.bfloat16
    assert back.model.activation_func is torch.nn.functional.silu
    assert back.model.attention_backend is AttnBackend.flash


def test_writing_again_gives_the_same_text(tmp_path):
    text = config_yaml.to_yaml(megatron_config())
    (tmp_path / "c.yaml").write_text(text)
    assert config_yaml.to_yaml(ConfigContainer.from_yaml(str(tmp_path / "c.yaml"))) == text


def test_plain_readers_find_what_they_look_for(tmp_path):
    path = str(tmp_path / "run_config.yaml")
    megatron_config().to_yaml(path)
    content = yaml.safe_load(Path(path).read_text())
    assert content["_target_"] == "ckpt_fast.config.ConfigContainer"
    assert content["model"]["tensor_model_parallel_size"] == 1
    target = "megatron.core.transformer.transformer_config.TransformerConfig"
    assert content["model"]["_target_"] == target
    assert content["model"]["params_dtype"] == {"_target_": "torch.bfloat16", "_call_": False}
    assert content["model"]["attention_backend"]["_args_"] == [AttnBackend.flash.value]
    assert content["model"]["init_method"]["_partial_"] is True
    assert content["checkpoint"]["save"] == "/ckpt"


def test_megatron_lms_reader_builds_our_entries():
    pytest.importorskip("omegaconf")
    reader = pytest.importorskip("megatron.training.config.instantiate_utils")
    content = yaml.safe_load(config_yaml.to_yaml(megatron_config()))
    model = reader.instantiate(content["model"])
    assert model.params_dtype is torch.bfloat16
    assert model.attention_backend is AttnBackend.flash
    assert model.activation_func is torch.nn.functional.silu
    assert model.init_method.func is torch.nn.init.normal_


def test_to_dict_keeps_leaves():
    cfg = megatron_config()
    described = cfg.to_dict()
    assert described["model"]["params_dtype"] is torch.bfloat16
    assert described["optimizer"]["_target_"].endswith("OptimizerConfig")
    assert ConfigContainer.from_dict(described) == cfg


def test_private_fields_are_left_out_and_computed_ones_are_not():
    described = config_yaml.to_dict(UserConfig(depth=3))
    assert "_hidden" not in described
    assert described["computed"] == 6


class Unrepresentable:
    def __repr__(self):
        raise RuntimeError("no repr")


def test_any_object_can_be_written(tmp_path, caplog):
    cycle: list = [1]
    cycle.append(cycle)
    odd = {
        "object": Unrepresentable(),
        "function": lambda x: x,
        "tensor": torch.ones(3, 2),
        "array": np.arange(3),
        "cycle": cycle,
        "stream": open(os.devnull),  # noqa: SIM115
        ("tuple", "key"): 1,
        Colour.RED: 2,
    }
    path = str(tmp_path / "c.yaml")
    ConfigContainer(dataset=odd).to_yaml(path)
    odd["stream"].close()
    written = yaml.safe_load(Path(path).read_text())["dataset"]
    assert written["object"]["_type_"].endswith("Unrepresentable")
    assert written["tensor"]["_repr_"] == "tensor of shape (3, 2), torch.float32"
    with caplog.at_level(logging.WARNING):
        back = ConfigContainer.from_yaml(path).dataset
    assert back["object"] is back["function"] is back["array"] is None
    assert back["cycle"] == [1, None]
    assert back["('tuple', 'key')"] == 1
    assert "Unrepresentable" in caplog.text


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.5),
        np.int32(4),
        True,
        None,
        b"\x00\xff",
        "multi\nline: {yaml}",
        "\udc80 undecodable",
        "\x85 next line \u2028 separator",
        float("inf"),
        1e-30,
        torch.float8_e4m3fn,
        AttnBackend.fused,
        torch.nn.functional.gelu,
        torch.tanh,
        torch.nn.Linear,
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_values_come_back(value, tmp_path):
    path = str(tmp_path / "c.yaml")
    ConfigContainer(dataset={"value": value}).to_yaml(path)
    assert ConfigContainer.from_yaml(path).dataset["value"] == value


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet="abc", min_size=1), inner),
    max_leaves=20,
)


@settings(max_examples=100)
@given(plain)
def test_plain_data_comes_back(value):
    text = config_yaml.to_yaml(ConfigContainer(dataset={"value": value}))
    assert config_yaml.from_dict(ConfigContainer, yaml.safe_load(text)).dataset == {"value": value}


def test_hugging_face_configurations_come_back():
    transformers = pytest.importorskip("transformers")
    generation = transformers.GenerationConfig(max_new_tokens=7, temperature=0.5)
    described = yaml.safe_load(config_yaml.to_yaml(ConfigContainer(model={"generation": generation})))
    assert described["model"]["generation"]["_target_"].endswith(".GenerationConfig.from_dict")
    back = config_yaml.from_dict(ConfigContainer, described).model["generation"]
    assert back.to_dict() == generation.to_dict()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        ConfigContainer.from_yaml(str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize("content", ["", "- 1\n", "_target_: ckpt_fast.config.CheckpointConfig\n"])
def test_files_that_are_not_containers(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(CheckpointMismatchError):
        ConfigContainer.from_yaml(str(tmp_path / "c.yaml"))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = str(tmp_path / "c.yaml")
    ConfigContainer(rng=RNGConfig(seed=1)).to_yaml(path)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        ConfigContainer(rng=RNGConfig(seed=2)).to_yaml(path)
    assert ConfigContainer.from_yaml(path).rng.seed == 1
    assert os.listdir(tmp_path) == ["c.yaml"]


def test_fields_of_other_versions_are_ignored(caplog):
    described = {"checkpoint": {"_target_": "ckpt_fast.config.CheckpointConfig", "save": "x", "future": 1}}
    with caplog.at_level(logging.WARNING):
        assert ConfigContainer.from_dict(described).checkpoint == CheckpointConfig(save="x")
    assert "future" in caplog.text


# --- Files of Megatron Bridge ----------------------------------------------------------------------------

BRIDGE_FILE = """
_target_: megatron.bridge.training.config.ConfigContainer
checkpoint:
  _target_: megatron.bridge.training.config.CheckpointConfig
  save: /ckpt
  async_save: false
tokenizer:
  _target_: megatron.bridge.training.tokenizers.config.TokenizerConfig
  tokenizer_type: NullTokenizer
  vocab_size: 128
logger:
  _target_: megatron.bridge.training.config.LoggerConfig
  log_progress: true
model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  num_layers: 2
  params_dtype: {_target_: torch.bfloat16, _call_: false}
"""


def test_bridges_file_gives_our_objects(tmp_path):
    (tmp_path / "c.yaml").write_text(BRIDGE_FILE)
    cfg = ConfigContainer.from_yaml(str(tmp_path / "c.yaml"))
    assert cfg.checkpoint == CheckpointConfig(save="/ckpt")
    assert cfg.tokenizer == TokenizerConfig(tokenizer_type="NullTokenizer")
    assert cfg.logger == LoggerConfig(log_progress=True)
    assert isinstance(cfg.model, ForeignConfig)
    assert cfg.model.params_dtype is torch.bfloat16
    described = yaml.safe_load(config_yaml.to_yaml(cfg))
    assert described["model"] == yaml.safe_load(BRIDGE_FILE)["model"]


# --- Hostile files ---------------------------------------------------------------------------------------


def hostile(entry):
    return ConfigContainer.from_dict({"dataset": {"x": entry}})


@pytest.mark.parametrize(
    "entry",
    [
        {"_target_": "os.system", "_args_": ["touch PWNED"]},
        {"_target_": "os.system", "_partial_": True, "_args_": ["touch PWNED"]},
        {"_target_": "os.system", "_call_": False},
        {"_target_": "builtins.eval", "_args_": ["1"]},
        {"_target_": "subprocess.Popen", "_args_": [["touch", "PWNED"]]},
        # Reach someone else's function or class through an allowed package.
        {"_target_": "torch.os.system", "_partial_": True, "_args_": ["touch PWNED"]},
        {"_target_": "torch.nn.functional.math.sqrt", "_call_": False},
        {"_target_": "torch.utils.cpp_extension.subprocess.Popen", "args": ["touch", "PWNED"]},
        {"_target_": "ckpt_fast.run.config_yaml.os.system", "_call_": False},
        # In an allowed package, but nothing that a configuration needs.
        {"_target_": "torch.load", "_partial_": True, "f": "x"},
        {"_target_": "torch.hub.load", "_call_": False},
        {"_target_": "torch.package.PackageExporter", "f": "PWNED"},
        {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1},
        {"_target_": "ckpt_fast.storage.commit.invalidate", "_partial_": True, "directory": "/"},
        {"_target_": "torch.serialization._open_file", "name": "PWNED", "mode": "w"},
        {"_target_": "torch..load", "_call_": False},
        {"_target_": "transformers.pipeline.from_dict"},
    ],
    ids=lambda entry: entry["_target_"],
)
def test_hostile_targets_are_refused(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    if entry["_target_"].startswith("transformers."):
        pytest.importorskip("transformers")
    with pytest.raises(UnsafeCheckpointError, match="register_config_target"):
        hostile(entry)
    assert os.listdir(tmp_path) == []


def test_refusal_comes_before_the_import():
    with pytest.raises(UnsafeCheckpointError):
        hostile({"_target_": "antigravity.Thing"})
    assert "antigravity" not in sys.modules


def test_yaml_tags_are_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("dataset: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(yaml.YAMLError):
        ConfigContainer.from_yaml(str(tmp_path / "c.yaml"))


def test_target_that_is_not_a_name():
    with pytest.raises(CheckpointMismatchError, match="not a dotted name"):
        hostile({"_target_": ["os", "system"]})


def test_missing_fields_are_named():
    with pytest.raises(CheckpointMismatchError, match=r"CallbackContext cannot be built.*'model'"):
        hostile({"_target_": "ckpt_fast.callbacks.CallbackContext", "state": None})


def test_registered_packages_are_built(monkeypatch):
    value = UserConfig(depth=4, parts=[Colour.RED], shape=(1, 2), tags={"a", "b"})
    entry = yaml.safe_load(config_yaml.to_yaml(value))
    with pytest.raises(UnsafeCheckpointError, match="not allowed"):
        hostile(entry)
    monkeypatch.setattr(config_targets, "_CLASS_PREFIXES", list(config_targets._CLASS_PREFIXES))
    monkeypatch.setattr(config_targets, "_FUNCTION_PREFIXES", list(config_targets._FUNCTION_PREFIXES))
    register_config_target(f"{__name__}.")
    assert hostile(entry).dataset["x"] == value
    assert hostile({"_target_": f"{__name__}.Colour", "_args_": ["red"]}).dataset["x"] is Colour.RED
    text = config_yaml.to_yaml(functools.partial(differing_fields, one=1))
    assert hostile(yaml.safe_load(text)).dataset["x"].keywords == {"one": 1}


@pytest.mark.parametrize("prefix", ["mypackage", "", ".", "a b."])
def test_prefixes_end_in_a_dot(prefix):
    with pytest.raises(ValueError, match="followed by a dot"):
        register_config_target(prefix)


def test_objects_that_describe_themselves():
    described = config_yaml.to_dict(SimpleNamespace(as_dict=lambda: {"a": [RNGConfig(seed=2)]}))
    assert described["a"][0]["seed"] == 2
