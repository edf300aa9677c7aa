# SPDX-License-Identifier: Apache-2.0
"""CheckpointConfig and ConfigContainer: documented defaults, and combinations that are refused."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckpt_fast import compat, config
from ckpt_fast.config import CheckpointConfig, ConfigContainer, DistributedInitConfig, LoggerConfig
from ckpt_fast.run import config_checks
from ckpt_fast.run.config_checks import UNUSED, warn_of_unused

# Where Megatron Bridge's default differs from that of Megatron-LM, whose class it extends.
BRIDGE_DEFAULTS = {"use_persistent_ckpt_worker": True, "strict_fsdp_dtensor_load": False}


def test_defaults():
    cfg = CheckpointConfig()
    assert (cfg.save, cfg.load, cfg.most_recent_k, cfg.ckpt_format) == (None, None, -1, "torch_dist")
    assert cfg.save_optim and cfg.load_optim and cfg.save_rng and cfg.load_rng and cfg.fully_parallel_save
    assert (cfg.on_corrupt, cfg.on_save_error, cfg.verify_on_load) == ("fallback", "raise", None)
    cfg.finalize()


def test_fields_are_keyword_only():
    with pytest.raises(TypeError):
        CheckpointConfig("/somewhere")


def test_has_every_field_of_megatron_lm():
    theirs = pytest.importorskip("megatron.training.config").CheckpointConfig
    ours = {field.name: field.default for field in dataclasses.fields(CheckpointConfig)} | BRIDGE_DEFAULTS
    for field in dataclasses.fields(theirs):
        if field.name == "stream_ckpt_dequant":  # newer than the documented API
            continue
        assert ours[field.name] == BRIDGE_DEFAULTS.get(field.name, field.default), field.name


def test_strategy_is_mcore_unless_saving_in_the_background():
    assert CheckpointConfig().async_strategy == "mcore"
    assert CheckpointConfig(async_save=True, save="x").async_strategy == "nvrx"
    later = CheckpointConfig()
    later.async_save = True
    assert later.async_strategy == "mcore"


def test_unknown_strategy():
    with pytest.raises(AssertionError, match="async_strategy='zmq'"):
        CheckpointConfig(async_strategy="zmq")


@pytest.mark.skipif(not compat.HAVE_NVRX, reason="nvrx is not installed")
def test_fsdp_dtensor_in_the_background_with_nvrx():
    assert CheckpointConfig(async_save=True, ckpt_format="fsdp_dtensor").async_strategy == "nvrx"


def test_verify_integrity_needs_torch_dist():
    with pytest.raises(AssertionError, match="verify_integrity"):
        CheckpointConfig(verify_integrity=True, ckpt_format="fsdp_dtensor")


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (
            {"pretrained_checkpoint": "/no/such"},
            AssertionError,
            "Pretrained checkpoint /no/such does not exist",
        ),
        (
            {"load_main_params_from_ckpt": True},
            AssertionError,
            "load_main_params_from_ckpt must be used with load_optim=False",
        ),
        ({"async_save": True}, AssertionError, "async_save is enabled, but save is not set"),
        (
            {"async_save": True, "save": "x", "use_persistent_ckpt_worker": False},
            AssertionError,
            "async_save requires use_persistent_ckpt_worker=True",
        ),
        (
            {"also_save_hf_checkpoint": True, "ckpt_format": "fsdp_dtensor"},
            ValueError,
            "also_save_hf_checkpoint=True is not supported",
        ),
        (
            {"also_save_hf_checkpoint": True, "non_persistent_ckpt_type": "local"},
            ValueError,
            "is not compatible",
        ),
        ({"ckpt_step": 7}, ValueError, "ckpt_step=7 specified but checkpoint.load is None"),
        ({"ckpt_step": 7}, ValueError, "Please set checkpoint.load to the base checkpoint directory"),
        (
            {
                "dist_ckpt_optim_fully_reshardable": True,
                "distrib_optim_fully_reshardable_mem_efficient": True,
            },
            AssertionError,
            "gloo",
        ),
        ({"on_corrupt": "ignore"}, ValueError, "fallback, raise"),
        ({"on_save_error": "ignore"}, ValueError, "raise, warn"),
    ],
)
def test_finalize_refuses(fields, kind, message):
    with pytest.raises(kind, match=message):
        CheckpointConfig(**fields).finalize()


def test_finalize_accepts_and_can_be_repeated(tmp_path):
    cfg = CheckpointConfig(
        save="x",
        load="x",
        ckpt_step=3,
        async_save=True,
        pretrained_checkpoint=str(tmp_path),
        load_optim=False,
    )
    cfg.finalize()
    cfg.finalize()


def test_container_needs_nothing():
    cfg = ConfigContainer()
    cfg.validate()
    assert cfg.checkpoint == CheckpointConfig()
    assert cfg.model is None


def fsdp(use_megatron_fsdp=True):
    return SimpleNamespace(use_megatron_fsdp=use_megatron_fsdp)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"checkpoint": CheckpointConfig(save="x"), "ddp": fsdp()},
            "Megatron-FSDP requires the fsdp_dtensor checkpointing format",
        ),
        (
            {"checkpoint": CheckpointConfig(load="x", ckpt_format="fsdp_dtensor")},
            "fsdp_dtensor checkpoint format only supports Megatron FSDP",
        ),
        (
            {
                "checkpoint": CheckpointConfig(load="x", ckpt_format="fsdp_dtensor"),
                "ddp": fsdp(),
                "dist": DistributedInitConfig(use_torch_fsdp2=True),
            },
            "only supports Megatron FSDP",
        ),
        (
            {"checkpoint": CheckpointConfig(save="x", async_save=True, ckpt_format="torch")},
            "async_save requires ckpt_format",
        ),
        (
            {
                "checkpoint": CheckpointConfig(ckpt_format="torch"),
                "dist": DistributedInitConfig(use_gloo_process_groups=False),
                "optimizer": SimpleNamespace(use_distributed_optimizer=True),
            },
            "without gloo process groups",
        ),
        ({"peft": SimpleNamespace()}, "PEFT requires checkpoint.pretrained_checkpoint"),
        ({"checkpoint": CheckpointConfig(also_save_hf_checkpoint=True)}, "requires an HF source"),
        (
            {
                "checkpoint": CheckpointConfig(non_persistent_ckpt_type="global"),
                "model": SimpleNamespace(restore_modelopt_state=True),
            },
            "restore_modelopt_state",
        ),
    ],
)
def test_validate_refuses(parts, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        ConfigContainer(**parts).validate()


def test_megatron_fsdp_needs_free_cuda_connections(monkeypatch):
    checkpoint = CheckpointConfig(save="x", ckpt_format="fsdp_dtensor")
    cfg = ConfigContainer(checkpoint=checkpoint, ddp=fsdp())
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    cfg.validate()
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(AssertionError, match="CUDA_DEVICE_MAX_CONNECTIONS"):
        cfg.validate()


@pytest.mark.parametrize(
    "source",
    [
        {"checkpoint": CheckpointConfig(also_save_hf_checkpoint=True, hf_source_path="a/b")},
        {
            "checkpoint": CheckpointConfig(also_save_hf_checkpoint=True),
            "model": SimpleNamespace(hf_model_id="a/b"),
        },
        {
            "checkpoint": CheckpointConfig(also_save_hf_checkpoint=True),
            "tokenizer": SimpleNamespace(tokenizer_model="a/b"),
        },
    ],
)
def test_hf_copy_with_a_source(source):
    ConfigContainer(**source).validate()


@pytest.mark.parametrize(("save", "expected"), [("/ckpt", "/ckpt"), (None, ".")])
def test_validate_fills_the_tensor_inspection_directory(save, expected):
    cfg = ConfigContainer(
        checkpoint=CheckpointConfig(save=save), tensor_inspect=SimpleNamespace(log_dir=None)
    )
    cfg.validate()
    assert cfg.tensor_inspect.log_dir == expected


def test_logger_config_names_missing_packages():
    LoggerConfig().finalize()
    for option, package in (("mlflow_experiment", "mlflow"), ("comet_project", "comet_ml")):
        try:
            __import__(package)
        except ImportError:
            with pytest.raises(ModuleNotFoundError, match=f"{option}.*{package}"):
                LoggerConfig(**{option: "x"}).finalize()
    with pytest.raises(ValueError, match="wandb_exp_name"):
        LoggerConfig(wandb_project="x").finalize()


def test_secrets_stay_where_they_are(tmp_path):
    cfg = ConfigContainer(logger=LoggerConfig(comet_api_key="s3cret"))
    cfg.to_yaml(str(tmp_path / "run_config.yaml"))
    assert "s3cret" not in repr(cfg) + str(cfg.to_dict()) + (tmp_path / "run_config.yaml").read_text()


# --- Fields without effect ---------------------------------------------------------------------------------


def other_value(field):
    """Return a value that is not the default."""
    return not field.default if isinstance(field.default, bool) else 77


def docstrings():
    """Return each field of CheckpointConfig with the string that follows it."""
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(config)).body
        if isinstance(node, ast.ClassDef) and node.name == "CheckpointConfig"
    )
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def test_the_fields_without_effect_say_so():
    documented = docstrings()
    assert set(documented) == {field.name for field in dataclasses.fields(CheckpointConfig)}
    assert {name for name, text in documented.items() if "No effect here" in text} == set(UNUSED)


def test_nothing_reads_the_fields_without_effect():
    for path in Path(config.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_check = path.name == "config.py" and isinstance(node, ast.Attribute)
            if isinstance(node, ast.Attribute) and node.attr in UNUSED:
                # Checks that the documentation requires.
                assert is_check and node.attr in ("verify_integrity", "use_persistent_ckpt_worker"), path


@pytest.mark.parametrize("name", UNUSED)
def test_a_field_without_effect_is_warned_about_once(name, monkeypatch, caplog):
    monkeypatch.setattr(config_checks, "_warned", set())
    (field,) = (field for field in dataclasses.fields(CheckpointConfig) if field.name == name)
    cfg = CheckpointConfig(**{name: other_value(field)})
    cfg.finalize()
    ConfigContainer(checkpoint=cfg).validate()
    (warning,) = caplog.messages
    assert warning == f"checkpoint.{name}={other_value(field)!r} has no effect in ckpt_fast: {UNUSED[name]}"


def test_what_has_an_effect_is_not_warned_about(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(config_checks, "_warned", set())
    CheckpointConfig().finalize()
    CheckpointConfig(
        save=str(tmp_path), async_save=True, most_recent_k=3, storage_writers_per_rank=4
    ).finalize()
    # An object of an unknown class, whose defaults are not known.
    warn_of_unused(SimpleNamespace(save_retain_interval=100))
    assert caplog.messages == []


def test_defaults_of_another_class_are_its_own(monkeypatch, caplog):
    @dataclasses.dataclass
    class Theirs:
        use_persistent_ckpt_worker: bool = False
        dist_ckpt_workers: int = 2

    monkeypatch.setattr(config_checks, "_warned", set())
    warn_of_unused(Theirs())
    assert caplog.messages == []
    warn_of_unused(Theirs(dist_ckpt_workers=1))
    assert "dist_ckpt_workers=1 has no effect" in caplog.text
