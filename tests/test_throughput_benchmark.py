"""The throughput benchmark: its workload is the published one, and it runs from end to end."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.throughput.contest import CONTESTANTS
from benchmarks.throughput.models import MODELS
from benchmarks.throughput.report import table
from benchmarks.throughput.workload import QUICK, W, Workload

ROOT = Path(__file__).resolve().parents[1]


def test_w_has_the_published_totals():
    prompts, outputs = random.Random(W.prompt_seed), random.Random(W.output_seed)
    number = W.num_requests
    assert sum(prompts.randint(*W.prompt_tokens) for _ in range(number)) == 17029
    assert sum(outputs.randint(*W.output_tokens) for _ in range(number)) == 8927


def test_flops_count_layers_for_fed_tokens_and_the_head_for_outputs():
    work = Workload(prompts=[[1, 2, 3]], outputs=[2])
    assert work.num_forward_tokens == 4  # the second output is never fed
    tiny = MODELS["tiny"]
    weights = sum(i * o for i, o in tiny.layer_linears) * tiny.layers
    head = tiny.hidden * tiny.vocab
    assert tiny.flops(4, 2) == 2 * (4 * weights + 2 * head)


def test_w_on_m1_is_the_published_amount_of_work():
    assert MODELS["M1"].flops(17029 + 8927 - 128, 8927) == pytest.approx(1.3e12, rel=0.01)


def test_keys_of_contestants_are_unique():
    keys = [contestant.key for contestant in CONTESTANTS]
    assert len(set(keys)) == len(keys)


def test_a_failed_engine_is_in_the_table_with_its_reason():
    limit = {"tokens_per_s": 100.0, "layers_at": "linear, 512 rows"}
    model = {
        "requests": 1,
        "prompt_tokens": 1,
        "output_tokens": 1,
        "flops": 1,
        "gemm_limit": limit,
        "engines": {"x": {"title": "X", "error": "ImportError: no x"}},
    }
    assert "| X | failed: ImportError: no x |" in table("M1", model)


@pytest.mark.slow
def test_quick_run_writes_the_same_tokens_as_generate(tmp_path):
    command = [sys.executable, "-m", "benchmarks.throughput", "--quick", "--repeat", "1"]
    engines = ["--engines", "batchmill,batchmill-2,hf-static,hf-batch"]
    places = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    subprocess.run([*command, *engines, *places], cwd=ROOT, check=True, timeout=280)
    summary = json.loads((tmp_path / "out" / "throughput.json").read_text())
    engines = summary["models"]["tiny"]["engines"]
    assert len(engines) == 4
    for engine in engines.values():
        assert engine["equal_requests"] == QUICK.num_requests
        assert engine["peak_bytes"] > 0
