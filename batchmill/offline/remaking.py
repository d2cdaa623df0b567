"""`batchmill verify --sample`: rows made again, and compared with those that are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from queue_api.datasets.remake import Asked
from queue_api.wire.errors import DatasetError, RequestError
from queue_api.wire.schemas import ErrorDetail, GenerationRequest, TokenLogprobs
from workers.running.echo_engine import ECHO_PREFIX
from workers.running.engine_loop import Completion, Engine
from workers.running.engines import load_engine
from workers.settings import WorkerSettings

__all__ = ["BOUNDS", "Remade", "Verdict", "counts", "remake"]

Verdict = Literal["equal", "near-tie", "different", "not made again"]
BOUNDS = {"float32": 0.001, "float16": 0.03, "int8": 0.05, "bfloat16": 0.25}
"""By the type that is computed in: tokens whose logits are no further apart may change places by
rounding. Of the short floats that is twice what neighbouring numbers between 16 and 32 are apart,
which logits are among; of the others, room for additions in another order."""
_FLOATS = BOUNDS.keys() - {"int8"}
_OF_THE_REQUEST = {
    *("invalid_request", "unsupported_request", "prompt_too_long", "max_tokens_too_large"),
    "request_too_large",
}
"""Errors that the same request has again."""
MOST_AT_A_TIME = 4
"""Times as many requests as generate at a time are in the engine."""


@dataclass(frozen=True)
class Remade:
    """What came of a row."""

    row: int
    verdict: Verdict
    what: str = ""
    """Which difference, or why there is none to be told."""

    def __str__(self) -> str:
        return f"row {self.row}: {self.verdict}" + (f": {self.what}" if self.what else "")


@dataclass
class _Ask:
    """One text of a row that is made again: of its last turn, or of one before."""

    key: str
    row: int
    request: GenerationRequest
    seed_key: str | None
    written: Sequence[Mapping[str, Any]]
    """Each sample's text and what else is known of it."""
    where: str = ""
    """Which turn, where there are several."""
    guides: Sequence[Any] = ()
    """Of the second try, which follows what is written."""


def remake(
    asked: Sequence[Asked], settings: WorkerSettings, tell: Callable[[str], None]
) -> Iterator[Remade]:
    """Make rows again, in an engine in this process.

    :param settings: the model, and how it is cut and computed
    :raises DatasetError: another model made them
    :raises ConfigurationError: the model can't be loaded
    """
    with closing(load_engine(settings)) as engine:
        bound = _bound(asked, engine, settings, tell)
        yield from _Remaking(engine, settings, bound).verdicts(asked)


def _bound(
    asked: Sequence[Asked], engine: Engine, settings: WorkerSettings, tell: Callable[[str], None]
) -> float:
    """The margin of a near tie: the largest of those of the types that the rows and we compute in.

    :raises DatasetError: another model made a row
    """
    now = engine.model_revision or engine.model_name
    kinds = set[str]()
    for made in {_maker(each.written) for each in asked} - {""}:
        if made.partition("+")[0] != now.partition("+")[0]:
            raise DatasetError(
                f"rows were made by a model of revision {made}, and {engine.model_name} is of "
                f"{now}: name theirs (--model, --revision)"
            )
        if made != now:
            tell(f"rows were made at revision {made}, and are made again at {now}")
        kinds |= _kinds(made)
        if _kinds(now) & _FLOATS and not _kinds(made) & _FLOATS:
            kinds.add("bfloat16")  # they are as published: nobody says in what
    kinds |= _kinds(now) | {settings.quantization}
    if not settings.model.startswith(ECHO_PREFIX):
        kinds.add(_dtype(engine))
    return max(BOUNDS[kind] for kind in {*kinds, "float32"} & BOUNDS.keys())


def _maker(written: Mapping[str, Any]) -> str:
    return str(written.get("model_revision") or written.get("model") or "")


def _kinds(revision: str) -> set[str]:
    return {*revision.split("+")[1:]}


