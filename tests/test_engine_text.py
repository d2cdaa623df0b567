"""Texts and stop strings against transformers' decode and stop_strings, for kinds of tokenizers."""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kits.engine_models import CONFIGS, TinyModel, load_reference, make_model
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core
from transformers import PreTrainedTokenizerFast
from transformers.generation import StopStringCriteria

from engine.models.tokenizer import Tokenizer
from engine.requests.detokenizer import Detokenizer
from engine.requests.stop_strings import StopSearch
from queue_api.wire.schemas import GenerationRequest, SamplingParams

BLANK = "\u2581"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
WORDS = ["def f(x):\n", "return", " return", "    return x", "é", "日本語", "👍🏽", "e\u0301", "�"]
WORDS += ["a", " a", "  ", "\n", " the", "👩‍👩‍👧", "ß", "한국", ".", " .", "<|im_end|>"]


def _specials(core: Core) -> PreTrainedTokenizerFast:
    # marked special in the file alone: all_special_ids doesn't know it
    core.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    core.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def _merged(names: list[str], alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary in which these names can be made of their characters, and how."""
    merges: dict[tuple[str, str], None] = {}
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    for name in names:
        for end in range(2, len(name) + 1):
            merges[name[: end - 1], name[end - 1]] = None
            vocab.setdefault(name[:end], len(vocab))
    return vocab, list(merges)


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama 3's or Qwen's; some tokens hold a part of a character beside another."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [whole.pre_tokenize_str(text)[0][0] for text in ("return", " the", "日本", "é")]
    names.append(whole.pre_tokenize_str("a👍")[0][0][:3])
    vocab, merges = _merged(names, alphabet)
    core = Core(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _specials(core)


@functools.cache
def llama_2() -> PreTrainedTokenizerFast:
    """Blanks as a letter, one in front of a text, and bytes for what has no token."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + [BLANK, *map(chr, range(33, 127))]
    names = [BLANK * 4, f"{BLANK}return", f"{BLANK}the", "return"]
    vocab, merges = _merged(names, [*alphabet, "\n", "日", "é", "\u0301"])
    core = Core(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _specials(core)


@functools.cache
def metaspace() -> PreTrainedTokenizerFast:
    """As T5's and other Unigram models': no bytes, the first token's blanks dropped."""
    pieces = [
        BLANK,
        f"{BLANK}return",
        "return",
        f"{BLANK}the",
        "日",
        "本",
        "é",
        "👍",
        "\u0301",
        "\n",
    ]
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    scores += [(piece, -float(len(piece))) for piece in [*pieces, *map(chr, range(33, 127))]]
    core = Core(models.Unigram(scores, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, "always")
    core.decoder = decoders.Metaspace(BLANK, "always")
    return _specials(core)


KINDS = {"byte_level": byte_level, "llama_2": llama_2, "metaspace": metaspace}
texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), max_size=12).map("".join)


@functools.cache
def ours(kind: str) -> Tokenizer:
    plain = KINDS[kind]()
    return Tokenizer(plain, frozenset({2}), len(plain))


def added_text(plain: PreTrainedTokenizerFast, prompt: list[int], new: list[int]) -> str | None:
    """What `new` adds to the decoded prompt; None if it changes the prompt's text."""
    before = plain.decode(prompt, skip_special_tokens=True)
    whole = plain.decode(prompt + new, skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else None


def tokens_of(kind: str, text: str) -> list[int]:
    return KINDS[kind]().encode(text, add_special_tokens=False)


def continuing(kind: str, text: str) -> list[int]:
    """Tokens of `text` as they are behind others."""
    mark = tokens_of(kind, "0")
    tokens = tokens_of(kind, "0" + text)
    assert tokens[: len(mark)] == mark
    return tokens[len(mark) :]


def followed(kind: str, prompt: list[int], new: list[int]) -> str:
    """The text as it grows."""
    detokenizer, text = Detokenizer(ours(kind), prompt), ""
    for token in new:
        drop, added = detokenizer.add(token)
        text = text[: max(0, len(text) - drop)] + added
    return text


def is_text_so_far(text: str, whole: str) -> bool:
    """All of it but a character that lacks its end.

    But for a first blank that the tokenizer drops, and U+FFFD that a prompt shows already of whose
    bytes it holds the first.
    """
    text = text.rstrip(REPLACEMENT)
    return any((more + whole).rstrip(REPLACEMENT) == text for more in ("", " ", REPLACEMENT))


# ------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(texts, texts, st.data())
def test_a_text_goes_on_where_its_prompt_ends(
    kind: str, prompt: str, new: str, data: st.DataObject
) -> None:
    tokens = [1, *tokens_of(kind, prompt + new)]
    cut = data.draw(st.integers(0, len(tokens)))
    prompt_ids, new_ids = tokens[:cut], tokens[cut:]
    expected = added_text(KINDS[kind](), prompt_ids, new_ids)
    if expected is not None:
        assert Detokenizer(ours(kind), prompt_ids).text(new_ids) == expected
        assert is_text_so_far(followed(kind, prompt_ids, new_ids), expected)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@settings(deadline=None)
@given(st.data())
def test_any_tokens_are_decoded_as_transformers_does(kind: str, data: st.DataObject) -> None:
    """Also such as no text has; a run of bytes that isn't UTF-8 is another matter (below)."""
    size = len(KINDS[kind]())
    ids = st.lists(st.integers(0, size + 3), max_size=40)
    prompt, new = data.draw(ids), data.draw(ids)
    expected = added_text(KINDS[kind](), prompt, new)
    if expected is not None:
        assert Detokenizer(ours(kind), prompt).text(new) == expected
        assert is_text_so_far(followed(kind, prompt, new), expected)


@settings(deadline=None)
@given(st.data())
def test_any_byte_tokens_have_the_text_that_transformers_gives(data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, len(llama_2())), max_size=40)
    prompt, new = data.draw(ids), data.draw(ids)
    expected = added_text(llama_2(), prompt, new)
    if expected is not None:
        assert Detokenizer(ours("llama_2"), prompt).text(new) == expected


@pytest.mark.parametrize("kind", ["llama_2", "metaspace"])
def test_the_first_blank_stays(kind: str) -> None:
    prompt, new = tokens_of(kind, "def f(x):\n"), tokens_of(kind, "return")
    assert KINDS[kind]().decode(new) == "return"
    assert Detokenizer(ours(kind), prompt).text(new) == " return"


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_in_any_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ours(kind)
    sizes: list[int] = []
    decode = Tokenizer.decode

    def counting(self: Tokenizer, token_ids: list[int]) -> str:
        sizes.append(len(token_ids))
        return decode(self, token_ids)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    new = tokens_of(kind, "日本語 return the 👍🏽 한국어 " * 60) + [2, len(KINDS[kind]()) + 1] * 50
    new += tokens_of(kind, "한국어한국어" * 40)
    detokenizer = Detokenizer(tokenizer, tokens_of(kind, "the " * 500))
    work = []
    for token in new:
        sizes.clear()
        detokenizer.add(token)
        work.append(sum(sizes))
    assert max(work) <= 32


# ------------------------------------------------------------------------------------------ stops


def stops_after(kind: str, prompt: list[int], new: list[int], stop: list[str]) -> int | None:
    """With how many new tokens transformers' criterion ends the text."""
    criterion = StopStringCriteria(KINDS[kind](), stop)
    scores = torch.zeros(1, 1)
    for count in range(1, len(new) + 1):
        if bool(criterion(torch.tensor([prompt + new[:count]]), scores)[0]):
            return count
    return None


def search(kind: str, prompt: list[int], new: list[int], stop: list[str], min_tokens: int = 0):
    """With how many new tokens ours ends it, and what it found."""
    looking = StopSearch(ours(kind), prompt, stop, min_tokens)
    for count, token in enumerate(new, 1):
        if (found := looking.read([token])) is not None:
            return count, found
    return None, None


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(texts, st.data())
def test_a_stop_string_ends_a_text_where_transformers_ends_it(
    kind: str, text: str, data: st.DataObject
) -> None:
    new = continuing(kind, text)
    prompt = tokens_of(kind, "0123456789" * 3)
    whole = KINDS[kind]().decode(prompt + new)[30:]
    if REPLACEMENT in whole or "<unk>" in whole or not whole:
        return
    begin = data.draw(st.integers(0, len(whole) - 1))
    stop = [whole[begin : begin + data.draw(st.integers(1, 12))], "never there"]
    expected = stops_after(kind, prompt, new, stop)
    count, found = search(kind, prompt, new, stop)
    assert count == expected
    if found is not None:
        shown = added_text(KINDS[kind](), prompt, new[:count])
        assert shown is not None and shown.startswith(found.before)
        at_once = StopSearch(ours(kind), prompt, stop, 0).read(new)
        assert at_once == found


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(texts, st.data())
def test_a_model_s_stop_string_may_begin_in_the_prompt_as_in_transformers(
    kind: str, text: str, data: st.DataObject
) -> None:
    tokens = tokens_of(kind, "0123456789" * 3) + continuing(kind, text)
    first = data.draw(st.integers(max(1, len(tokens) - 6), len(tokens)))
    prompt, new = tokens[:first], tokens[first:]
    whole = KINDS[kind]().decode(tokens)
    if REPLACEMENT in whole or "<unk>" in whole or not new:
        return
    begin = data.draw(st.integers(max(0, len(whole) - 12), len(whole) - 1))
    stop = [whole[begin : begin + data.draw(st.integers(1, 12))], "never there"]
    looking = StopSearch(ours(kind), prompt, stop, 0, may_begin_in_prompt=True)
    finds = [looking.read([token]) for token in new]
    count = next((count for count, found in enumerate(finds, 1) if found is not None), None)
    assert count == stops_after(kind, prompt, new, stop)
    if count is not None:
        shown, found = added_text(KINDS[kind](), prompt, new[:count]), finds[count - 1]
        assert shown is None or shown.startswith(found.before)
        assert stop[0].endswith(found.string)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_s_stop_string_may_begin_with_a_special_token_of_the_prompt(kind: str) -> None:
    end = KINDS[kind]().convert_tokens_to_ids("<|im_end|>")
    prompt = [*tokens_of(kind, "012x"), end, *continuing(kind, "a")]
    new = continuing(kind, "bcdefgh")
    for stop in ("<|im_end|>ab", "x<|im_end|>abc", "abcd", "xab", "|im_end|>abcde"):
        looking = StopSearch(ours(kind), prompt, [stop], 0, may_begin_in_prompt=True)
        count = next((n for n, t in enumerate(new, 1) if looking.read([t]) is not None), None)
        assert count == stops_after(kind, prompt, new, [stop]), stop


@pytest.mark.parametrize("kind", ["byte_level", "llama_2"])
def test_a_stop_string_that_begins_with_a_blank_is_found_in_the_first_token(kind: str) -> None:
    prompt, new = tokens_of(kind, "def f(x):\n"), continuing(kind, " return x")
    for stop in (" ret", " return"):
        count, found = search(kind, prompt, new, [stop])
        assert count == stops_after(kind, prompt, new, [stop])
        assert found.before == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["<|im_end|>", "</s>", "b<|im_end|>", "|im_end|>\n"])
