"""transformers continuous batching, the machinery of `generate_batch`.

`generate_batch` itself takes one output length for all requests; its manager takes one for each.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig


class Runner:
    def __init__(
        self,
        model: Path,
        converted: Path | None,
        num_threads: int,
        *,
        attention: str = "sdpa",
        **settings: int,
    ) -> None:
        del converted
        torch.set_num_threads(num_threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=attention
        ).eval()
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                allow_block_sharing=False, **settings
            ),
        )
        self.manager.start()

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        keys = {
            self.manager.add_request(prompt, max_new_tokens=count): i
            for i, (prompt, count) in enumerate(zip(prompts, outputs, strict=True))
        }
        results: list[list[int]] = [[] for _ in prompts]
        missing = len(keys)
        while missing:
            done = self.manager.get_result(timeout=1)
            if done is not None and done.is_finished():
                if done.error:
                    raise RuntimeError(done.error)
                results[keys[done.request_id]] = list(done.generated_tokens)
                missing -= 1
            elif done is None and not self.manager.is_running():
                raise RuntimeError("the generation thread has ended")
        return results

    def close(self) -> None:
        self.manager.stop(block=True, timeout=5)