def _dtype(engine: Any) -> str:
    return str(engine.stages[0].dtype).removeprefix("torch.")


@dataclass
class _Open:
    """A row some of whose texts are being made."""

    left: int
    found: list[Remade] = field(default_factory=list)


class _Remaking:
    def __init__(self, engine: Engine, settings: WorkerSettings, bound: float) -> None:
        self._engine = engine
        self._bound = bound
        self._can_guide = not settings.model.startswith(ECHO_PREFIX)
        self._most = MOST_AT_A_TIME * settings.max_num_seqs
        self._asks: dict[str, _Ask] = {}
        """In the engine."""
        self._open: dict[int, _Open] = {}

    def verdicts(self, asked: Sequence[Asked]) -> Iterator[Remade]:
        """Of each row, as they come."""
        for each in asked:
            yield from self._begin(each)
            while len(self._asks) >= self._most:
                yield from self._step()
        while self._asks:
            yield from self._step()

    def _begin(self, asked: Asked) -> Iterator[Remade]:
        why_not = asked.why_not or _why_not(asked)
        if why_not or asked.request is None:
            yield Remade(asked.row, "not made again", why_not)
        elif isinstance(asked.request, RequestError):
            yield _of_error(asked, asked.request)
        else:
            asks = list(_asks(asked, asked.request))
            self._open[asked.row] = _Open(len(asks))
            for ask in asks:
                try:
                    self._add(ask)
                except RequestError as error:
                    yield from self._close(ask, _of_error(asked, error))

    def _add(self, ask: _Ask) -> None:
        engine: Any = self._engine
        guides = {"guides": ask.guides} if ask.guides else {}
        engine.add(ask.key, ask.request, seed_key=ask.seed_key, **guides)
        self._asks[ask.key] = ask

    def _step(self) -> Iterator[Remade]:
        for completion in self._engine.step():
            ask = self._asks.pop(completion.key)
            if ask.guides:
                yield from self._close(ask, self._judge_guided(ask, completion))
                continue
            different = _difference(ask, completion, self._bound)
            if different and completion.error is None and self._can_guide:
                ask.guides = self._guides(ask)
                self._add(ask)
                continue
            verdict: Verdict = "different" if different else "equal"
            yield from self._close(ask, Remade(ask.row, verdict, different))

    def _close(self, ask: _Ask, remade: Remade) -> Iterator[Remade]:
        """A row is what the worst of its texts is."""
        row = self._open[ask.row]
        row.left -= 1
        row.found.append(remade)
        if not row.left:
            del self._open[ask.row]
            order: Sequence[Verdict] = ("different", "not made again", "near-tie", "equal")
            yield min(row.found, key=lambda found: order.index(found.verdict))

    def _guides(self, ask: _Ask) -> list[Any]:
        from engine.requests.guide import Guide

        engine: Any = self._engine
        return [
            Guide(
                engine.tokenizer,
                str(sample.get("text") or ""),
                sample.get("token_ids"),
                ended=sample.get("finish_reason") == "stop",
                bound=self._bound,
            )
            for sample in ask.written
        ]

    def _judge_guided(self, ask: _Ask, completion: Completion) -> Remade:
        forks = [fork for guide in ask.guides for fork in guide.forks]
        different = _difference(ask, completion, self._bound)
        lost = [guide for guide in ask.guides if guide.is_lost]
        if forks and not different and not lost:
            worst = max(forks, key=lambda fork: fork.margin)
            return Remade(ask.row, "near-tie", ask.where + self._shown(worst))
        if lost:
            return Remade(ask.row, "different", ask.where + self._shown(lost[0].forks[-1]))
        return Remade(ask.row, "different", different or "equal the second time only")

    def _shown(self, fork: Any) -> str:
        engine: Any = self._engine
        text_of = engine.tokenizer.text_of
        told = f"new token {fork.place} is {text_of(fork.chosen)!r}"
        if fork.written is None:
            return f"{told}, and no token near it leads to what is written"
        return f"{told}, written is {text_of(fork.written)!r}, with a margin of {fork.margin:.2g}"


