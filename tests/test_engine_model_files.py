"""A model's folder as people have it: which files count, and a line that names what is damaged."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from kits.engine_models import SMALL, TinyModel, load_reference, make_model, requests, tiny_model
from transformers import AutoModelForCausalLM

from engine.models.checkpoint import INDEX_FILE, SINGLE_FILE
from queue_api.wire.errors import BatchmillError, ModelNotFoundError, UnsupportedModelError

PROMPT = [10, 20, 30, 40, 50]
_SIZES = {**SMALL, "num_hidden_layers": 4}


def sharded(folder: Path) -> TinyModel:
    return make_model(transformers.LlamaConfig(**_SIZES), folder, max_shard_size="60KB")


def text_of(model: TinyModel, num_stages: int = 1) -> list[int]:
    engine = model.engine(devices=("cpu",) * num_stages)
    (completion,) = engine.generate(requests([PROMPT], max_tokens=12))
    return completion.token_ids


def as_transformers(folder: Path) -> list[int]:
    return TinyModel(folder, load_reference(folder)).greedy(PROMPT, 12)


# ------------------------------------------------------------------------------ which weights


@pytest.fixture
def two_sets(tmp_path: Path) -> TinyModel:
    """A folder with shards and their index, and another model's `model.safetensors` beside them."""
    model = sharded(tmp_path / "model")
    single = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_SIZES))
    single.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / SINGLE_FILE, model.folder)
    return model


@pytest.mark.parametrize("num_stages", [1, 2])
def test_the_single_file_goes_before_the_index_as_in_transformers(
    num_stages: int, two_sets: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "engine.models.checkpoint")
    expected = as_transformers(two_sets.folder)
    assert expected != two_sets.greedy(PROMPT, 12), "the two sets give the same text"
    assert text_of(two_sets, num_stages) == expected
    assert SINGLE_FILE in caplog.text
    assert INDEX_FILE in caplog.text


def test_an_index_whose_shards_are_gone_refuses_no_good_folder(tmp_path: Path) -> None:
    """What `save_pretrained` leaves behind when a smaller model goes into the same folder."""
    model = sharded(tmp_path)
    single = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_SIZES))
    single.save_pretrained(tmp_path)
    assert (tmp_path / INDEX_FILE).exists()
    for shard in tmp_path.glob("model-0*.safetensors"):
        shard.unlink()
    assert text_of(model) == as_transformers(tmp_path)


def test_the_config_may_name_the_weights(tmp_path: Path) -> None:
    model = make_model(transformers.LlamaConfig(**_SIZES), tmp_path)
    (tmp_path / SINGLE_FILE).rename(tmp_path / "other.safetensors")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert text_of(model) == as_transformers(tmp_path)
    path.write_text(json.dumps({**config, "transformers_weights": "../other.safetensors"}))
    with pytest.raises(ModelNotFoundError, match="which 'transformers_weights' in"):
        model.engine()


def test_tensors_are_where_the_shards_say_whatever_the_index_does(tmp_path: Path) -> None:
    model = sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = dict.fromkeys(index["weight_map"], files[-1]) | {"none": files[0]}
    index["weight_map"] |= {f"none.{i}": file for i, file in enumerate(files)}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    assert text_of(model, 2) == as_transformers(tmp_path)


def test_an_adapter_is_not_passed_over(tmp_path: Path) -> None:
    model = make_model(transformers.LlamaConfig(**_SIZES), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"adapter_config\.json\): merge it"):
        model.engine()


# ------------------------------------------------------------------------------- damaged files

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
_LLAMA = '{"model_type": "llama", '

