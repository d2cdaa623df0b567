"""Engine: requests in, completions out, one scheduling round at a time."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import chain, takewhile

try:
    import torch
    import transformers  # noqa: F401
except ImportError as error:
    from queue_api.wire.errors import MissingExtraError

    raise MissingExtraError(
        f"{error.name} isn't installed; running a model needs: pip install 'batchmill[worker]'"
    ) from error

from engine.batch import BatchOutOfMemoryError
from engine.config import EngineConfig
from engine.kernels.malloc import keep_freed_memory
from engine.loading import (
    LoadedModel,
    load_model,
    make_pipeline,
    num_cache_slots,
    shares_prefixes,
)
from engine.metrics import EngineMetrics
from engine.requests.completion import Completion
from engine.requests.endings import Ending, complete, ending_of, fail
from engine.requests.guide import Guide
from engine.requests.samples import SampleGroups
from engine.requests.scores import score_prompts
from engine.requests.sequence import Sequence, seed_from_key
from engine.sampling.logits import LogitsChange
from engine.sampling.logprobs import check_amount, logprobs_of
from engine.sampling.sampler import NO_TOKEN, choose_tokens
from engine.sampling.structured import Grammars
from engine.scheduling.batch_budget import BatchBudget
from engine.scheduling.prefix_cache import PrefixCache
from engine.scheduling.round import Round
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.slots import SlotAllocator
from queue_api.wire.errors import (
    DuplicateRequestError,
    EngineError,
    InvalidRequestError,
    MaxTokensTooLargeError,
    PromptTooLongError,
    RequestOutOfMemoryError,
)
from queue_api.wire.schemas import GenerationRequest, SamplingParams

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

_GRAMMAR_WAIT_S = 0.02
"""How long a step without other work waits for a grammar; then the caller may add some."""


class Engine:
    """A model on a row of stages, generating for many requests at once.

    Not thread-safe: one thread adds, steps and cancels.
    """

    def __init__(self, config: EngineConfig, model: LoadedModel) -> None:
        self.config = config
        self.model_name = model.name
        self.model_revision = model.revision
        self.tokenizer = model.tokenizer
        self._defaults = model.defaults
        self.stages = model.stages
        slots = num_cache_slots(config, model.stages, model.max_model_len)
        self.max_model_len = min(model.max_model_len, slots)
        for stage in model.stages:
            stage.allocate(slots)
        self._long_rope = model.stages[0].long_rope
        self.pipeline = make_pipeline(config, model.stages)
        allocator = SlotAllocator(slots)
        self._prefixes = PrefixCache(allocator) if shares_prefixes(config, model.stages) else None
        self.scheduler = Scheduler(
            allocator,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            num_groups=self.pipeline.capacity,
            use_cache=config.use_cache,
            prefixes=self._prefixes,
        )
        self.metrics = EngineMetrics()
        self._budget = BatchBudget(config.max_batch_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._rounds: deque[Round] = deque()
        """Those in flight, the oldest in front."""
        self._samples = SampleGroups()
        self._grammars = Grammars(model.tokenizer)
        self._awaiting_grammar: dict[str, Sequence] = {}
        """Those whose grammar is being compiled; the scheduler doesn't have them yet."""
        self._ended: list[Completion] = []
        self._num_added = 0
        self._is_closed = False

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Find the model, cut it into stages and load them; see `load_model` for what it raises."""
        engine = cls(config, load_model(config))
        if any(stage.device.type == "cpu" for stage in engine.stages):
            keep_freed_memory()  # not before: what loading took is given back
        logger.info(
            "%s ready: %s pipeline, %d cache slots",
            engine.model_name,
            type(engine.pipeline).__name__.removesuffix("Pipeline").lower(),
            engine.scheduler.allocator.num_slots,
        )
        return engine

    # ------------------------------------------------------------------------ requests in, out

    def add(
        self,
        key: str,
        request: GenerationRequest,
        *,
        generated: Seq[int] = (),
        seed_key: str | None = None,
        guides: Seq[Guide] = (),
    ) -> None:
        """Queue a request under `key`.

        :param generated: new tokens that an earlier run of the same request has produced; they
            are computed as a prompt is, counted and kept, and generation goes on behind them (a
            request that wants logprobs begins anew: those of the tokens aren't known any more;
            so does one of several samples)
        :param seed_key: what the seed follows from if the request names none; `key` by default
        :param guides: texts to follow, one for each sample; none by default
        :raises RequestError: what is wrong with this request; nothing is queued then
        """
        self._require_open()
        if key in self._sequences or key in self._samples:
            raise DuplicateRequestError(f"a request with key {key!r} is already here")
        prompt = self.tokenizer.encode(request)
        sampling = self._fitted(request.sampling, len(prompt))
        if sampling is not request.sampling:
            generated = generated[: sampling.max_tokens - 1]  # of a worker with more room
        if len(generated) > sampling.max_tokens:
            raise InvalidRequestError(
                f"resumed with {len(generated)} tokens, max_tokens is {sampling.max_tokens}"
            )
        self.tokenizer.check_vocabulary(generated, "the partial text")
        logprobs = (sampling.logprobs, sampling.prompt_logprobs)
        if logprobs != (None, None) or sampling.n > 1:
            generated = ()  # their logits are gone; the same tokens are drawn again, with them
        seed = seed_from_key(seed_key or key) if sampling.seed is None else sampling.seed
        applied = self._defaults.applied(sampling, prompt)
        sampling = applied.sampling
        check_amount(sampling, len(prompt), sampling.max_tokens)
        change = LogitsChange.of(sampling, self.tokenizer, applied.processors)
        if sampling.structured_outputs is not None:
            self._grammars.order(sampling.structured_outputs)
        keys = [key] if sampling.n == 1 else self._samples.open(key, sampling.n)
        for sample, sample_key in enumerate(keys):
            sequence = Sequence.create(
                sample_key,
                self._num_added,
                prompt,
                generated,
                sampling,
                seed=seed,
                sample=sample,
                added_at=time.perf_counter(),
                num_stages=len(self.stages),
                change=change,
                applied_defaults=applied.names,
                guide=guides[sample] if guides else None,
            )
            self._num_added += 1
            self._queue(sequence)

    def _queue(self, sequence: Sequence) -> None:
        if sequence.sampling.structured_outputs is not None and sequence.grammar is None:
            self._sequences[sequence.key] = self._awaiting_grammar[sequence.key] = sequence
            return
        if sequence.num_generated and (ending := ending_of(sequence, self.tokenizer)):
            self._ended.append(complete(sequence, ending, self.tokenizer))
            return
        self._sequences[sequence.key] = sequence
        sequence.is_long = self._is_long(sequence)
        self.scheduler.add(sequence)

    def _take_ready_grammars(self) -> list[Completion]:
        """Queue the sequences whose grammar is there, and end those whose grammar is wrong."""
        failed = []
        for key, sequence in list(self._awaiting_grammar.items()):
            outputs = sequence.sampling.structured_outputs
            assert outputs is not None
            try:
                if (grammar := self._grammars.get(outputs)) is None:
                    continue
            except InvalidRequestError as error:
                del self._awaiting_grammar[key], self._sequences[key]
                failed.append(fail(sequence, error, self.tokenizer))
                continue
            sequence.grammar = grammar.begin()
            try:
                sequence.grammar.accept(sequence.generated())
            except InvalidRequestError as error:
                logger.warning("%s begins anew: its partial text is refused: %s", key, error)
                sequence.num_tokens, sequence.grammar = sequence.num_prompt, grammar.begin()
            del self._awaiting_grammar[key], self._sequences[key]
            self._queue(sequence)
        if not failed and len(self._awaiting_grammar) == len(self._sequences):
            self._grammars.wait(_GRAMMAR_WAIT_S)  # nothing else to do
        return failed

    def cancel(self, key: str) -> bool:
        """Drop a request; it gets no completion. False if it isn't here (any more)."""
        if key in self._samples:
            for sample in self._samples.drop(key):
                self.cancel(sample)
            return True
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return False
        sequence.is_cancelled = True
        if self._awaiting_grammar.pop(key, None) is None and not sequence.in_flight:
            self._remove(sequence)
        return True

    def step(self) -> list[Completion]:
        """Run one scheduling round and return the requests that ended in it.

        :raises EngineError: if a stage or its device failed; the engine can't go on
        """
        self._require_open()
        failed = self._take_ready_grammars() if self._awaiting_grammar else []
        ended, self._ended = self._ended + failed, []
        now = time.perf_counter()
        for sequence in self.scheduler.admit():
            if sequence.admitted_at is None:
                sequence.admitted_at = now
            self.metrics.prompt_tokens += sequence.num_tokens
        while self.pipeline.num_in_flight < self.pipeline.capacity:
            work = self.scheduler.schedule()
            for sequence in self.scheduler.take_preempted():
                self.metrics.preemptions += 1
                self.pipeline.release(sequence.number)
            if not work:
                break
            self._rounds.append(Round.pack(work, use_cache=self.config.use_cache))
            self.pipeline.submit(self._rounds[-1].batch)
        if self.pipeline.num_in_flight:
            ended += self._collect()
        ended, to_cancel = self._samples.gather(ended)
        for key in to_cancel:
            self.cancel(key)
        return ended

    def generate(self, requests: Seq[GenerationRequest]) -> list[Completion]:
        """Run requests to their end, offline; completions come in the requests' order.

        :raises RequestError: for the first request that is wrong; nothing is generated then
        """
        keys = [f"{i}:{request.id}" for i, request in enumerate(requests)]
        try:
            for key, request in zip(keys, requests, strict=True):
                self.add(key, request, seed_key=request.id)
        except Exception:
            for key in keys:
                self.cancel(key)
            raise
        done: dict[str, Completion] = {}
        while len(done) < len(keys):
            done.update((completion.key, completion) for completion in self.step())
        return [done[key] for key in keys]

    def reset_prefix_cache(self) -> None:
        """Forget the caches of sequences that have ended; those that run stay."""
        if self._prefixes is not None:
            self._prefixes.clear()

    def close(self) -> None:
        """Stop the stages' threads and let go of weights and cache; requests are dropped."""
        self._is_closed = True
        self._grammars.close()
        self.pipeline.close()
        self.stages = ()
        self._sequences.clear()
        self._awaiting_grammar.clear()
        self._samples.clear()
        self._ended.clear()
        self._rounds.clear()

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineError("the engine is closed")

    # --------------------------------------------------------------------------------- status

    def has_unfinished(self) -> bool:
        """True as long as `step` has something to do or to return."""
        in_flight = self.pipeline.num_in_flight and not self._is_closed
        return bool(self._sequences or self._ended or in_flight)

    @property
    def num_running(self) -> int:
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self._awaiting_grammar)

    def describe_work(self) -> str:
        """The metrics in a line for the log."""
        return str(self.metrics)

    def num_free_seqs(self) -> int:
        """How many more requests could run at once, as far as places go."""
        return max(0, self.config.max_num_seqs - self.num_running - self.num_waiting)

    def progress(self) -> Mapping[str, tuple[int, ...]]:
        """New tokens so far of each request of one sample that runs or ran, for checkpoints."""
        preempted = takewhile(lambda sequence: sequence.is_preempted, self.scheduler.waiting)
        return {
            sequence.key: tuple(sequence.generated())
            for sequence in chain(self.scheduler.running, preempted)
            if not sequence.is_cancelled and not self._samples.is_sample(sequence.key)
        }

    # -------------------------------------------------------------------------------- a round

    def _collect(self) -> list[Completion]:
        """Wait for the oldest micro-batch; the completions of what ended with it."""
        oldest = self._rounds.popleft()
        try:
            came_back, logits = self.pipeline.collect()
        except BatchOutOfMemoryError as error:
            return self._take_back(oldest, error)
        self._budget.went_well()
        self.scheduler.max_batch_tokens = self._budget.tokens
        return self._advance(oldest, came_back.stage_s, logits)

    def _advance(self, done: Round, stage_s: Seq[float], logits: torch.Tensor) -> list[Completion]:
        """Take in a micro-batch that came back: note what it computed, choose tokens, end some.

        :param stage_s: time in each stage
        :param logits: [B + N, V], next tokens' and then prompts'
        """
        batch = done.batch
        self.metrics.computed_tokens += batch.num_tokens
        for copy in batch.copies:
            if copy.is_move:
                self.metrics.moved_tokens += copy.length
            else:
                self.metrics.cached_prompt_tokens += copy.length
        share = [seconds / len(done.sequences) for seconds in stage_s]
        for segment, sequence in zip(batch.segments, done.sequences, strict=True):
            self.scheduler.computed(sequence, segment.count)
            sequence.stage_s = [a + b for a, b in zip(sequence.stage_s, share, strict=True)]
            if sequence.is_cancelled:
                self._remove(sequence)
        score_prompts(logits[batch.num_due :], done.scored)
        logits = logits[: batch.num_due]
        tokens = _next_tokens(logits, done.due)
        chosen = logprobs_of(logits, tokens, [s.sampling.logprobs for s in done.due])
        now = time.perf_counter()
        ended = []
        for row, (sequence, token) in enumerate(zip(done.due, tokens, strict=True)):
            if sequence.is_cancelled:
                continue
            if sequence.logprobs is not None and row in chosen:
                sequence.logprobs.append(chosen[row])
            try:
                ending = self._append(sequence, token, now)
            except Exception as error:  # of this sequence alone, such as one that can't be decoded
                logger.exception("%s: failed", sequence.key)
                ended.append(self._end(sequence, error))
                continue
            if ending is not None:
                ended.append(self._end(sequence, ending))
            elif sequence.is_long != self._is_long(sequence):
                sequence.is_long = True
                self.scheduler.recompute(sequence)
        return ended

    def _is_long(self, sequence: Sequence) -> bool:
        rope = self._long_rope
        return rope is not None and rope.is_long(sequence.num_prompt, sequence.num_tokens)

    def _take_back(self, failed: Round, error: BatchOutOfMemoryError) -> list[Completion]:
        """Let a micro-batch's sequences run again in smaller ones, or end one that was alone in it.

        Slots that the micro-batch wrote to are written again with the same; a cache outside the
        pool may have grown in some layers only, so it is recomputed from its start.
        """
        batch = failed.batch
        alone = len(batch.segments) == 1
        too_large = alone and (batch.num_tokens == 1 or not self.config.use_cache)
        ended = []
        for sequence in failed.sequences:
            self.scheduler.take_back(sequence)
            if any(stage.mode != "packed" for stage in self.stages):
                sequence.num_cached = 0
                self.pipeline.release(sequence.number)
            if sequence.is_cancelled:
                self._remove(sequence)
            elif too_large:
                problem = RequestOutOfMemoryError(
                    f"no memory for a sequence of {sequence.num_tokens} tokens, even alone: {error}"
                )
                ended.append(self._end(sequence, problem))
        if not too_large:
            self._budget.shrink(batch.num_tokens, str(error))
            self.scheduler.max_batch_tokens = self._budget.tokens
        if any(stage.device.type == "cuda" for stage in self.stages):
            torch.cuda.empty_cache()  # what is free, but in pieces
        return ended

    def _append(self, sequence: Sequence, token: int, now: float) -> Ending | None:
        """Add a token; why the sequence ends with it, None if it goes on."""
        if token == NO_TOKEN:
            raise ArithmeticError("the model's logits are not numbers, or no token is allowed")
        sequence.append(token)
        if sequence.grammar is not None:
            sequence.grammar.accept([token])
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        return ending_of(sequence, self.tokenizer)

    def _end(self, sequence: Sequence, why: Ending | Exception) -> Completion:
        """Let go of a sequence that ended by itself, or by an error of its own."""
        self._sequences.pop(sequence.key, None)
        self._remove(sequence)
        if isinstance(why, Ending):
            return complete(sequence, why, self.tokenizer)
        return fail(sequence, why, self.tokenizer)

    def _remove(self, sequence: Sequence) -> None:
        if self.scheduler.remove(sequence):
            self.pipeline.release(sequence.number)

    def _fitted(self, sampling: SamplingParams, num_prompt: int) -> SamplingParams:
        """With max_tokens cut to what there is room for, where that may be.

        A number that was given is refused if it is too large, unless it may be cut; the default
        is none that anyone asked for.
        """
        room = self.max_model_len - num_prompt
        if sampling.max_tokens <= room:
            return sampling
        may_cut = sampling.truncate_max_tokens or "max_tokens" not in sampling.model_fields_set
        if may_cut and max(1, sampling.min_tokens) <= room:
            return sampling.model_copy(update={"max_tokens": room})
        name, wanted = "max_tokens", sampling.max_tokens
        if may_cut and sampling.min_tokens:
            name, wanted = "min_tokens", sampling.min_tokens
        message = (
            f"{num_prompt} prompt tokens and {name} {wanted} make {num_prompt + wanted}; "
            f"this engine takes {self.max_model_len} together"
        )
        if room < 1:
            raise PromptTooLongError(message)
        hint = "" if may_cut else "; truncate_max_tokens cuts it to what there is room for"
        raise MaxTokensTooLargeError(message + hint)


def _next_tokens(logits: torch.Tensor, due: Seq[Sequence]) -> list[int]:
    """The next token of each sequence by its row of `logits` [B, V]."""
    if not due:
        return []
    rows = [sequence.sampling_row() for sequence in due]
    tokens = choose_tokens(logits, rows)
    for place, sequence in enumerate(due):
        if sequence.guide is not None:
            tokens[place] = sequence.guide.choose(logits[place], rows[place], tokens[place])
    return tokens
