"""What all of batchmill's commands share: options, exit codes, signals, errors in one line.

Exit codes: 0 done, 1 a fault of ours or the engine's, 2 usage, settings, files or Redis,
3 incomplete, 4 too many rows have errors, 130 and 143 interrupted and terminated, 141 whoever
read our output went away.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any, NoReturn, TypeVar, get_args

import typer
from pydantic import ValidationError

from queue_api.client.client import Client
from queue_api.connection.settings import EnvironmentSettings, QueueSettings
from queue_api.datasets.columns import check_fields
from queue_api.datasets.formats.opening import FORMAT_NAMES
from queue_api.wire.errors import (
    BatchmillError,
    ConfigurationError,
    DatasetError,
    GenerationFailedError,
    QueueFullError,
    RedisAccessError,
    RequestError,
    RowsFailedError,
    RunIncompleteError,
    RunNotFoundError,
)
from queue_api.wire.plain_text import PlainTextFormatter, on_one_line
from queue_api.wire.schemas import SamplingParams, describe

__all__ = [
    "GENERATION_DEFAULTS",
    "ChunkSize",
    "Fields",
    "InputFormat",
    "InputNames",
    "QueueName",
    "RedisUrl",
    "RowSampling",
    "RunArgument",
    "RunId",
    "Stopped",
    "exit_code_of",
    "fields_of",
    "open_client",
    "option_group",
    "run_app",
    "run_async",
    "run_sampling_options",
    "sampling_options",
    "tell",
]

_T = TypeVar("_T")

RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        help="redis://user:password@host:port/db, rediss://… for TLS, unix:///path, "
        "redis+sentinel://host,host/service. Default: $BATCHMILL_REDIS_URL, else $REDIS_URL.",
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

InputNames = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Files of rows, folders of them, patterns in quotes, addresses such as hf://… or "
        "https://…; - is stdin. Of run also, alone, a recipe: FILE.yaml.",
    ),
]
InputFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="|".join(FORMAT_NAMES),
        help="What the input is in. Default: what its content tells, or the name .txt.",
        show_default=False,
    ),
]

Fields = Annotated[
    str | None,
    typer.Option(
        "--fields",
        help="Columns to read as fields of their requests besides id, prompt and messages, such as "
        "max_tokens,seed; others come back untouched. Default: all with the name of a field.",
        show_default=False,
    ),
]
RowSampling = Annotated[
    bool,
    typer.Option(
        "--row-sampling/--no-row-sampling",
        help="Whether columns with the name of a field are read as such.",
    ),
]

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]

_SAMPLING: dict[str, Any] = {
    "max_tokens": Annotated[
        int | None, typer.Option(help="At most so many new tokens (128).", show_default=False)
    ],
    "truncate_max_tokens": Annotated[
        bool,
        typer.Option(
            "--truncate-max-tokens",
            help="Cut max_tokens to what the model's length has room for, where it would be "
            "refused.",
        ),
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
        typer.Option(help="A string that ends generation; may be repeated.", show_default=False),
    ],
    "ignore_eos": Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")
    ],
}


def option_group(
    parameter: str, options: Mapping[str, Any], build: Callable[[dict[str, Any]], Any] = dict
) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """Give a command several options that it gets as one parameter.

    :param parameter: the command's parameter, which is no option itself
    :param options: name to annotation; an option not given is False if it is a plain bool, else
        None
    :param build: makes the parameter's value of the options' values by name
    """

    def decorate(command: Callable[..., _T]) -> Callable[..., _T]:
        plain = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def wrapper(**given: Any) -> _T:
            values = {name: given.pop(name) for name in options}
            return command(**given, **{parameter: build(values)})

        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if get_args(annotation)[0] is bool else None,
                annotation=annotation,
            )
            for name, annotation in options.items()
        ]
        kept = [
            p.replace(kind=p.KEYWORD_ONLY) for n, p in plain.parameters.items() if n != parameter
        ]
        wrapper.__signature__ = plain.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*kept, *added]}
        return wrapper

    return decorate


def _sampling_of(values: dict[str, Any]) -> SamplingParams:
    """What isn't given stays unset, so that a row's own fields and the defaults show through."""
    chosen = {name: value for name, value in values.items() if value}
    chosen.update({n: v for n, v in values.items() if v == 0 and v is not False})
    try:
        return SamplingParams(**chosen)
    except ValidationError as error:
        raise ConfigurationError(describe(error)) from None


GENERATION_DEFAULTS: dict[str, Any] = {
    "generation_defaults": Annotated[
        str | None,
        typer.Option(
            help="What of the model's generation config counts where a request says nothing: "
            "model, what generate(do_sample=False) applies; all, its sampling too; none. "
            "Default: the worker's setting, which is model.",
            show_default=False,
        ),
    ],
}
sampling_options = option_group("sampling", _SAMPLING | GENERATION_DEFAULTS, _sampling_of)
"""Give a command options of sampling fields; it gets them as one `sampling` parameter."""
run_sampling_options = option_group("sampling", _SAMPLING, _sampling_of)
"""The same, where an option of the workers has the name of one of them."""


def fields_of(given: str | None, *, row_sampling: bool) -> frozenset[str] | None:
    """The columns that --fields and --no-row-sampling leave to be read; None for all.

    :raises ConfigurationError: both, or a field that no request has
    """
    if given is None:
        return None if row_sampling else check_fields(())
    if not row_sampling:
        raise ConfigurationError("give --fields or --no-row-sampling, not both")
    return check_fields([name.strip() for name in given.split(",") if name.strip()])


def tell(message: str) -> None:
    """Say something on stderr: stdout is for data."""
    typer.echo(f"batchmill: {on_one_line(message)}", err=True)


def open_client(redis_url: str | None, queue: str | None = None) -> Client:
    """A client of what a command's flags and the environment name."""
    return Client(settings=QueueSettings.load(redis_url=redis_url, queue=queue))


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


_USAGE = (ConfigurationError, DatasetError, RedisAccessError, RequestError, RunNotFoundError)


def exit_code_of(error: BaseException) -> int:
    """The exit code that tells a script what happened."""
    if isinstance(error, Stopped):
        return error.exit_code
    if isinstance(error, RunIncompleteError | QueueFullError | GenerationFailedError):
        return 3
    if isinstance(error, RowsFailedError):
        return 4
    if isinstance(error, _USAGE):
        return 2
    return 1


def _forget_stdout() -> None:
    """Python would complain once more when it flushes stdout at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_app(app: typer.Typer) -> NoReturn:
    """Run the command that the arguments name, and end the process with its exit code.

    Errors of ours are one line on stderr; a traceback is a bug.
    """
    try:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(PlainTextFormatter("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=EnvironmentSettings.load().log_level.upper(), handlers=[handler])
        app(prog_name="batchmill")
    except BatchmillError as error:
        tell(str(error))
        sys.exit(exit_code_of(error))
    except Stopped as stopped:
        if stopped.exit_code == 128 + signal.SIGPIPE:
            _forget_stdout()
        sys.exit(stopped.exit_code)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        tell(f"can't write: {error.strerror}")
        _forget_stdout()
        sys.exit(2)
    sys.exit(0)
