"""Tiny random models that the engine's tests run and compare with transformers."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from engine.config import EngineConfig
from engine.demo_model import DEMO_MODEL_PATH
from engine.engine import Engine
from queue_api.wire.schemas import GenerationRequest, SamplingParams

VOCAB = 3 + 256  # special tokens and bytes
EOS = 2
LAYERS = 6
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_COMMON = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_ROPE = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Large weights make peaked logits: no near ties, so that greedy text is well defined.
    "initializer_range": 0.3,
}
# Gemma scales its embedding up; tied to the head it would only repeat itself.
SMALL = {**_ROPE, "tie_word_embeddings": False}
"""What most configs call the sizes and tokens of a small model."""

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_ROPE),
    "qwen2": lambda: transformers.Qwen2Config(**_ROPE, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_ROPE, sliding_window=9),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, sliding_window=9, query_pre_attn_scalar=8, attn_logit_softcapping=5.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, sliding_window=9, query_pre_attn_scalar=8, sliding_window_pattern=3
    ),
    "gpt2": lambda: transformers.GPT2Config(
        **_COMMON, n_embd=32, n_layer=LAYERS, n_head=4, initializer_range=0.6
    ),
}


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A saved model and transformers' own instance of it, untouched by the engine."""

    folder: Path
    reference: Any
    _greedy: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def greedy(self, prompt: Sequence[int], max_tokens: int = 24) -> list[int]:
        """The new tokens of `transformers.generate`; computed once per prompt."""
        key = (max_tokens, *prompt)
        if key not in self._greedy:
            ids = torch.tensor([list(prompt)])
            with torch.inference_mode():
                out = self.reference.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                )
            self._greedy[key] = out[0, len(prompt) :].tolist()
        return self._greedy[key]

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """The reference's logits [len(tokens), V]."""
        with torch.inference_mode():
            logits: torch.Tensor = self.reference(torch.tensor([list(tokens)])).logits[0]
        return logits

    def engine(self, **config: Any) -> Engine:
        return Engine.load(EngineConfig(str(self.folder), **config))


def mixed_prompts(count: int = 16, longest: int = 40) -> list[list[int]]:
    """Random prompts of mixed lengths from a fixed seed, one of a single token among them."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    lengths[count // 2] = 1
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def requests(
    prompts: Iterable[str | list[int]], *, max_tokens: int = 24, **sampling: Any
) -> list[GenerationRequest]:
    """Requests with ids 0, 1, …"""
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return [
        GenerationRequest(id=str(i), prompt=prompt, sampling=params)
        for i, prompt in enumerate(prompts)
    ]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, behind three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(config: Any, folder: Path, *, max_shard_size: str = "5GB") -> TinyModel:
    """Build and save a model with weights from a fixed seed; load it again as the reference."""
    torch.manual_seed(sum(map(ord, type(config).__name__)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = EOS
    # Norms and biases start as ones and zeros; random ones show a layer that got another's.
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.1 if "norm" in key else 0.3))
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return TinyModel(folder, load_reference(folder))


def load_reference(folder: Path) -> Any:
    """transformers' own model; eager where its SDPA may leave out Gemma 2's soft-capping."""
    soft_capped = "gemma2" in (folder / "config.json").read_text()
    kwargs = {"attn_implementation": "eager"} if soft_capped else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="batchmill-tests-")  # removed at exit


@functools.cache
def tiny_model(name: str) -> TinyModel:
    """One of CONFIGS, or `demo`: made or loaded once per test run."""
    if name == "demo":
        return TinyModel(DEMO_MODEL_PATH, load_reference(DEMO_MODEL_PATH))
    return make_model(CONFIGS[name](), Path(_scratch().name) / name)
