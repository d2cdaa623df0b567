"""Engine: requests in, completions out, one scheduling round at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from itertools import chain, takewhile
from typing import Any

try:
    import torch
    import transformers  # noqa: F401
except ImportError as error:
    from queue_api.errors import MissingExtraError

    raise MissingExtraError(
        f"{error.name} isn't installed; running a model needs: pip install 'batchmill[worker]'"
    ) from error

from engine.batch import ForwardBatch
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.costs import CostModel, plan_model, rounded_by
from engine.kv_cache import SlotAllocator
from engine.logits import LogitsChange
from engine.logprobs import described, logprobs_of, note_prompt_logprobs
from engine.memory import fitting_slots, keep_freed_memory
from engine.metrics import EngineMetrics
from engine.out_of_memory import BatchBudget, BatchOutOfMemoryError
from engine.partition import PartitionPlan, plan_partition
from engine.pipeline import InlinePipeline, Pipeline, ThreadedPipeline
from engine.prefix_cache import PrefixCache
from engine.sampler import NO_TOKEN, choose_tokens
from engine.samples import SampleGroups
from engine.scheduler import Scheduler
from engine.sequence import Completion, seed_from_key
from engine.sequence import Sequence as Text
from engine.sizes import ModelSizes
from engine.slicing import load_config, resolve_dtype
from engine.stage import Stage
from engine.stage_loading import load_stage
from engine.structured import Forms
from engine.tokenizer import Tokenizer
from queue_api.errors import (
    ConfigurationError,
    DuplicateRequestError,
    EngineError,
    InvalidRequestError,
    MaxTokensTooLargeError,
    PromptTooLongError,
    RequestOutOfMemoryError,
    UnsupportedModelError,
)
from queue_api.schemas import FinishReason, GenerationRequest, TokenLogprobs

__all__ = ["Engine", "check_devices", "length_limit"]

logger = logging.getLogger(__name__)

_FORM_WAIT_S = 0.02
"""How long a step without other work waits for a form: the caller may have more."""


class Engine:
    """A model on a row of stages, generating for many requests at once.

    Not thread-safe: one thread adds, steps and cancels.
    """

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        stages: Sequence[Stage],
        *,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.model_name = checkpoint.name
        self.model_revision = _revision(checkpoint, config)
        self.tokenizer = tokenizer
        self.stages = stages
        slots = _num_slots(config, stages, max_model_len)
        self.max_model_len = min(max_model_len, slots)
        for stage in stages:
            stage.allocate(slots)
        self.pipeline = _make_pipeline(config, stages)
        allocator = SlotAllocator(slots)
        self._prefixes = PrefixCache(allocator) if _shares_prefixes(config, stages) else None
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
        self._texts: dict[str, Text] = {}
        self._samples = SampleGroups()
        self._forms = Forms(tokenizer)
        self._formless: dict[str, Text] = {}
        """Those whose form is being compiled; the scheduler doesn't have them yet."""
        self._ended: list[Completion] = []
        self._num_added = 0
        self._is_closed = False

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Find the model, cut it into stages and load them.

        :raises ModelNotFoundError: no such folder or Hub id, or a file of it is missing
        :raises UnsupportedModelError: the model can't run here without a risk of wrong text
        :raises PartitionError: the partition doesn't fit the model
        :raises ConfigurationError: a device or a length that isn't there
        """
        started = time.perf_counter()
        trust = config.trust_remote_code
        checkpoint = Checkpoint.find(config.model, config.revision, trust_remote_code=trust)
        model_config = load_config(checkpoint, trust_remote_code=trust)
        text_config = model_config.get_text_config()
        check_devices(config.devices)
        dtype = resolve_dtype(config.dtype, model_config, config.devices)
        limit = length_limit(config, text_config)
        plan = _plan(checkpoint, model_config, dtype, config, limit)
        tokenizer = Tokenizer.load(checkpoint, model_config, trust_remote_code=trust)
        stages = _load_stages(checkpoint, model_config, plan, dtype, config)
        engine = cls(config, checkpoint, tokenizer, stages, max_model_len=limit)
        if any(stage.device.type == "cpu" for stage in stages):
            keep_freed_memory()  # not before: what loading took is given back
        logger.info(
            "%s (%s) ready in %.1f s: layers %s; %s; %s; %s pipeline, %d cache slots",
            checkpoint.name,
            engine.model_revision,
            time.perf_counter() - started,
            plan,
            dtype,
            "/".join(stage.mode for stage in stages),
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
        generated: Sequence[int] = (),
        seed_key: str | None = None,
    ) -> None:
        """Queue a request under `key`.

        :param generated: new tokens that an earlier run of the same request has produced; they
            are read in, counted and kept, and generation goes on behind them (a request that
            wants logprobs begins anew: those of the tokens aren't known any more; so does one
            of several samples)
        :param seed_key: what the seed follows from if the request names none; `key` by default
        :raises RequestError: what is wrong with this request; nothing is queued then
        """
        self._require_open()
        if key in self._texts or key in self._samples:
            raise DuplicateRequestError(f"a request with key {key!r} is already here")
        prompt = self.tokenizer.encode(request)
        sampling = request.sampling
        self._check_length(len(prompt), sampling.max_tokens)
        if len(generated) > sampling.max_tokens:
            raise InvalidRequestError(
                f"resumed with {len(generated)} tokens, max_tokens is {sampling.max_tokens}"
            )
        self.tokenizer.check_vocabulary(generated, "the partial text")
        logprobs = (sampling.logprobs, sampling.prompt_logprobs)
        if logprobs != (None, None) or sampling.n > 1:
            generated = ()  # their logits are gone; the same text is made again, with them
        seed = seed_from_key(seed_key or key) if sampling.seed is None else sampling.seed
        change = LogitsChange.of(sampling, self.tokenizer)
        if sampling.structured_outputs is not None:
            self._forms.order(sampling.structured_outputs)
        keys = [key] if sampling.n == 1 else self._samples.open(key, sampling.n)
        for sample, sample_key in enumerate(keys):
            text = Text.create(
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
            )
            self._num_added += 1
            self._queue(text)

    def _queue(self, text: Text) -> None:
        if text.sampling.structured_outputs is not None and text.form is None:
            self._texts[text.key] = self._formless[text.key] = text
            return
        if text.num_generated and (ending := self._ending(text)):
            self._ended.append(self._complete(text, *ending))
            return
        self._texts[text.key] = text
        self.scheduler.add(text)

    def _take_formed(self) -> list[Completion]:
        """Queue the texts whose form is there, and end those whose form is wrong."""
        failed = []
        for key, text in list(self._formless.items()):
            outputs = text.sampling.structured_outputs
            assert outputs is not None
            try:
                if (form := self._forms.get(outputs)) is None:
                    continue
            except InvalidRequestError as error:
                del self._formless[key], self._texts[key]
                failed.append(self._complete(text, FinishReason.ERROR, 0, error))
                continue
            text.form = form.begin()
            try:
                text.form.accept(text.generated())
            except InvalidRequestError as error:
                logger.warning("%s begins anew: its partial text is refused: %s", key, error)
                text.num_tokens, text.form = text.num_prompt, form.begin()
            del self._formless[key], self._texts[key]
            self._queue(text)
        if not failed and len(self._formless) == len(self._texts):
            self._forms.wait(_FORM_WAIT_S)  # nothing else to do
        return failed

    def cancel(self, key: str) -> bool:
        """Drop a request; it gets no completion. False if it isn't here (any more)."""
        if key in self._samples:
            for sample in self._samples.drop(key):
                self.cancel(sample)
            return True
        text = self._texts.pop(key, None)
        if text is None:
            return False
        text.is_cancelled = True
        if self._formless.pop(key, None) is None and not text.in_flight:
            self._remove(text)
        return True

    def step(self) -> list[Completion]:
        """Run one scheduling round and return the requests that ended in it.

        :raises EngineError: if a stage or its device failed; the engine can't go on
        """
        self._require_open()
        failed = self._take_formed() if self._formless else []
        ended, self._ended = self._ended + failed, []
        now = time.perf_counter()
        for text in self.scheduler.admit():
            if text.admitted_at is None:
                text.admitted_at = now
            self.metrics.prompt_tokens += text.num_tokens
        while self.pipeline.num_in_flight < self.pipeline.capacity:
            work = self.scheduler.schedule()
            for text in self.scheduler.take_preempted():
                self.metrics.preemptions += 1
                self.pipeline.release(text.number)
            if not work:
                break
            self.pipeline.submit(ForwardBatch.pack(work, use_cache=self.config.use_cache))
        if self.pipeline.num_in_flight:
            try:
                batch, logits = self.pipeline.collect()
            except BatchOutOfMemoryError as error:
                ended += self._take_back(error)
            else:
                self._budget.went_well()
                self.scheduler.max_batch_tokens = self._budget.tokens
                ended += self._advance(batch, logits)
        ended, useless = self._samples.gather(ended)
        for key in useless:
            self.cancel(key)
        return ended

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
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
        """Forget the caches of texts that have ended; those that run stay."""
        if self._prefixes is not None:
            self._prefixes.clear()

    def close(self) -> None:
        """Stop the stages' threads and let go of weights and cache; requests are dropped."""
        self._is_closed = True
        self.pipeline.close()
        self.stages = ()
        self._texts.clear()
        self._formless.clear()
        self._samples.clear()
        self._ended.clear()

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineError("the engine is closed")

    # --------------------------------------------------------------------------------- status

    def has_unfinished(self) -> bool:
        """True as long as `step` has something to do or to return."""
        in_flight = self.pipeline.num_in_flight and not self._is_closed
        return bool(self._texts or self._ended or in_flight)

    @property
    def num_running(self) -> int:
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self._formless)

    def describe_work(self) -> str:
        """The metrics in a line for the log."""
        return str(self.metrics)

    def num_free_seqs(self) -> int:
        """How many more requests could run at once, as far as places go."""
        return max(0, self.config.max_num_seqs - self.num_running - self.num_waiting)

    def progress(self) -> Mapping[str, tuple[int, ...]]:
        """New tokens so far of each request of one sample that runs or ran, for checkpoints."""
        preempted = takewhile(lambda text: text.is_preempted, self.scheduler.waiting)
        return {
            text.key: tuple(text.generated())
            for text in chain(self.scheduler.running, preempted)
            if not text.is_cancelled and not self._samples.is_sample(text.key)
        }

    # -------------------------------------------------------------------------------- a round

    def _advance(self, batch: ForwardBatch, logits: torch.Tensor) -> list[Completion]:
        """Take in a micro-batch that came back: note what it computed, choose tokens, end texts."""
        self.metrics.computed_tokens += batch.num_tokens
        for copy in batch.copies:
            if copy.is_move:
                self.metrics.moved_tokens += copy.length
            else:
                self.metrics.cached_prompt_tokens += copy.length
        share = [seconds / len(batch.sequences) for seconds in batch.stage_s]
        for segment, text in zip(batch.segments, batch.sequences, strict=True):
            self.scheduler.computed(text, segment.count)
            text.stage_s = [a + b for a, b in zip(text.stage_s, share, strict=True)]
            if text.is_cancelled:
                self._remove(text)
        if batch.scored:
            note_prompt_logprobs(logits[len(batch.due) :], batch.scored)
            logits = logits[: len(batch.due)]
        tokens = choose_tokens(logits, batch.due) if batch.due else []
        chosen = logprobs_of(logits, tokens, batch.due)
        now = time.perf_counter()
        ended = []
        for row, (text, token) in enumerate(zip(batch.due, tokens, strict=True)):
            if text.is_cancelled:
                continue
            if text.logprobs is not None and row in chosen:
                text.logprobs.append(chosen[row])
            try:
                ending = self._append(text, token, now)
            except Exception as error:  # of this text alone, such as one that can't be decoded
                logger.exception("%s: failed", text.key)
                ended.append(self._end(text, FinishReason.ERROR, error=error))
                continue
            if ending:
                ended.append(self._end(text, *ending))
        return ended

    def _take_back(self, error: BatchOutOfMemoryError) -> list[Completion]:
        """Let a micro-batch's texts run again in smaller ones, or end one that was alone in it.

        Slots that the micro-batch wrote to are written again with the same; a cache outside the
        pool may have grown in some layers only, so its text is computed from its start.
        """
        batch = error.batch
        alone = len(batch.segments) == 1
        too_large = alone and (batch.num_tokens == 1 or not self.config.use_cache)
        ended = []
        for text in batch.sequences:
            self.scheduler.take_back(text)
            if any(stage.mode != "packed" for stage in self.stages):
                text.num_cached = 0
                self.pipeline.release(text.number)
            if text.is_cancelled:
                self._remove(text)
            elif too_large:
                problem = RequestOutOfMemoryError(
                    f"no memory for one text of {text.num_tokens} tokens, even alone: {error}"
                )
                ended.append(self._end(text, FinishReason.ERROR, error=problem))
        if not too_large:
            self._budget.shrink(batch.num_tokens, str(error))
            self.scheduler.max_batch_tokens = self._budget.tokens
        if any(stage.device.type == "cuda" for stage in self.stages):
            torch.cuda.empty_cache()  # what is free, but in pieces
        return ended

    def _append(self, text: Text, token: int, now: float) -> tuple[FinishReason, int | None] | None:
        if token == NO_TOKEN:
            raise ArithmeticError("the model's logits are not numbers, or no token is allowed")
        text.append(token)
        if text.form is not None:
            text.form.accept([token])
        if text.first_token_at is None:
            text.first_token_at = now
        return self._ending(text)

    def _ending(self, text: Text) -> tuple[FinishReason, int | None] | None:
        """Why the text ends with its last token, and where in it a stop string makes the cut."""
        sampling = text.sampling
        last = int(text.token_ids[text.num_tokens - 1])
        if last in sampling.stop_token_ids:
            return FinishReason.STOP, None
        if not sampling.ignore_eos and last in self.tokenizer.eos_token_ids:
            return FinishReason.STOP, None
        if text.form is not None and text.form.is_over:
            return FinishReason.STOP, None
        if sampling.stop and text.num_generated > sampling.min_tokens:
            place = self.tokenizer.find_stop(text.generated(), sampling.stop, sampling.min_tokens)
            if place is not None:
                begin, end = place
                return FinishReason.STOP, end if sampling.include_stop_str_in_output else begin
        if text.num_tokens == text.capacity:
            return FinishReason.LENGTH, None
        return None

    def _end(
        self,
        text: Text,
        reason: FinishReason,
        stop_place: int | None = None,
        error: BaseException | None = None,
    ) -> Completion:
        self._texts.pop(text.key, None)
        self._remove(text)
        try:
            return self._complete(text, reason, stop_place, error)
        except Exception as problem:  # its tokens can't be decoded
            return self._complete(text, FinishReason.ERROR, 0, error or problem)

    def _complete(
        self,
        text: Text,
        reason: FinishReason,
        stop_place: int | None = None,
        error: BaseException | None = None,
    ) -> Completion:
        tokens = text.generated()
        words = "" if stop_place == 0 else self.tokenizer.decode(tokens)[:stop_place]
        return Completion(
            key=text.key,
            text=words,
            token_ids=tokens,
            finish_reason=reason,
            prompt_tokens=text.num_prompt,
            completion_tokens=len(tokens),
            error=error,
            logprobs=None if text.logprobs is None else described(text.logprobs, self.tokenizer),
            prompt_logprobs=self._described_prompt(text),
            structured_output=text.form.status(words) if text.form and error is None else None,
            added_at=text.added_at,
            admitted_at=text.admitted_at,
            first_token_at=text.first_token_at,
            finished_at=time.perf_counter(),
            stage_s=text.stage_s,
        )

    def _described_prompt(self, text: Text) -> list[TokenLogprobs | None] | None:
        if text.prompt_logprobs is None:
            return None
        return [None, *described(text.prompt_logprobs, self.tokenizer)]

    def _remove(self, text: Text) -> None:
        if self.scheduler.remove(text):
            self.pipeline.release(text.number)

    def _check_length(self, num_prompt: int, max_tokens: int) -> None:
        if num_prompt + max_tokens > self.max_model_len:
            fits = num_prompt < self.max_model_len
            raise (MaxTokensTooLargeError if fits else PromptTooLongError)(
                f"{num_prompt} prompt tokens and max_tokens {max_tokens} make "
                f"{num_prompt + max_tokens}; this engine takes {self.max_model_len} together"
            )


