"""Compiling the engine's C sources, and doing without."""

from __future__ import annotations

import logging

import pytest

from engine.kernels import native_library


def test_without_a_compiler_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in ("false", "no-such-compiler"):
        monkeypatch.setenv("CC", compiler)
        caplog.clear()
        with caplog.at_level(logging.WARNING, native_library.__name__):
            assert native_library.native_library.__wrapped__("decode_attention") is None
        assert "no compiled decode attention" in caplog.text
    assert not list(tmp_path.rglob("*.so"))
