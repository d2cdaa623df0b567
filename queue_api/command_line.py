"""What all of batchmill's commands share: options, exit codes, signals, errors in one line.

Exit codes: 0 done, 1 a fault of ours or the engine's, 2 usage, settings, files or Redis,
3 incomplete, 130 and 143 interrupted and terminated, 141 whoever read our output went away.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError

from queue_api.errors import (
    BatchmillError,
    ConfigurationError,
    DatasetError,
    GenerationFailedError,
    QueueFullError,
    RedisError,
    RequestError,
    RunIncompleteError,
    RunNotFoundError,
)
from queue_api.schemas import SamplingParams, describe
from queue_api.settings import EnvironmentSettings

__all__ = [
    "ChunkSize",
    "QueueName",
    "RedisUrl",
    "RunId",
    "Stopped",
    "exit_code_of",
    "run_app",
    "run_async",
    "sampling_options",
]

_T = TypeVar("_T")

RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        help="redis://user:password@host:port/db, rediss://… for TLS, unix:///path. "
        "Default: $REDIS_URL.",
        show_default=False,
    ),
]
QueueName = Annotated[
    str | None,
    typer.Option(
        "--queue", help="The RQ queue. Default: $BATCHMILL_QUEUE or batchmill.", show_default=False
    ),
]
RunId = Annotated[
    str | None,
    typer.Option(
        "--run", help="Name of the run. Default: made from the input.", show_default=False
    ),
]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        "--chunk-size",
        min=1,
        max=1024,
        help="Requests to an RQ job. Default: $BATCHMILL_CHUNK_SIZE or 32.",
        show_default=False,
    ),
]

_SAMPLING: dict[str, Any] = {
    "max_tokens": Annotated[
        int | None, typer.Option(help="At most so many new tokens (128).", show_default=False)
    ],
    "temperature": Annotated[
        float | None, typer.Option(help="0 is greedy, the default.", show_default=False)
    ],
    "top_k": Annotated[
        int | None, typer.Option(help="Sample among the k likeliest tokens.", show_default=False)
    ],
    "top_p": Annotated[
        float | None,
        typer.Option(
            help="Sample among the likeliest tokens that together reach this.", show_default=False
        ),
    ],
    "min_p": Annotated[
        float | None,
        typer.Option(
            help="Sample among tokens this times as likely as the likeliest.", show_default=False
        ),
    ],
    "repetition_penalty": Annotated[
        float | None,
        typer.Option(help="Above 1: repeat less.", show_default=False),
    ],
    "seed": Annotated[int | None, typer.Option(help="Fixes the draws.", show_default=False)],
    "stop": Annotated[
        list[str] | None,
        typer.Option(help="Text that ends generation; may be repeated.", show_default=False),
    ],
    "ignore_eos": Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")
    ],
}


def sampling_options(command: Callable[..., _T]) -> Callable[..., _T]:
    """Give a command an option per sampling field; it gets them as one `sampling` parameter.

    What isn't given stays unset, so that a row's own fields and the defaults show through.
    """
    plain = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def wrapper(**given: Any) -> _T:
        fields = {name: given.pop(name) for name in _SAMPLING}
        chosen = {name: value for name, value in fields.items() if value}
        chosen.update({n: v for n, v in fields.items() if v == 0 and v is not False})
        try:
            sampling = SamplingParams(**chosen)
        except ValidationError as error:
            raise ConfigurationError(describe(error)) from None
        return command(**given, sampling=sampling)

    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name == "ignore_eos" else None,
            annotation=annotation,
        )
        for name, annotation in _SAMPLING.items()
    ]
    kept = [p.replace(kind=p.KEYWORD_ONLY) for n, p in plain.parameters.items() if n != "sampling"]
    wrapper.__signature__ = plain.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*kept, *options]}
    return wrapper


class Stopped(BaseException):
    """A signal, or a reader that went away, ended the command; see `exit_code`."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def run_async(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a command's coroutine; Ctrl-C and SIGTERM cancel it, so that it cleans up.

    :raises Stopped: after Ctrl-C, SIGTERM or a broken pipe; run_app knows it
    """
    terminated = False

    async def main() -> _T:
        task = asyncio.ensure_future(work)

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        return await task

    try:
        return asyncio.run(main())
    except KeyboardInterrupt:
        # not left to typer, which would make it exit code 1
        raise Stopped(signal.SIGINT) from None
    except BrokenPipeError:
        raise Stopped(signal.SIGPIPE) from None
    except asyncio.CancelledError:
        if terminated:
            raise Stopped(signal.SIGTERM) from None
        raise


def exit_code_of(error: BaseException) -> int:
    """The exit code that tells a script what happened."""
    if isinstance(error, Stopped):
        return error.exit_code
    if isinstance(error, RunIncompleteError | QueueFullError | GenerationFailedError):
        return 3
    if isinstance(
        error, ConfigurationError | DatasetError | RedisError | RequestError | RunNotFoundError
    ):
        return 2
    return 1


def run_app(app: typer.Typer) -> NoReturn:
    """Run the command that the arguments name, and end the process with its exit code.

    Errors of ours are one line on stderr; a traceback is a bug.
    """
    try:
        logging.basicConfig(
            level=EnvironmentSettings.load().log_level.upper(),
            format="%(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        app(prog_name="batchmill")
    except BatchmillError as error:
        typer.echo(f"batchmill: {error}", err=True)
        sys.exit(exit_code_of(error))
    except Stopped as stopped:
        if stopped.exit_code == 128 + signal.SIGPIPE:
            # Python would complain once more when it flushes stdout at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(stopped.exit_code)
    sys.exit(0)