def test_a_stop_string_may_name_a_special_token(kind: str, stop: str) -> None:
    plain = KINDS[kind]()
    end = plain.convert_tokens_to_ids("<|im_end|>")
    new = [*continuing(kind, "ab"), end, *continuing(kind, "\nx</s>")]
    prompt = tokens_of(kind, "0123456789")
    count, found = search(kind, prompt, new, [stop])
    assert count == stops_after(kind, prompt, new, [stop])
    assert count is not None
    shown = plain.decode(prompt + new[:count])[10:]
    before = shown[: shown.index(stop)].replace("<|im_end|>", "")
    assert found.before == before.removesuffix("<")


def test_tokens_marked_special_in_the_file_alone_are_special() -> None:
    plain = byte_level()
    end = plain.convert_tokens_to_ids("<|im_end|>")
    tool = plain.convert_tokens_to_ids("<tool>")
    tokenizer = ours("byte_level")
    assert [tokenizer.special_text(i) for i in (1, 2, end, tool)] == [
        "<s>",
        "</s>",
        "<|im_end|>",
        "",
    ]
    new = [*tokens_of("byte_level", "ab"), end, *tokens_of("byte_level", "cd"), tool]
    count, found = search("byte_level", [], new, ["bc"])
    assert (count, found.before) == (4, "a")
    assert search("byte_level", [], new, ["cd<tool>"])[0] == len(new)