# Each with what the message must name.
DAMAGED: list[tuple[str, str | bytes, str]] = [
    *(
        (name, content, name)
        for name in (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, SPECIAL, "added_tokens.json")
        for content in ("", '{"eos_token": 2,', "[]", "null", "3", b"\xff\xfe{", "[" * 100_000)
    ),
    (CONFIG, "{}", "model_type"),
    (CONFIG, '{"model_type": 3}', "'model_type' is 3"),
    (CONFIG, '{"model_type": "nosuch"}', "nosuch"),
    (CONFIG, _LLAMA + '"num_hidden_layers": "two"}', "num_hidden_layers"),
    (CONFIG, _LLAMA + '"num_hidden_layers": 0}', "'num_hidden_layers' is 0"),
    (CONFIG, _LLAMA + '"vocab_size": -2}', "'vocab_size' is -2"),
    (CONFIG, _LLAMA + '"eos_token_id": "2"}', "'eos_token_id' is \"2\""),
    (CONFIG, _LLAMA + '"hidden_act": "swish9"}', "swish9"),
    (CONFIG, _LLAMA + '"rope_parameters": {"rope_type": "sinus"}}', "sinus"),
    (CONFIG, _LLAMA + '"dtype": "float99"}', "float99"),
    # Without its sizes it is a model of seven billion, of which nothing is made.
    (CONFIG, '{"model_type": "llama"}', r"config.json doesn't fit the weights"),
    (GENERATION, '{"max_new_tokens": -5}', "max_new_tokens"),
    (GENERATION, '{"eos_token_id": "2"}', "'eos_token_id' is \"2\""),
    (GENERATION, '{"eos_token_id": [2, null]}', "'eos_token_id' is [2, null]"),
    (GENERATION, '{"eos_token_id": true}', "'eos_token_id' is true"),
    (TOKENIZER, "{}", TOKENIZER),
    (TOKENIZER, '{"model": {}}', TOKENIZER),
    (TOKENIZER_CONFIG, '{"chat_template": 3}', "'chat_template' is 3"),
    (TOKENIZER_CONFIG, '{"chat_template": "{% for m in"}', "chat template has an error in line 1"),
    (TOKENIZER_CONFIG, '{"chat_template": [{"name": "a"}]}', "'chat_template'"),
    (TOKENIZER_CONFIG, '{"eos_token": 3}', "'eos_token' is 3"),
    (TOKENIZER_CONFIG, '{"added_tokens_decoder": []}', "'added_tokens_decoder'"),
    (SPECIAL, '{"pad_token": {"text": "x"}}', "'pad_token'"),
    ("added_tokens.json", '{"a": "b"}', "added_tokens.json"),
    (TEMPLATE, "{% for m in messages %}\n{{ m", "error in line 2"),
    (TEMPLATE, b"\xff\xfe\x00", TEMPLATE),
    (SINGLE_FILE, b"", SINGLE_FILE),
    (SINGLE_FILE, b"\x10", SINGLE_FILE),
    (SINGLE_FILE, b"\x02\0\0\0\0\0\0\0[]", SINGLE_FILE),
    (SINGLE_FILE, b"\xff" * 200, SINGLE_FILE),
    (INDEX_FILE, "", INDEX_FILE),
    (INDEX_FILE, "{", INDEX_FILE),
    (INDEX_FILE, "[]", INDEX_FILE),
    (INDEX_FILE, "{}", "'weight_map'"),
    (INDEX_FILE, '{"weight_map": []}', "'weight_map'"),
    (INDEX_FILE, '{"weight_map": {"a": 1}}', "'a' in 'weight_map' is 1"),
    (INDEX_FILE, '{"weight_map": {"a": "../a"}}', "'../a'"),
    (INDEX_FILE, '{"weight_map": {"model.norm.weight": "gone"}}', "gone"),
]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama").folder, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "named"), DAMAGED, ids=[f"{n}-{c[:40]!r}" for n, c, _ in DAMAGED]
)
def test_a_damaged_file_is_named_in_a_line(
    name: str, content: str | bytes, named: str, llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if name == INDEX_FILE:
        (llama / SINGLE_FILE).unlink()
    (llama / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises((UnsupportedModelError, ModelNotFoundError)) as caught:
        TinyModel(llama, None).engine()
    assert named in str(caught.value)
    assert str(llama) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("name", [CONFIG, GENERATION, TOKENIZER_CONFIG, SINGLE_FILE, TOKENIZER])
def test_a_folder_in_a_files_place_is_named(name: str, llama: Path) -> None:
    (llama / name).unlink()
    (llama / name).mkdir()
    with pytest.raises(BatchmillError, match=name) as caught:
        TinyModel(llama, None).engine()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, SINGLE_FILE, GENERATION, TOKENIZER_CONFIG])
