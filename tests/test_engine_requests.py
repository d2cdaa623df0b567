"""What a request may ask, how it ends, and what is wrong with it stays its own."""

from __future__ import annotations

import functools
import gc
import threading
import weakref

import pytest
from kits.engine_models import CHAT_TEMPLATE, EOS, VOCAB, requests, tiny_model
from transformers import AutoTokenizer

from engine.engine import Engine
from engine.requests.completion import Completion
from engine.requests.stop_strings import FoundStop, StopSearch
from queue_api.store.jobs import request_json
from queue_api.wire.errors import (
    DuplicateRequestError,
    EngineError,
    InvalidRequestError,
    MaxTokensTooLargeError,
    PromptTooLongError,
    RequestError,
)
from queue_api.wire.schemas import FinishReason, GenerationRequest, SamplingParams

MODEL = tiny_model("llama")
TOKENIZER = AutoTokenizer.from_pretrained(MODEL.folder)
PROMPT = [40, 41, 42]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return MODEL.engine(max_num_seqs=4)


def run(engine: Engine, **sampling) -> Completion:
    (completion,) = engine.generate(requests([PROMPT], **sampling))
    return completion


@functools.cache
def prompt_that_ends() -> list[int]:
    """A prompt whose greedy text reaches the end-of-text token after a few tokens."""
    for token in range(3, VOCAB):
        text = MODEL.greedy([token, 7])
        if text[-1] == EOS and len(text) > 2:
            return [token, 7]
    raise LookupError


def refusal(engine: Engine, **fields) -> str:
    """The message of the error that `add` raises, after which the engine knows nothing of it."""
    request = GenerationRequest.parse({"id": "r", **fields})
    with pytest.raises(RequestError) as caught:
        engine.add("r", request)
    assert not engine.has_unfinished()
    return str(caught.value)


# -------------------------------------------------------------------------------------- endings


def test_end_of_text_token_ends_and_counts(engine: Engine) -> None:
    prompt = prompt_that_ends()
    (completion,) = engine.generate(requests([prompt]))
    expected = MODEL.greedy(prompt)
    assert completion.token_ids == expected
    assert completion.token_ids[-1] == EOS
    assert completion.completion_tokens == len(expected)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.text == TOKENIZER.decode(expected[:-1])


def test_ignore_eos_goes_on(engine: Engine) -> None:
    prompt = prompt_that_ends()
    (completion,) = engine.generate(requests([prompt], ignore_eos=True))
    expected = MODEL.greedy(prompt)
    assert completion.token_ids[: len(expected)] == expected
    assert completion.completion_tokens == 24
    assert completion.finish_reason is FinishReason.LENGTH


def test_max_tokens_ends(engine: Engine) -> None:
    completion = run(engine, max_tokens=5)
    assert completion.token_ids == MODEL.greedy(PROMPT)[:5]
    assert completion.finish_reason is FinishReason.LENGTH
    assert (completion.prompt_tokens, completion.completion_tokens) == (3, 5)


def test_stop_token_ends_and_counts(engine: Engine) -> None:
    expected = MODEL.greedy(PROMPT)
    stop = expected[6]
    completion = run(engine, stop_token_ids=[stop], ignore_eos=True)
    assert completion.token_ids == expected[: expected.index(stop) + 1]
    assert completion.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_string_ends_across_tokens_and_is_cut_off(engine: Engine, length: int) -> None:
    tokens = MODEL.greedy(PROMPT)
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True)
    stop = whole[7 : 7 + length]
    completion = run(engine, stop=[stop, "never there"])
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finish_reason is FinishReason.STOP
    ends = next(n for n in range(25) if stop in TOKENIZER.decode(tokens[:n]))
    assert completion.token_ids == tokens[:ends]


def test_the_earliest_of_several_stop_strings_counts(engine: Engine) -> None:
    whole = run(engine).text
    completion = run(engine, stop=[whole[9:11], whole[8:11]])
    assert completion.text == whole[: min(whole.index(whole[9:11]), whole.index(whole[8:11]))]


def test_stop_string_in_the_prompt_is_no_reason_to_stop(engine: Engine) -> None:
    prompt_text = TOKENIZER.decode(PROMPT)
    whole = run(engine)
    assert prompt_text not in whole.text
    assert run(engine, stop=[prompt_text]).token_ids == whole.token_ids


def test_stop_string_of_many_bytes_is_found(engine: Engine) -> None:
    """Characters of several tokens each: the tail that is searched must be long enough."""
    tokenizer = engine.tokenizer
    text = "x" * 50 + "…é𝄞" * 6
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(tokens) == 50 + 9 * 6
    stop = text[48:]
    found = FoundStop(text[:48], stop)

    def search(tokens: list[int]) -> FoundStop | None:
        return StopSearch(tokenizer, PROMPT, [stop], 0).read(tokens)

    assert search(tokens) == found
    assert search(tokens[:-1]) is None
    assert search([*tokens[:60], EOS, EOS, *tokens[60:]]) == found


