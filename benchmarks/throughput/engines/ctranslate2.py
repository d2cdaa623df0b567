"""CTranslate2's `Generator`, fp32, in static batches from which finished requests leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Runner:
    def __init__(
        self, model: Path, converted: Path | None, num_threads: int, *, batch_size: int = 16
    ) -> None:
        import ctranslate2

        del model
        assert converted is not None
        self.generator = ctranslate2.Generator(
            str(converted), device="cpu", compute_type="float32", intra_threads=num_threads
        )
        self.tokens = json.loads((converted / "vocabulary.json").read_text(encoding="utf-8"))
        self.batch_size = batch_size

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        # A batch's prompts are read at once up to the shortest one and token by token from there,
        # so prompts of similar lengths belong together. Outputs needn't: who has all leaves.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), outputs[i]))
        results: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            counts = [outputs[i] for i in batch]
            left = counts.copy()

            def has_all(step: Any, left: list[int] = left) -> bool:
                # A step's own number counts the prompt's rest too.
                left[step.batch_id] -= 1
                return left[step.batch_id] <= 0

            outs = self.generator.generate_batch(
                [[self.tokens[t] for t in prompts[i]] for i in batch],
                max_length=max(counts),
                end_token=[],
                sampling_topk=1,
                include_prompt_in_result=False,
                callback=has_all,
            )
            for i, out in zip(batch, outs, strict=True):
                results[i] = list(out.sequences_ids[0])
        return results


def convert(model: Path, target: Path) -> None:
    """Convert with CTranslate2's own converter, fp32."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(model)).convert(str(target), force=True)
