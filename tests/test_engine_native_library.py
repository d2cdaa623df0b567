"""Compiling the engine's C sources, and doing without."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

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
        assert "no native decode attention" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


SOURCES = sorted(path.stem for path in Path(native_library.__file__).parent.glob("*.c"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_compiles_where_there_is_a_compiler(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or all would go on without it, slower, and its tests be skipped."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native_library.native_library.__wrapped__(name) is not None