def test_a_file_cut_short_anywhere_is_named(name: str, llama: Path) -> None:
    whole = (llama / name).read_bytes()
    for part in (1, 2, 3):
        (llama / name).write_bytes(whole[: len(whole) * part // 4])
        with pytest.raises(BatchmillError, match=name) as caught:
            TinyModel(llama, None).engine()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [(GENERATION, '{"eos_token_id": 2,'), (TOKENIZER, "{}"), (CONFIG, "null")]
)
def test_run_ends_with_one_line_and_status_2(name: str, content: str, llama: Path) -> None:
    (llama / name).write_text(content)
    rows = llama.parent / "in.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    output = llama.parent / "out.jsonl"
    command = [sys.executable, "-m", "batchmill", "run", str(rows), "-o", str(output)]
    ended = subprocess.run(
        [*command, "--model", str(llama)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    naming = [line for line in ended.stderr.splitlines() if str(llama / name) in line]
    assert naming, ended.stderr
    assert "restart" not in ended.stderr


# ---------------------------------------------------------------------------- the Hub's cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_ASK = """
import sys
from engine.config import EngineConfig
from engine.engine import Engine
from queue_api.wire.errors import BatchmillError
from queue_api.wire.schemas import GenerationRequest, SamplingParams
sampling = SamplingParams(max_tokens=12)
try:
    engine = Engine.load(EngineConfig("org/tiny", devices=("cpu",) * 2))
    print(engine.generate([GenerationRequest(id="a", prompt=[10, 20, 30], sampling=sampling)])[0]
          .token_ids)
except BatchmillError as error:
    print(type(error).__name__, error)
"""
_ASK_TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained("org/tiny")
model = AutoModelForCausalLM.from_pretrained("org/tiny", dtype=torch.float32)
ids = torch.tensor([[10, 20, 30]])
made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
print(made[0, 3:].tolist())
"""


class HubCache:
    """A cache as the Hub's client keeps it, of one model, and who looks into it offline."""

    def __init__(self, home: Path, model: TinyModel) -> None:
        self._home = home
        self.repo = home / "hub" / "models--org--tiny"
        self.snapshot = self.repo / "snapshots" / COMMIT
        shutil.copytree(model.folder, self.snapshot)
        (self.repo / "refs").mkdir()
        (self.repo / "refs" / "main").write_text(COMMIT)

    def list_tree(self, *others: str) -> None:
        """Note which files the repository has, as a download of a snapshot does."""
        cache = pytest.importorskip("huggingface_hub._tree_cache")
        names = [*(path.name for path in self.snapshot.iterdir()), *others]
        entry = cache.TreeCacheEntry(size=1, blob_id="0" * 40)
        cache.write_tree_cache(str(self.repo), COMMIT, dict.fromkeys(names, entry))

    def ask(self, program: str) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(self._home)}
        environment.pop("HF_HUB_CACHE", None)
        ended = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=environment,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip().splitlines()[-1]


@pytest.fixture
def cache(tmp_path: Path) -> HubCache:
    return HubCache(tmp_path / "home", sharded(tmp_path / "model"))


def test_a_cached_model_loads_offline_as_in_transformers(cache: HubCache) -> None:
    assert cache.ask(_ASK) == cache.ask(_ASK_TRANSFORMERS)


def test_files_that_nobody_reads_may_be_missing_from_the_cache(cache: HubCache) -> None:
    cache.list_tree("onnx/config.json", "notes.txt", "README.md")
    assert cache.ask(_ASK) == cache.ask(_ASK_TRANSFORMERS)


@pytest.mark.parametrize("name", ["model-00001-of-", "config.json", "token", INDEX_FILE])
def test_a_file_missing_from_the_cache_is_named(name: str, cache: HubCache) -> None:
    cache.list_tree()
    gone = [path for path in cache.snapshot.iterdir() if path.name.startswith(name)]
    assert gone
    for path in gone:
        path.unlink()
    said = cache.ask(_ASK)
    assert said.startswith("ModelNotFoundError")
    # Without the index nothing tells of shards.
    assert (SINGLE_FILE if name == INDEX_FILE else name) in said


def test_a_model_that_is_not_cached_is_named(cache: HubCache) -> None:
    said = cache.ask(_ASK.replace("org/tiny", "org/other"))
    assert "org/other is neither a folder nor in the local cache" in said
