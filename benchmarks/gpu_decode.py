"""Decode speed on a CUDA GPU, beside what its memory allows and beside `generate_batch`.

Needs a GPU, and has not been run on one so far: take its first numbers with care.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from random_llama import VOCAB_SIZES, random_llama, random_prompt
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GenerationConfig

from engine.config import EngineConfig
from engine.engine import Engine
from queue_api.wire.schemas import GenerationRequest, SamplingParams

DEVICE = "cuda:0"
COPIED_BYTES = 1 << 30


def copy_bytes_per_s() -> float:
    """Bytes that the GPU reads and writes per second when it copies, the best of ten."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * COPIED_BYTES / best


def weight_bytes(engine: Engine) -> int:
    """Bytes of weights that a decode step reads: all but an input embedding that isn't the head."""
    (stage,) = engine.stages
    model = stage.model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    sizes = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    if embedding.data_ptr() != head.data_ptr():
        del sizes[embedding.data_ptr()]
    return sum(sizes.values())


def as_requests(prompts: Sequence[list[int]], new: int) -> list[GenerationRequest]:
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    return [
        GenerationRequest(id=str(i), prompt=prompt, sampling=params)
        for i, prompt in enumerate(prompts)
    ]


def decode_steps(engine: Engine, prompts: Sequence[list[int]], new: int) -> tuple[int, float]:
    """Steps in which every text gets a token, and their seconds."""
    for i, request in enumerate(as_requests(prompts, new)):
        engine.add(str(i), request)
    while min([len(t) for t in engine.progress().values()] or [0]) < 2:
        engine.step()
    first = min(len(t) for t in engine.progress().values())
    last = max(len(t) for t in engine.progress().values())
    steps = new - last - 1
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds = time.perf_counter() - started
    assert first + steps < new
    while engine.has_unfinished():
        engine.step()
    return steps, seconds


def engine_rows(
    folder: Path, prompts: Sequence[list[int]], new: int, bandwidth: float
) -> Iterator[tuple[str, float, float]]:
    """What was measured, tokens/s, and its share of the limit (0 where there is none)."""
    engine = Engine.load(
        EngineConfig(
            str(folder),
            devices=(DEVICE,),
            dtype="bfloat16",
            max_num_seqs=len(prompts),
            max_batch_tokens=max(2048, len(prompts)),
            prefix_caching=False,
        )
    )
    print(f"attention: {engine.stages[0].attention.name}", file=sys.stderr)
    decode_steps(engine, prompts, new)  # captures the graphs
    steps, seconds = decode_steps(engine, prompts, new)
    cached = sum(map(len, prompts)) + len(prompts) * (new - steps / 2)
    step_bytes = weight_bytes(engine) + cached * engine.stages[0].slot_bytes
    limit = len(prompts) * bandwidth / step_bytes
    speed = len(prompts) * steps / seconds
    yield "memory's limit", limit, 1.0
    yield "decode steps", speed, speed / limit
    started = time.perf_counter()
    engine.generate(as_requests(prompts, new))
    whole = len(prompts) * new / (time.perf_counter() - started)
    engine.close()
    yield "whole texts", whole, 0.0


def peer_row(folder: Path, prompts: Sequence[list[int]], new: int) -> tuple[str, float, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=new)
    seconds = 0.0
    for _ in range(2):  # the first sets up
        started = time.perf_counter()
        outputs = model.generate_batch(list(prompts), config, persistent_manager=True)
        seconds = time.perf_counter() - started
    num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return "generate_batch, whole texts", num_tokens / seconds, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="M2", help="M1, M2 (random weights) or a folder")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=256)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_decode.py needs a CUDA GPU, and torch sees none here")
    made = args.model in VOCAB_SIZES
    vocabulary = VOCAB_SIZES.get(args.model, 1000)
    prompts = [random_prompt(args.prompt_tokens, i, vocabulary) for i in range(args.texts)]
    bandwidth = copy_bytes_per_s()
    name = torch.cuda.get_device_name(DEVICE)
    table = Table(
        title=f"{name}, {args.model}, bfloat16, {args.texts} texts of "
        f"{args.prompt_tokens} + {args.new_tokens} tokens, copies at {bandwidth / 1e9:.0f} GB/s"
    )
    for column in ("", "tokens/s", "of the limit"):
        table.add_column(column, justify="right")
    with random_llama(args.model) if made else contextlib.nullcontext(Path(args.model)) as folder:
        rows = [*engine_rows(folder, prompts, args.new_tokens, bandwidth)]
        rows.append(peer_row(folder, prompts, args.new_tokens))
    for what, speed, share in rows:
        table.add_row(what, f"{speed:,.0f}", f"{share:.0%}" if share else "")
    Console().print(table)


if __name__ == "__main__":
    main()
