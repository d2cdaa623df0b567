"""Random-weight Llamas with a tokenizer of their own, made on demand; nothing is downloaded."""

from __future__ import annotations

import logging
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MODELS", "ModelSpec", "build", "source_texts"]

logger = logging.getLogger(__name__)

SEED = 0
END_OF_TEXT = "<|endoftext|>"
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip"}


@dataclass(frozen=True)
class ModelSpec:
    """The shape of an untied Llama with heads of 64."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int = 64

    @property
    def layer_linears(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's matrix products, with q/k/v and gate/up as one each."""
        attention = self.heads * self.head_dim
        return [
            (self.hidden, attention + 2 * self.kv_heads * self.head_dim),
            (attention, self.hidden),
            (self.hidden, 2 * self.ffn),
            (self.ffn, self.hidden),
        ]

    @property
    def head_linear(self) -> tuple[int, int]:
        return (self.hidden, self.vocab)

    def flops(self, num_tokens: int, num_outputs: int) -> int:
        """Of the matrix products alone: `num_tokens` through the layers, `num_outputs` logits."""
        per_layer = sum(i * o for i, o in self.layer_linears)
        head_in, head_out = self.head_linear
        return 2 * (self.layers * per_layer * num_tokens + head_in * head_out * num_outputs)


MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec("tiny", 128, 2, 2, 1, 256, 512),
        ModelSpec("M1", 512, 8, 8, 4, 1408, 8192),
        ModelSpec("M2", 1024, 16, 16, 8, 2816, 32000),
    )
}


def build(spec: ModelSpec, cache: Path) -> Path:
    """The model's folder under `cache`, made if it isn't there: fp32 safetensors, tokenizer."""
    folder = cache / spec.name / "model"
    if folder.exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    logger.info("making model %s in %s", spec.name, folder)
    # A build that is interrupted must not be taken for a model later.
    unfinished = folder.with_name("model.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.ffn,
        vocab_size=spec.vocab,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(unfinished)
    _train_tokenizer(spec.vocab).save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def _train_tokenizer(vocab: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(source_texts(), trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise RuntimeError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )


def source_texts() -> Iterator[str]:
    """The running Python's standard library, file by file in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not LEFT_OUT.intersection(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")