@pytest.mark.parametrize("kind", ["byte_level", "llama_2"])
def test_a_part_of_a_character_is_no_replacement_character(kind: str) -> None:
    prompt = tokens_of(kind, "x")
    emoji = continuing(kind, "a👍b한c")
    assert search(kind, prompt, emoji, [REPLACEMENT])[0] is None
    real = continuing(kind, f"a{REPLACEMENT}b")
    expected = stops_after(kind, prompt, real, [REPLACEMENT])
    count, found = search(kind, prompt, real, [REPLACEMENT])
    assert count == expected == len(real) - 1
    assert found.before == "a"


@pytest.mark.parametrize("kind", ["byte_level", "llama_2"])
@pytest.mark.parametrize("min_tokens", range(6))
def test_min_tokens_counts_tokens_of_half_a_character(kind: str, min_tokens: int) -> None:
    """The emoji has four tokens, and is there with the fourth."""
    prompt, new = tokens_of(kind, "x"), continuing(kind, "👍cb")
    assert len(new) == 6
    count, _ = search(kind, prompt, new, ["👍"], min_tokens)
    assert count == (4 if min_tokens < 4 else None)
    assert search(kind, prompt, new, ["👍c"], min_tokens)[0] == (5 if min_tokens < 5 else None)


@example("", [1], 0)
@given(texts, st.lists(st.integers(0, 40)), st.integers(0, 30))
@settings(deadline=None, max_examples=50)
def test_min_tokens_passes_over_what_ends_before(text: str, cuts: list[int], least: int) -> None:
    new = tokens_of("byte_level", text)
    stop = [s for i in cuts if (s := text[i : i + 3])]
    if not stop:
        return
    count, _ = search("byte_level", [], new, stop, least)
    plain = byte_level()
    floor = len(plain.decode(new[:least], skip_special_tokens=True).rstrip(REPLACEMENT))
    shown = [plain.decode(new[:n], skip_special_tokens=True) for n in range(len(new) + 1)]
    ends = (
        n
        for n in range(least + 1, len(new) + 1)
        for s in stop
        if shown[n].find(s, max(0, floor - len(s) + 1)) >= 0 and REPLACEMENT not in shown[n]
    )
    if REPLACEMENT not in "".join(shown) and "<" not in text:
        assert count == next(ends, None)


