"""transformers `generate`: one by one, or in static batches of requests of similar length."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


class Runner:
    def __init__(
        self, model: Path, converted: Path | None, num_threads: int, *, batch_size: int = 1
    ) -> None:
        del converted
        torch.set_num_threads(num_threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        # No end-of-text: every request runs to its own length.
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self.batch_size = batch_size

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        # Sorted by output length: a batch runs as long as its longest request.
        order = sorted(range(len(prompts)), key=lambda i: (outputs[i], len(prompts[i])))
        results: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=max(outputs[i] for i in batch)
            )
            for row, i in enumerate(batch):
                results[i] = out[row, width : width + outputs[i]].tolist()
        return results