def test_text_is_the_decoded_tokens_without_specials() -> None:
    model = tiny_model("demo")
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    engine = model.engine()
    completions = engine.generate(requests(["Tell me a story", "2 + 2", "é…"], ignore_eos=True))
    for completion in completions:
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


# -------------------------------------------------------------------------------------- prompts


def test_plain_text_gets_the_tokenizers_special_tokens() -> None:
    model = tiny_model("demo")
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    (completion,) = model.engine().generate(requests(["2 + 2 ="], max_tokens=1))
    assert completion.prompt_tokens == len(tokenizer("2 + 2 =").input_ids)


def test_templated_text_gets_one_bos(engine: Engine) -> None:
    request = GenerationRequest.parse({"id": "r", "messages": [{"role": "user", "content": "hi"}]})
    tokens = engine.tokenizer.encode(request)
    assert tokens.count(TOKENIZER.bos_token_id) == 1
    assert TOKENIZER.decode(tokens, skip_special_tokens=True) == "user: hi\nassistant:"


def test_template_that_raises_is_the_requests_fault(engine: Engine) -> None:
    assert "raise_exception" in CHAT_TEMPLATE
    message = refusal(engine, messages=[{"role": "tool", "content": "x"}])
    assert "chat template refuses the messages: no tools" in message


def test_messages_without_a_template_are_refused(monkeypatch, engine: Engine) -> None:
    monkeypatch.setattr(engine.tokenizer._tokenizer, "chat_template", None)
    message = refusal(engine, messages=[{"role": "user", "content": "x"}])
    assert "no chat template" in message


def test_token_ids_outside_the_vocabulary_are_refused(engine: Engine) -> None:
    assert f"token id {VOCAB}" in refusal(engine, prompt=[5, VOCAB, 6])


def test_text_that_is_not_unicode_is_refused(engine: Engine) -> None:
    request = GenerationRequest.model_construct(id="r", prompt="a\ud800b", messages=None)
    with pytest.raises(InvalidRequestError, match="can't be tokenized"):
        engine.add("r", request)


def test_length_limits_name_the_numbers(engine: Engine) -> None:
    fits = {"max_tokens": 128 - 100}
    engine.add("fits", GenerationRequest.parse({"id": "f", "prompt": [5] * 100, "sampling": fits}))
    assert engine.cancel("fits")
    with pytest.raises(MaxTokensTooLargeError) as caught:
        engine.add("r", GenerationRequest(id="r", prompt=[5] * 100, sampling={"max_tokens": 29}))
    assert caught.value.code == "max_tokens_too_large"
    message = str(caught.value)
    assert "100 prompt tokens and max_tokens 29 make 129; this engine takes 128" in message


def test_max_tokens_that_nobody_gave_is_what_there_is_room_for(engine: Engine) -> None:
    prompt = [5, 6, 7] * 40
    asked = GenerationRequest(id="r", prompt=prompt, sampling=SamplingParams(ignore_eos=True))
    (completion,) = engine.generate([asked])
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.token_ids == MODEL.greedy(prompt, 8)
    as_sent = GenerationRequest.model_validate_json(request_json(asked))
    assert engine.generate([as_sent])[0].token_ids == completion.token_ids
    with pytest.raises(MaxTokensTooLargeError):
        engine.generate([GenerationRequest(id="r", prompt=prompt, sampling={"max_tokens": 128})])
    with pytest.raises(PromptTooLongError):
        engine.generate([GenerationRequest(id="r", prompt=[5] * 128)])
    (full,) = engine.generate([GenerationRequest(id="r", prompt=[5] * 127)])
    assert full.completion_tokens == 1


def test_max_tokens_is_cut_where_a_request_says_so(engine: Engine) -> None:
    prompt = [5, 6, 7] * 40
    fields = {"max_tokens": 1000, "truncate_max_tokens": True, "ignore_eos": True}
    asked = GenerationRequest(id="r", prompt=prompt, sampling=fields)
    (completion,) = engine.generate([asked])
    assert completion.token_ids == MODEL.greedy(prompt, 8)
    # an earlier run's tokens, of a worker that had more room
    engine.add("k", asked, generated=[*completion.token_ids, 9, 9])
    assert finish(engine)["k"].token_ids == completion.token_ids
    with pytest.raises(PromptTooLongError):
        engine.add("k", GenerationRequest(id="r", prompt=[5] * 128, sampling=fields))
    least = SamplingParams(**fields, min_tokens=9)
    with pytest.raises(MaxTokensTooLargeError, match="min_tokens 9"):
        engine.add("k", GenerationRequest(id="r", prompt=prompt, sampling=least))


def test_a_request_that_the_cache_can_never_hold_is_refused() -> None:
    engine = MODEL.engine(kv_cache_tokens=20)
    assert "this engine takes 20" in refusal(engine, prompt=[5] * 15, sampling={"max_tokens": 6})


