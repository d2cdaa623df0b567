"""What loading took is given back: pages of files, and weights that others have replaced."""

from __future__ import annotations

import mmap
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from kits.engine_models import requests, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from engine.kernels.malloc import give_back_mapped_files
from engine.models.checkpoint import Checkpoint
from engine.models.module_replacement import replace_modules

MIB = 1 << 20
needs_smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="wants Linux")


def resident_file_bytes() -> int:
    """Of this process's memory, the pages of mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssFile")


@needs_smaps
def test_pages_of_a_mapped_file_are_given_back_and_read_again(tmp_path: Path) -> None:
    path, link = tmp_path / "a.safetensors", tmp_path / "link.safetensors"
    weight = torch.arange(16 * MIB // 4, dtype=torch.float32)
    save_file({"weight": weight}, path)
    link.symlink_to(path)  # as the Hub's cache has its files
    with safe_open(link, framework="pt") as file:
        mapped = file.get_tensor("weight")
        before = resident_file_bytes()
        total = float(mapped.sum())
        touched = resident_file_bytes() - before
        give_back_mapped_files([link])
        given_back = before + touched - resident_file_bytes()
        assert touched > 12 * MIB
        assert given_back > 12 * MIB
        assert float(mapped.sum()) == total


@needs_smaps
def test_a_mapping_that_was_written_to_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(MIB))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[5] = 7
        give_back_mapped_files([path])
        assert mapped[5] == 7


def test_a_replaced_module_is_gone_before_the_next_is_replaced() -> None:
    root = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    root.append(root[0])  # under two names
    seen: list[weakref.ref[nn.Module]] = []

    def new(module: nn.Module) -> nn.Module:
        assert all(earlier() is None for earlier in seen)
        seen.append(weakref.ref(module))
        return nn.Identity()

    replace_modules(root, new)
    assert len(seen) == 3
    assert all(isinstance(module, nn.Identity) for module in root)
    assert root[0] is root[3]


@pytest.mark.parametrize(("dtype", "is_mapped"), [(torch.float32, True), (torch.bfloat16, False)])
@needs_smaps
def test_a_file_whose_weights_are_converted_is_not_mapped(
    dtype: torch.dtype, is_mapped: bool
) -> None:
    checkpoint = Checkpoint.find(str(tiny_model("llama").folder))
    path = str(checkpoint.files()[0])
    held = Path("/proc/self/maps").read_text().count(path)
    with checkpoint.open(list(checkpoint.weight_map), dtype) as tensors:
        weight = tensors["model.norm.weight"][...]
        now = Path("/proc/self/maps").read_text().count(path)
    assert weight.dtype == torch.float32
    del tensors
    assert (now > held) or not is_mapped


_MEASURE = """
import sys
import torch
from pathlib import Path
from engine.config import EngineConfig
from engine.engine import Engine

def mib(name):
    status = Path("/proc/self/status").read_text()
    return next(int(l.split()[1]) >> 10 for l in status.splitlines() if l.startswith(name + ":"))

before = mib("VmRSS")
engine = Engine.load(EngineConfig(sys.argv[1], kv_cache_tokens=64, max_model_len=64))
print(mib("VmHWM") - before, mib("VmRSS") - before)
"""


@needs_smaps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_there_about_once_while_a_model_loads(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=259,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path)
    for file in tiny_model("llama").folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = 4 * sum(p.numel() for p in LlamaForCausalLM(config).parameters()) / MIB
    ended = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    peak, after = map(int, ended.stdout.split())
    assert after < 1.25 * weights
    assert peak < 1.6 * weights


def test_text_is_the_same_once_pages_were_given_back() -> None:
    model = tiny_model("llama")
    engine = model.engine()
    give_back_mapped_files(Checkpoint.find(str(model.folder)).files())
    (completion,) = engine.generate(requests([[5, 6, 7]], max_tokens=8))
    assert completion.token_ids == model.greedy([5, 6, 7], 8)
