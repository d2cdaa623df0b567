"""Random-weight Llamas for measuring: the same shapes and seed everywhere, made on the spot.

M1 and M2 are the models of the throughput comparison. What they write is nonsense; how long they
take for it is not.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from engine.demo_model import DEMO_MODEL_PATH

SHAPES = {
    "M1": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408},
    "M2": {"hidden_size": 1024, "num_hidden_layers": 16, "intermediate_size": 2816},
}
VOCAB_SIZES = {"M1": 8192, "M2": 32000}


@contextmanager
def random_llama(name: Literal["M1", "M2"]) -> Iterator[Path]:
    """A folder with the model, removed at the end. Prompts are to be token ids."""
    shape = SHAPES[name]
    num_heads = shape["hidden_size"] // 64
    config = LlamaConfig(
        **shape,
        vocab_size=VOCAB_SIZES[name],
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="batchmill-bench-") as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        for file in DEMO_MODEL_PATH.glob("tokenizer*"):
            shutil.copy(file, folder)
        yield Path(folder)


def random_prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()