def _plan(
    checkpoint: Checkpoint,
    model_config: Any,
    dtype: torch.dtype,
    config: EngineConfig,
    max_model_len: int,
) -> PartitionPlan:
    if config.partition in {"uniform", "custom"}:  # nothing to weigh
        num_layers = model_config.get_text_config().num_hidden_layers
        return plan_partition(num_layers, config.devices, config.partition, config.layer_bounds)
    sizes = ModelSizes.read(checkpoint, model_config)
    rounded = rounded_by(config, model_config, trust_remote_code=config.trust_remote_code)
    costs = CostModel.nominal(sizes, dtype.itemsize, config.devices, rounded)
    return plan_model(config, costs, max_model_len)


def _load_stages(
    checkpoint: Checkpoint,
    model_config: object,
    plan: PartitionPlan,
    dtype: torch.dtype,
    config: EngineConfig,
) -> list[Stage]:
    return [
        load_stage(
            checkpoint,
            model_config,
            spec,
            dtype,
            use_cache=config.use_cache,
            int8=config.int8,
            trust_remote_code=config.trust_remote_code,
        )
        for spec in plan.stages
    ]


def _revision(checkpoint: Checkpoint, config: EngineConfig) -> str | None:
    """Which weights: what was begun with some isn't to go on with others."""
    if config.quantization == "none":
        return checkpoint.revision
    return f"{checkpoint.revision}+{config.quantization}"