def test_a_bad_request_touches_no_other(engine: Engine) -> None:
    expected = MODEL.greedy(PROMPT)
    (request,) = requests([PROMPT])
    engine.add("good", request)
    engine.step()
    for prompt in ([VOCAB], [5] * 200):
        with pytest.raises((InvalidRequestError, PromptTooLongError)):
            engine.add("bad", GenerationRequest(id="b", prompt=prompt))
    with pytest.raises(DuplicateRequestError):
        engine.add("good", request)
    assert finish(engine)["good"].token_ids == expected


def test_a_failure_of_one_text_ends_that_text_alone(monkeypatch, engine: Engine) -> None:
    first, second = requests([PROMPT, [50, 51]])
    stop_here = SamplingParams(max_tokens=9, stop=["never there"])
    engine.add("poisoned", first.model_copy(update={"sampling": stop_here}))
    engine.add("good", second)

    def fail(*_: object) -> None:
        raise RuntimeError("decoder gone")

    monkeypatch.setattr(StopSearch, "read", fail)
    done = finish(engine)
    assert done["poisoned"].finish_reason is FinishReason.ERROR
    assert "decoder gone" in str(done["poisoned"].error)
    assert done["good"].token_ids == MODEL.greedy([50, 51])
    engine.reset_prefix_cache()
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_slots


@pytest.mark.parametrize("pipeline", ["inline", "threads"])
def test_a_failing_stage_is_an_engine_error(monkeypatch, pipeline: str) -> None:
    engine = MODEL.engine(devices=("cpu", "cpu"), pipeline=pipeline)
    monkeypatch.setattr(engine.stages[1], "run_packed", lambda *_: 1 / 0)
    (request,) = requests([PROMPT])
    engine.add("k", request)
    with pytest.raises(EngineError, match="stage 1 on cpu failed: ZeroDivisionError"):
        engine.step()
    engine.close()


# --------------------------------------------------------------------------------------- status


def finish(engine: Engine) -> dict[str, Completion]:
    done = {}
    while engine.has_unfinished():
        done.update((completion.key, completion) for completion in engine.step())
    return done


def test_progress_and_counts_follow_the_steps() -> None:
    engine = MODEL.engine(max_num_seqs=2)
    for i, request in enumerate(requests([PROMPT] * 3, ignore_eos=True)):
        engine.add(f"k{i}", request)
    assert (engine.num_running, engine.num_waiting, engine.num_free_seqs()) == (0, 3, 0)
    for _ in range(4):
        engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    expected = run_reference(4)
    assert engine.progress() == {"k0": expected, "k1": expected}
    assert engine.cancel("k0")
    assert not engine.cancel("k0")
    assert set(finish(engine)) == {"k1", "k2"}
    assert engine.num_free_seqs() == 2


def run_reference(count: int) -> tuple[int, ...]:
    return tuple(MODEL.greedy(PROMPT)[:count])


def test_times_are_in_order_and_stages_have_their_share() -> None:
    engine = MODEL.engine(devices=("cpu", "cpu", "cpu"))
    completion = run(engine)
    times = [
        completion.added_at,
        completion.admitted_at,
        completion.first_token_at,
        completion.finished_at,
    ]
    assert times == sorted(times)
    assert len(completion.stage_s) == 3
    assert all(share > 0 for share in completion.stage_s)
    assert sum(completion.stage_s) <= completion.finished_at - completion.admitted_at


def test_resuming_with_an_ended_text_computes_nothing(engine: Engine) -> None:
    prompt = prompt_that_ends()
    generated = MODEL.greedy(prompt)
    (request,) = requests([prompt])
    engine.add("k", request, generated=generated)
    assert engine.num_waiting == 0
    (completion,) = engine.step()
    assert completion.token_ids == generated
    assert completion.finish_reason is FinishReason.STOP
    assert completion.admitted_at is None


@pytest.mark.parametrize("pipeline", ["inline", "threads"])
def test_a_closed_engine_lets_go_and_says_so(pipeline: str) -> None:
    engine = MODEL.engine(devices=("cpu", "cpu"), pipeline=pipeline)
    weights = [weakref.ref(stage.model) for stage in engine.stages]
    threads = threading.active_count()
    (request,) = requests([PROMPT])
    engine.add("k", request)
    engine.step()
    engine.close()
    assert threading.active_count() == threads - (2 if pipeline == "threads" else 0)
    gc.collect()
    assert [weight() for weight in weights] == [None, None]
    assert not engine.has_unfinished()
    with pytest.raises(EngineError, match="closed"):
        engine.step()
    engine.close()


@pytest.mark.parametrize("token", [VOCAB, 2**32 - 1, -1])
def test_a_partial_text_of_unknown_tokens_is_refused(engine: Engine, token: int) -> None:
    (request,) = requests([PROMPT])
    with pytest.raises(InvalidRequestError, match=f"token id {token} in the partial text"):
        engine.add("k", request, generated=[40, token])
    assert not engine.has_unfinished()
