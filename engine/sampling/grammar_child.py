"""The other end of grammar_process.py: compiles grammars and checks texts where that can be killed.

Requests and answers are JSON, one to a line, on stdin and the stdout that it was started with.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from typing import Any

from engine.sampling.compile_grammar import compile_grammar_of, from_key, new_compiler
from engine.sampling.json_check import JsonCheck
from queue_api.wire.errors import InvalidRequestError

__all__ = ["main"]

MORE_MEMORY_BYTES = 4 * 2**30
"""What compiling may take, beside the libraries."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer until stdin ends."""
    _die_with_parent()
    # what libraries print is no answer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    child = _Child()
    for line in sys.stdin.buffer:
        answers.write(json.dumps(child.answer(json.loads(line))).encode() + b"\n")
        answers.flush()


class _Child:
    def __init__(self) -> None:
        self._compiler: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """`{"wrong": …}` says why there is no grammar."""
        if "vocabulary" in request:
            from xgrammar import TokenizerInfo

            self._compiler = new_compiler(TokenizerInfo.deserialize_json(request["vocabulary"]))
            _limit_memory()
            return {}
        if "outputs" in request:
            return {"wrong": self._wrong(request["outputs"])}
        if "text" in request:
            return {"passes": JsonCheck.trusted(request["schema"]).passes(request["text"])}
        return {}

    def _wrong(self, key: str) -> str | None:
        outputs = from_key(key)
        try:
            if outputs.json is not None:
                JsonCheck.of(outputs.json)
            compile_grammar_of(self._compiler, outputs)
        except InvalidRequestError as error:
            return str(error)
        except Exception as error:  # xgrammar raises all sorts
            said = " ".join(str(error).split(": ", 1)[-1].split())[:300]
            return f"'structured_outputs' can't be compiled: {said or type(error).__name__}"
        return None


def _die_with_parent() -> None:
    """What never ends to compile mustn't outlive the worker."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL.value)
        if os.getppid() == 1:
            sys.exit()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:  # noqa: PTH123
            now = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + MORE_MEMORY_BYTES, hard))


if __name__ == "__main__":
    main()
