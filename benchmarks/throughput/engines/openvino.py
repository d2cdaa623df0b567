"""OpenVINO GenAI's continuous batching, fp32 weights, computation and cache.

The model is exported by optimum-intel, which may need an older transformers than ours: give the
Python that has it with `--peer-python openvino-export=...`.
"""

from __future__ import annotations

from pathlib import Path


class Runner:
    def __init__(
        self, model: Path, converted: Path | None, num_threads: int, **scheduler: int
    ) -> None:
        import openvino_genai as genai

        del model
        config = genai.SchedulerConfig()
        for name, value in {"enable_prefix_caching": False, **scheduler}.items():
            setattr(config, name, value)
        # Left alone, the plugin computes in bf16 where the processor has it, with an 8-bit cache.
        properties = {
            "INFERENCE_NUM_THREADS": num_threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
        }
        self.pipeline = genai.ContinuousBatchingPipeline(str(converted), config, "CPU", properties)

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        inputs = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        configs = []
        for count in outputs:
            config = genai.GenerationConfig()
            config.max_new_tokens = count
            config.ignore_eos = True
            config.do_sample = False
            configs.append(config)
        results = self.pipeline.generate(inputs, configs)
        return [list(result.m_generation_ids[0]) for result in results]


def convert(model: Path, target: Path) -> None:
    """Export the model and its tokenizer, fp32."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    exported = OVModelForCausalLM.from_pretrained(
        model, export=True, load_in_8bit=False, compile=False
    )
    exported.save_pretrained(target)
    tokenizer, detokenizer = convert_tokenizer(
        AutoTokenizer.from_pretrained(model), with_detokenizer=True
    )
    ov.save_model(tokenizer, target / "openvino_tokenizer.xml")
    ov.save_model(detokenizer, target / "openvino_detokenizer.xml")
