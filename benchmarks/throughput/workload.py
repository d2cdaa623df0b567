"""What is generated: windows of real text as prompts, and a fixed output length for each."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.throughput.models import source_texts

__all__ = ["QUICK", "W", "Workload", "WorkloadSpec"]


@dataclass(frozen=True)
class WorkloadSpec:
    """Lengths are uniform in their ranges, ends included."""

    num_requests: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    # W's seeds are those that give its published totals: 17,029 prompt and 8,927 output tokens.
    prompt_seed: int = 1326
    output_seed: int = 3832


W = WorkloadSpec(128, (16, 256), (16, 128))
QUICK = WorkloadSpec(8, (4, 24), (2, 8))


@dataclass(frozen=True)
class Workload:
    """Token ids in, and how many to generate for each prompt; end-of-text is ignored."""

    prompts: list[list[int]]
    outputs: list[int]

    @classmethod
    def make(cls, spec: WorkloadSpec, model: Path) -> Workload:
        """Cut prompts out of the standard library's sources with the model's tokenizer."""
        from transformers import AutoTokenizer

        lengths, counts = random.Random(spec.prompt_seed), random.Random(spec.output_seed)
        prompt_lengths = [lengths.randint(*spec.prompt_tokens) for _ in range(spec.num_requests)]
        outputs = [counts.randint(*spec.output_tokens) for _ in range(spec.num_requests)]
        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = list(itertools.islice(source_texts(), 200))
        places = random.Random(0)
        prompts = []
        for length in prompt_lengths:
            ids: list[int] = []
            while len(ids) < length:  # a short file is passed over
                ids = tokenizer.encode(places.choice(texts))
            start = places.randint(0, len(ids) - length)
            prompts.append(ids[start : start + length])
        return cls(prompts, outputs)

    @classmethod
    def load(cls, path: Path) -> Workload:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def take(self, indices: list[int]) -> Workload:
        return Workload([self.prompts[i] for i in indices], [self.outputs[i] for i in indices])

    def warm_up(self) -> Workload:
        """A few short requests of the same kind, run before the clock starts."""
        return Workload(self.prompts[:16], [min(8, n) for n in self.outputs[:16]])

    @property
    def digests(self) -> list[str]:
        """Names for what is kept about each request, such as its reference tokens."""
        return [
            hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]
            for request in zip(self.prompts, self.outputs, strict=True)
        ]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.outputs)

    @property
    def num_forward_tokens(self) -> int:
        """Tokens that must pass the layers: all but each request's last."""
        return self.num_prompt_tokens + self.num_output_tokens - len(self.prompts)