def _make_pipeline(config: EngineConfig, stages: Sequence[Stage]) -> Pipeline:
    inline = len({stage.device for stage in stages}) == 1
    if config.pipeline != "auto":
        inline = config.pipeline == "inline"
    return (InlinePipeline if inline else ThreadedPipeline)(stages, config.num_threads)


def _shares_prefixes(config: EngineConfig, stages: Sequence[Stage]) -> bool:
    """Caches outside the pools, as single stages have them, aren't shared."""
    packed = all(stage.mode == "packed" for stage in stages)
    return config.prefix_caching and config.use_cache and packed


def _num_slots(config: EngineConfig, stages: Sequence[Stage], max_model_len: int) -> int:
    """Slots of the cache: as asked for, else what fits and can be of use."""
    if config.kv_cache_tokens is not None:
        return config.kv_cache_tokens
    useful = config.max_num_seqs * max_model_len
    if not config.use_cache:
        return useful
    fitting = fitting_slots((stage.device, stage.slot_bytes) for stage in stages)
    if fitting is None:
        return useful
    if fitting < 1:
        raise ConfigurationError("no memory left for the KV cache beside the weights")
    return min(useful, fitting)


def length_limit(config: EngineConfig, text_config: object) -> int:
    """Tokens that a text may have: the model's limit, or a lower one that was asked for."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(limit := getattr(text_config, name, None), int):
            break
    else:
        limit = config.max_model_len
    if limit is None:
        raise UnsupportedModelError("the model names no maximum length; set max_model_len")
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigurationError(
            f"max_model_len {config.max_model_len} is above the model's limit of {limit}"
        )
    return min(limit, config.max_model_len or limit)


def check_devices(devices: Sequence[str]) -> None:
    """See that they are there.

    :raises ConfigurationError: naming the first that isn't
    """
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigurationError(f"no such device: {name!r}") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigurationError(
                f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices"
            )