def _why_not(asked: Asked) -> str:
    """What keeps a row from being made again, though it is known what it was asked for."""
    written = asked.written
    reason = written.get("finish_reason")
    if reason == "cancelled":
        return "it was cancelled"
    if reason == "error" and (code := written.get("error_code")) not in _OF_THE_REQUEST:
        return f"it has an error, {code}, that isn't the request's alone"
    return ""


def _of_error(asked: Asked, error: RequestError) -> Remade:
    """A request that is refused, compared with what is written."""
    detail, written = ErrorDetail.of(error), asked.written
    was = written.get("error_code") if written.get("finish_reason") == "error" else "none"
    if was == detail.code:
        return Remade(asked.row, "equal")
    return Remade(asked.row, "different", f"its error is {detail.code}, written is {was}")


def _asks(asked: Asked, request: GenerationRequest) -> Iterator[_Ask]:
    """A row's texts: each turn's, with the answers to those before as they are written."""
    written = asked.written
    texts = written.get("turn_texts") or []
    messages = request.messages or []
    for place, text in enumerate(texts[:-1]):
        if request.sampling.seed is None and written.get("seed_key"):
            break  # what its draws followed from isn't known
        end = len(messages) - 2 * (len(texts) - 1 - place)
        earlier = request.model_copy(update={"messages": messages[:end]})
        where = f"turn {place + 1}: "
        yield _Ask(f"{asked.row} {place}", asked.row, earlier, None, [{"text": text}], where)
    samples = written.get("outputs") or [written]
    key = str(written["seed_key"]) if written.get("seed_key") else None
    where = f"turn {len(texts)}: " if len(texts) > 1 else ""
    yield _Ask(f"{asked.row}", asked.row, request, key, samples, where)


def _difference(ask: _Ask, completion: Completion, bound: float) -> str:
    """What isn't as it is written; nothing if all is."""
    if completion.error is not None:
        detail = ErrorDetail.of(completion.error)
        was = ask.written[0].get("error_code")
        return "" if was == detail.code else f"{ask.where}it ends with an error: {detail.message}"
    samples = completion.samples or [completion]
    if len(samples) != len(ask.written):
        return f"{len(ask.written)} samples are written, and {len(samples)} are made"
    for place, (made, written) in enumerate(zip(samples, ask.written, strict=True)):
        which = f"{ask.where}sample {place}: " if len(samples) > 1 else ask.where
        if told := _of_sample(made, written, bound):
            return which + told
    return ""


def _of_sample(made: Completion, written: Mapping[str, Any], bound: float) -> str:
    if (text := str(written.get("text") or "")) != made.text:
        return f"the text is {made.text!r:.60}, written is {text!r:.60}"
    if (reason := written.get("finish_reason")) is not None and reason != made.finish_reason:
        return f"it ends with {made.finish_reason.value}, written is {reason}"
    if (ids := written.get("token_ids")) is not None and list(ids) != list(made.token_ids):
        return "the text is the same, of other tokens"
    status = written.get("structured_output")
    if status is not None and status != made.structured_output:
        return f"its structured output is {made.structured_output}, written is {status}"
    for name in ("logprobs", "prompt_logprobs"):
        now: Sequence[TokenLogprobs | None] | None = getattr(made, name)
        if (was := written.get(name)) is not None and now is not None:
            pairs = zip(was, now, strict=False)
            away = [abs(a["logprob"] - b.logprob) for a, b in pairs if a and b]
            if len(was) != len(now) or max(away, default=0.0) > bound:
                return f"its {name} differ by {max(away, default=0.0):.2g}"
    return ""


def counts(remade: Sequence[Remade]) -> str:
    """All in a line."""
    found = Counter(each.verdict for each in remade)
    kinds: Sequence[Verdict] = ("equal", "near-tie", "different", "not made again")
    parts = [f"{found[kind]:,} {kind}" for kind in kinds]
    return f"of {len(remade):,} rows of the sample " + ", ".join(parts)
