"""Trains the demo model from nothing, on text it makes itself: `python -m engine.demo_model.train`.

One seed decides the text, the tokenizer, the first weights and the order of training. The script
prints how many held-out questions it answers right and writes the same to `eval.json`.
"""

import argparse
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.demo_model.conversations import IGNORED, Row, RowMaker, to_batch
from engine.demo_model.corpus import STORIES, draw_question, training_questions
from engine.demo_model.evaluation import TaskScore, overall, score_all, write_scores
from engine.demo_model.vocabulary import MAX_POSITIONS, build_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelShape:
    """Size of the toy; `build_model` adds the vocabulary's size."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a training run."""

    seed: int = 0
    steps: int = 2800
    warmup_steps: int = 60
    matrix_learning_rate: float = 0.02  # Muon, for the layers' matrices
    other_learning_rate: float = 3e-3  # AdamW, for embeddings, norms and the head
    weight_decay: float = 0.02
    questions_per_step: int = 96
    stories_per_step: int = 4
    dialogues_per_step: int = 3
    vocab_size: int = 1280  # an upper bound; the text runs out of merges before
    vocab_texts: int = 20_000


def build_vocabulary(config: TrainConfig) -> PreTrainedTokenizerFast:
    """The tokenizer, trained on a sample of the training text."""
    rng = Random(f"{config.seed}:vocabulary")
    questions = training_questions(rng)
    drawn = [next(questions) for _ in range(config.vocab_texts)]
    drawn += [draw_question(STORIES, rng, held_out=False) for _ in range(config.vocab_texts // 4)]
    return build_tokenizer(
        (text for question in drawn for text in (question.prompt, question.answer)),
        config.vocab_size,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, shape: ModelShape) -> LlamaForCausalLM:
    """An untrained toy. Its embeddings are untied, so that any two layers may be parted."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            max_position_embeddings=MAX_POSITIONS,
            initializer_range=0.04,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.do_sample = False
    return model


def schedule_at(step: int, config: TrainConfig) -> float:
    """Share of the full learning rate: linear warm-up, then half a cosine down to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def build_optimizers(
    model: LlamaForCausalLM, config: TrainConfig
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LambdaLR]]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for the rest."""
    layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in layers}
    rest = [p for p in model.parameters() if id(p) not in inside]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(layers, lr=config.matrix_learning_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(
            rest, lr=config.other_learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: schedule_at(step, config))
        for each in optimizers
    ]
    return optimizers, schedules


def answer_loss(
    model: LlamaForCausalLM, rows: list[Row], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy over the answer tokens of `rows`, and how many those are."""
    tokens, targets = to_batch(rows, pad_id)  # [B, T] both
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state  # [B, T, hidden]
        learned = targets != IGNORED  # [B, T]
        logits = model.lm_head(hidden[learned])  # [N, vocab]: only answers need the head
    loss = functional.cross_entropy(logits.float(), targets[learned], reduction="sum")
    return loss, learned.sum()


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: TrainConfig
) -> list[float]:
    """Train in place; returns the mean loss per answer token (nats) of each step."""
    maker = RowMaker(tokenizer, Random(f"{config.seed}:rows"))
    optimizers, schedules = build_optimizers(model, config)
    losses: list[float] = []
    started = time.perf_counter()
    model.train()
    # At these lengths eager attention in bfloat16 trains a third faster than SDPA on a CPU.
    model.set_attn_implementation("eager")
    for step in range(config.steps):
        batches = maker.micro_batches(
            config.questions_per_step, config.stories_per_step, config.dialogues_per_step
        )
        parts = [answer_loss(model, rows, tokenizer.pad_token_id) for rows in batches]
        loss = torch.stack([part for part, _ in parts]).sum() / sum(count for _, count in parts)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            elapsed_s = time.perf_counter() - started
            mean = sum(losses[-100:]) / 100
            logger.info("step %d: loss %.4f, %.0f s", step + 1, mean, elapsed_s)
    model.set_attn_implementation("sdpa")
    model.eval()
    return losses


def score_table(forms: dict[str, Sequence[TaskScore]]) -> Table:
    """The held-out scores as a table, one column for each prompt form."""
    table = Table("task", "held out by", *forms, title="Held-out questions answered right")
    for scores in zip(*([*scores, overall(scores)] for scores in forms.values()), strict=True):
        cells = [f"{score.right}/{score.total} ({score.rate:.1%})" for score in scores]
        table.add_row(scores[0].task, scores[0].held_out_by, *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score on held-out questions, and save all that `from_pretrained` needs."""
    parser = argparse.ArgumentParser(description="Train the toy demo model from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = TrainConfig(seed=options.seed, steps=options.steps)

    tokenizer = build_vocabulary(config)
    model = build_model(tokenizer, ModelShape())
    logger.info("%d parameters, %d tokens", model.num_parameters(), len(tokenizer))
    train(model, tokenizer, config)
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out, save_jinja_files=False)

    forms: dict[str, Sequence[TaskScore]] = {
        "chat": score_all(model, tokenizer),
        "bare prompt": score_all(model, tokenizer, chat=False),
    }
    write_scores(options.out / "eval.json", forms)
    Console().print(score_table(forms))


if __name__ == "__main__":
    main()
