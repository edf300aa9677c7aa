# SPDX-License-Identifier: Apache-2.0
"""Environment variables: defaults, accepted values, and refusals that name the variable."""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_fast import settings

PACKAGE = Path(settings.__file__).parent
FLAGS = {
    "CKPT_FAST_NATIVE": (settings.native_enabled, True),
    "CKPT_FAST_DIRECT": (settings.direct_io, True),
    "CKPT_FAST_FSYNC": (settings.fsync_enabled, True),
    "CKPT_FAST_VERIFY": (settings.verify_on_load, True),
    "CKPT_FAST_ALLOW_PICKLE": (settings.pickle_allowed, False),
}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CKPT_FAST_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", FLAGS)
def test_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flag, default = FLAGS[name]
    assert flag() is default
    for value, meaning in (("0", False), ("1", True)):
        monkeypatch.setenv(name, value)
        assert flag() is meaning


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["", "2", "true", "no", " 1"])
def test_invalid_flag(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: use 0 or 1")):
        FLAGS[name][0]()


@pytest.mark.parametrize(("cores", "threads"), [(None, 2), (1, 2), (4, 4), (192, 8)])
def test_default_threads(cores: int | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert settings.io_threads() == threads


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_THREADS", "13")
    assert settings.io_threads() == 13


@pytest.mark.parametrize("value", ["0", "-1", "two", "", "1.5", "²"])
def test_invalid_threads(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_THREADS", value)
    with pytest.raises(ValueError, match=f"CKPT_FAST_THREADS={value!r} is not a positive whole number"):
        settings.io_threads()


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        ("4096", 4096),
        ("16K", 16 << 10),
        ("1m", 1 << 20),
        ("8M", 8 << 20),
        ("1g", 1 << 30),
        ("0001G", 1 << 30),
    ],
)
def test_chunk(value: str, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.chunk_bytes() == 4 << 20
    monkeypatch.setenv("CKPT_FAST_CHUNK", value)
    assert settings.chunk_bytes() == nbytes


@pytest.mark.parametrize("value", ["", "M", "-4K", "4KB", "4 K", "0", "0x1000", "4X", "1.5M"])
def test_invalid_chunk_size(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_CHUNK", value)
    with pytest.raises(ValueError, match="CKPT_FAST_CHUNK="):
        settings.chunk_bytes()


@pytest.mark.parametrize("value", ["1000", "5K", "4097"])
def test_chunk_that_is_not_aligned(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_CHUNK", value)
    with pytest.raises(ValueError, match=r"is not a multiple of 4096 bytes"):
        settings.chunk_bytes()


@pytest.mark.parametrize(
    ("name", "value", "most"),
    [
        ("CHUNK", "1T", "1G"),
        ("CHUNK", "2G", "1G"),
        ("THREADS", "1025", "1024"),
        ("RETRIES", "101", "100"),
        ("TIMEOUT", "99999999999", "31622400"),
        ("TIMEOUT", "9" * 5000, "31622400"),
        ("HOST_BUFFER", "9" * 19, "9" * 18),
    ],
)
def test_more_than_makes_sense(name: str, value: str, most: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"CKPT_FAST_{name}", value)
    with pytest.raises(ValueError, match=rf"CKPT_FAST_{name}='\w+' is more than {most}"):
        settings.Settings.read()


ODD = {
    **dict.fromkeys((*FLAGS, "CKPT_FAST_SPACE_CHECK"), ("true", "yes", "", "2")),
    "CKPT_FAST_THREADS": ("0", "-1", "4.0"),
    "CKPT_FAST_RETRIES": ("-1", "many"),
    "CKPT_FAST_CHUNK": ("1T", "0", "1000"),
    "CKPT_FAST_TIMEOUT": ("0", "99999999999", "inf"),
    "CKPT_FAST_HOST_BUFFER": ("0", "-1G"),
    "CKPT_FAST_STAGING": ("gpu", ""),
    "CKPT_FAST_ON_UNLOADABLE": ("ignore", "1", ""),
}


VALID = {"CKPT_FAST_STAGING": "auto", "CKPT_FAST_CHUNK": "4M", "CKPT_FAST_ON_UNLOADABLE": "warn"}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in ODD for value in ODD[name]])
def test_reading_all_refuses_each_odd_value(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.Settings.read()
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}="):
        settings.Settings.read()


def test_an_unknown_variable_is_warned_about_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings, "_warned", set())
    for name in (*ODD, "CKPT_FAST_METRICS", "CKPT_FAST_SPOOL", "CKPT_FAST_CUDA"):
        monkeypatch.setenv(name, VALID.get(name, "1"))
    monkeypatch.setenv("CKPT_FAST_TREADS", "4")
    settings.Settings.read()
    settings.Settings.read()
    (warning,) = caplog.messages
    assert warning == "CKPT_FAST_TREADS has no meaning here: did you mean CKPT_FAST_THREADS?"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("THREAD", "THREADS"),
        ("HOST_BUFFER_BYTES", "HOST_BUFFER"),
        ("RETRY", "RETRIES"),
        ("BANANA", None),
        ("Threads", "THREADS"),
    ],
)
def test_the_nearest_variable_is_named(
    name: str, nearest: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings, "_warned", set())
    monkeypatch.setenv(f"CKPT_FAST_{name}", "1")
    settings.Settings.warn_of_unknown()
    hint = f"did you mean CKPT_FAST_{nearest}?" if nearest else "see docs/configuration.md"
    assert caplog.messages == [f"CKPT_FAST_{name} has no meaning here: {hint}"]


def test_host_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.host_buffer_bytes() is None
    monkeypatch.setenv("CKPT_FAST_HOST_BUFFER", "3G")
    assert settings.host_buffer_bytes() == 3 << 30


def public_settings() -> list[Callable[[], object]]:
    return [
        function
        for name, function in inspect.getmembers(settings, inspect.isfunction)
        if not name.startswith("_") and function.__module__ == settings.__name__
    ]


@pytest.mark.parametrize("function", public_settings(), ids=lambda function: function.__name__)
def test_each_documents_its_variable_and_default(function: Callable[[], object]) -> None:
    assert re.match(r"``CKPT_FAST_\w+``( \(.+?\))?: ", function.__doc__ or "")


def test_no_other_module_reads_our_variables() -> None:
    """The launcher's variables (RANK, WORLD_SIZE, ...) are not ours."""
    elsewhere = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "settings.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
                names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                names = [node.slice.value] if isinstance(node.slice, ast.Constant) else []
            else:
                continue
            elsewhere += [f"{path.name}: {name}" for name in names if str(name).startswith("CKPT_FAST_")]
    assert elsewhere == []
