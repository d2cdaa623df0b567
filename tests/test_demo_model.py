"""The toy model that ships with the package does what its page says."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.demo_model import DEMO_MODEL_PATH
from engine.demo_model.conversations import IGNORED, RowMaker
from engine.demo_model.corpus import (
    STORIES,
    TASKS,
    draw_question,
    held_out_questions,
    is_held_out,
    training_questions,
)
from engine.demo_model.evaluation import answer, chat_text, is_right
from engine.demo_model.examples import example_rows
from engine.demo_model.train import ModelShape, TrainConfig, build_model, build_vocabulary, train
from queue_api.wire.schemas import GenerationRequest

EXAMPLES = Path(__file__).parent.parent / "examples" / "prompts.jsonl"


@pytest.fixture(scope="module")
def toy():
    return SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(DEMO_MODEL_PATH).eval(),
        tokenizer=AutoTokenizer.from_pretrained(DEMO_MODEL_PATH),
        scores=json.loads((DEMO_MODEL_PATH / "eval.json").read_text(encoding="utf-8")),
    )


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return build_vocabulary(TrainConfig(vocab_texts=500))


def test_finding_the_demo_model_does_not_load_torch():
    check = "import sys, engine.demo_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_toy_is_a_small_llama_that_can_be_cut_anywhere(toy):
    assert toy.model.config.model_type == "llama"
    assert 1_000_000 <= toy.model.num_parameters() <= 5_000_000
    assert toy.model.config.num_hidden_layers >= 4
    assert not toy.model.config.tie_word_embeddings
    assert toy.model.config.num_key_value_heads < toy.model.config.num_attention_heads
    assert sum(file.stat().st_size for file in DEMO_MODEL_PATH.iterdir()) < 10_000_000


@pytest.mark.parametrize("form", ["chat", "bare prompt"])
def test_held_out_questions_are_answered_as_often_as_stated(toy, form):
    questions = [question for task in TASKS for question in held_out_questions(task, 200)]
    asked = Random(7).sample(questions, 80)
    replies = answer(toy.model, toy.tokenizer, [q.prompt for q in asked], chat=form == "chat")
    right = sum(
        is_right(q, text, finished=done) for q, (text, done) in zip(asked, replies, strict=True)
    )
    assert right / len(asked) >= toy.scores[form][0]["rate"] - 0.06


def test_the_stated_scores_repeat_for_single_tasks(toy):
    stated = {score["task"]: score for score in toy.scores["chat"]}
    assert set(stated) == {"all questions", STORIES.name} | {task.name for task in TASKS}
    for task in TASKS:
        if stated[task.name]["total"] <= 40:
            questions = held_out_questions(task, 200)
            replies = answer(toy.model, toy.tokenizer, [q.prompt for q in questions])
            right = sum(
                is_right(q, text, finished=done)
                for q, (text, done) in zip(questions, replies, strict=True)
            )
            # Other processors round otherwise: one near tie may fall the other way.
            assert abs(right - stated[task.name]["right"]) <= 1


def test_stories_end_by_themselves_and_use_their_words(toy):
    stories = held_out_questions(STORIES, 16)
    replies = answer(toy.model, toy.tokenizer, [story.prompt for story in stories])
    right = sum(
        is_right(s, text, finished=done) for s, (text, done) in zip(stories, replies, strict=True)
    )
    assert right >= 13
    assert len({len(text) for text, _ in replies}) > 4


def test_held_out_questions_are_kept_from_training():
    rng = Random(3)
    questions = training_questions(rng)
    drawn = [next(questions) for _ in range(5000)]
    drawn += [draw_question(STORIES, rng, held_out=False) for _ in range(500)]
    trained = {question.prompt for question in drawn}
    held_out = {q.prompt for task in (*TASKS, STORIES) for q in held_out_questions(task, 200)}
    assert not trained & held_out
    assert not any(is_held_out(question.task, question.key) for question in drawn)


def test_the_chat_template_writes_one_bos_and_asks_for_an_answer(toy):
    messages = [{"role": "user", "content": "Spell LAMP."}]
    text = chat_text(toy.tokenizer, "Spell LAMP.")
    assert text == "<|bos|><|user|>Spell LAMP.<|assistant|>"
    ids = toy.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids == toy.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(toy.tokenizer.bos_token_id) == 1
    assert toy.tokenizer("Spell LAMP.")["input_ids"].count(toy.tokenizer.bos_token_id) == 1


def test_a_finished_turn_ends_as_in_training(toy):
    chat = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Spell UP."},
        {"role": "assistant", "content": "U-P"},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    text = toy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Answer briefly.<|user|>Spell UP.<|assistant|>U-P<|eos|>"
        "<|user|>What is 1 + 1?<|assistant|>"
    )


@pytest.mark.parametrize("text", ["naïve 😀 日本語", "tab\tand\nnewline", "", "İ ﷽ \u0000"])
def test_any_text_tokenizes_and_comes_back(toy, text):
    ids = toy.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert toy.tokenizer.decode(ids) == text


def test_digits_and_capitals_stand_alone_and_words_stay_whole(toy):
    assert toy.tokenizer.tokenize("Reverse the word LAMP.")[-5:] == ["L", "A", "M", "P", "."]
    assert toy.tokenizer.tokenize("128") == ["1", "2", "8"]
    assert len(toy.tokenizer.tokenize(" river garden")) == 2


def test_the_loss_falls_on_answers_only(tiny_tokenizer):
    maker = RowMaker(tiny_tokenizer, Random(0))
    for row in (row for batch in maker.micro_batches(40, 2, 4) for row in batch):
        learned = [target for target in row.targets if target != IGNORED]
        assert learned.count(tiny_tokenizer.eos_token_id) >= 1
        assert learned[-1] == tiny_tokenizer.eos_token_id
        user = tiny_tokenizer.vocab["<|user|>"]
        assert user not in learned


def test_training_lowers_the_loss_and_repeats_with_its_seed(tiny_tokenizer, tmp_path):
    config = TrainConfig(
        steps=30,
        warmup_steps=5,
        questions_per_step=12,
        stories_per_step=1,
        dialogues_per_step=1,
    )
    shape = ModelShape(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)

    def run():
        torch.manual_seed(0)
        model = build_model(tiny_tokenizer, shape)
        return model, train(model, tiny_tokenizer, config)

    model, losses = run()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert run()[1] == pytest.approx(losses, rel=1e-3)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path, save_jinja_files=False)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_the_example_dataset_is_what_the_code_writes():
    written = [json.loads(line) for line in EXAMPLES.read_text(encoding="utf-8").splitlines()]
    assert written == example_rows()
    assert len(written) == len({row["id"] for row in written}) == 240
    for row in written:
        GenerationRequest.model_validate(
            {field: row[field] for field in ("id", "prompt", "messages") if field in row}
        )
