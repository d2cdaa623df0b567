"""ONNX Runtime GenAI, fp32, static batches; its model builder reads safetensors offline."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.children import environment, module


class Runner:
    def __init__(
        self, model: Path, converted: Path | None, num_threads: int, *, batch_size: int = 16
    ) -> None:
        import onnxruntime_genai as genai

        del model
        config = genai.Config(str(converted))
        session = {"session_options": {"intra_op_num_threads": num_threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self.genai = genai
        self.model = genai.Model(config)
        self.batch_size = batch_size

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        import numpy as np

        order = sorted(range(len(prompts)), key=lambda i: (outputs[i], len(prompts[i])))
        results: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            width = max(len(prompts[i]) for i in batch)
            # Token 0 pads, on the right: the graph's fused rotation counts from the row's start.
            ids = np.zeros((len(batch), width), dtype=np.int32)
            for row, i in enumerate(batch):
                ids[row, : len(prompts[i])] = prompts[i]
            params = self.genai.GeneratorParams(self.model)
            length = width + max(outputs[i] for i in batch)
            # There is no way to ignore end-of-text but a least length, which rules the token out.
            params.set_search_options(
                batch_size=len(batch), max_length=length, min_length=length, do_sample=False
            )
            generator = self.genai.Generator(self.model, params)
            generator.append_tokens(ids)
            while not generator.is_done():
                generator.generate_next_token()
            for row, i in enumerate(batch):
                sequence = generator.get_sequence(row)
                results[i] = sequence[width : width + outputs[i]].tolist()
        return results


def convert(model: Path, target: Path) -> None:
    """Build the ONNX graph with the model builder that comes with the runtime."""
    builder = module("onnxruntime_genai.models.builder")
    places = ["-i", str(model), "-o", str(target), "-c", str(target / "cache")]
    subprocess.run([*builder, *places, "-p", "fp32", "-e", "cpu"], env=environment(), check=True)