# ----------------------------------------------------------------------------------------- engine


@functools.cache
def _model(kind: str) -> TinyModel:
    """A tiny Llama with this kind of tokenizer."""
    folder = Path(tempfile.mkdtemp(prefix="batchmill-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = CONFIGS["llama"]()
    config.vocab_size = len(KINDS[kind]())
    make_model(config, folder)
    KINDS[kind]().save_pretrained(folder)
    return TinyModel(folder, load_reference(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_texts_end_where_generate_ends_them_in_any_batch(kind: str, seed: int) -> None:
    """With stop_strings, also behind an earlier run's tokens."""
    model, plain, draw = _model(kind), KINDS[kind](), random.Random(seed)
    prompts = [tokens_of(kind, text) for text in ("def f(x):\n", "0123", "日本 the", "a</s>b")]
    wanted, engine = {}, model.engine(devices=("cpu", "cpu"), max_num_seqs=3, max_batch_tokens=9)
    for number, prompt in enumerate(prompts):
        whole = model.greedy(prompt)
        pieces = [p for t in whole if REPLACEMENT not in (p := plain.decode([t])) and p.strip()]
        stop = [draw.choice(["never", *pieces]) for _ in range(3)]
        ids = torch.tensor([prompt])
        new = model.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            stop_strings=stop,
            tokenizer=plain,
        )[0, len(prompt) :].tolist()
        wanted[str(number)] = new
        begun = new[: draw.randrange(len(new))]
        params = SamplingParams(max_tokens=24, stop=stop)
        request = GenerationRequest(id=str(number), prompt=prompt, sampling=params)
        engine.add(str(number), request, generated=begun)
    done = {}
    while engine.has_unfinished():
        done.update((completion.key, completion) for completion in engine.step())
    assert {key: completion.token_ids for key, completion in done.items()} == wanted
    for key, completion in done.items():
        text = added_text(plain, prompts[int(key)], completion.token_ids)
        assert text is None or text.startswith(completion.text)
