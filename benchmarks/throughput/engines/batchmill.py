"""batchmill's own engine, offline: no queue, no worker."""

from __future__ import annotations

from pathlib import Path

from engine.config import EngineConfig
from engine.engine import Engine
from queue_api.wire.schemas import GenerationRequest, SamplingParams


class Runner:
    def __init__(
        self,
        model: Path,
        converted: Path | None,
        num_threads: int,
        *,
        stages: int = 1,
        **settings: int | str,
    ) -> None:
        del converted
        self.engine = Engine.load(
            EngineConfig(
                str(model),
                dtype="float32",
                devices=("cpu",) * stages,
                num_threads=num_threads,
                **settings,
            )
        )

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        requests = [
            GenerationRequest(
                id=str(i),
                prompt=prompt,
                sampling=SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True),
            )
            for i, (prompt, count) in enumerate(zip(prompts, outputs, strict=True))
        ]
        return [list(completion.token_ids) for completion in self.engine.generate(requests)]

    def close(self) -> None:
        self.engine.close()
