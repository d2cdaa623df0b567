"""llama.cpp through llama-cpp-python's low-level interface, batched continuously.

The high-level interface of the bindings runs one sequence at a time, so the loop of llama.cpp's own
`examples/parallel` stands here: all running sequences and the next prompts share a batch.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

CONTEXT_PER_SLOT = 512


class Runner:
    def __init__(
        self,
        model: Path,
        converted: Path | None,
        num_threads: int,
        *,
        slots: int = 32,
        batch: int = 512,
        cache: str = "f16",
    ) -> None:
        import llama_cpp as lib

        del model
        assert converted is not None
        self.lib = lib
        lib.llama_backend_init()
        model_params = lib.llama_model_default_params()
        self.model = lib.llama_model_load_from_file(
            str(converted / "model.gguf").encode(), model_params
        )
        params = lib.llama_context_default_params()
        params.n_ctx = slots * CONTEXT_PER_SLOT
        params.n_batch = params.n_ubatch = batch
        params.n_seq_max = slots
        params.n_threads = params.n_threads_batch = num_threads
        params.kv_unified = True
        params.type_k = params.type_v = {"f16": lib.GGML_TYPE_F16, "f32": lib.GGML_TYPE_F32}[cache]
        self.context = lib.llama_init_from_model(self.model, params)
        self.memory = lib.llama_get_memory(self.context)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(batch, 0, 1)
        self.capacity = batch
        self.slots = slots

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        results: list[list[int]] = [[] for _ in prompts]
        waiting = deque(range(len(prompts)))
        free = list(range(self.slots))
        decoding: dict[int, int] = {}  # slot -> request
        reading: deque[tuple[int, int, int]] = deque()  # slot, request, tokens read so far
        while waiting or reading or decoding:
            while waiting and free:
                reading.append((free.pop(), waiting.popleft(), 0))
            self.batch.n_tokens = 0
            due: list[tuple[int, int]] = []
            for slot, request in decoding.items():
                place = len(prompts[request]) + len(results[request]) - 1
                self._put(results[request][-1], place, slot, want=True)
                due.append((slot, request))
            while reading and self.batch.n_tokens < self.capacity:
                slot, request, done = reading.popleft()
                prompt = prompts[request]
                end = min(len(prompt), done + self.capacity - self.batch.n_tokens)
                for place in range(done, end):
                    self._put(prompt[place], place, slot, want=place == len(prompt) - 1)
                if end < len(prompt):
                    reading.appendleft((slot, request, end))
                else:
                    due.append((slot, request))
            for (slot, request), token in zip(due, self._decode(len(due)), strict=True):
                results[request].append(token)
                decoding[slot] = request
                if len(results[request]) == outputs[request]:
                    del decoding[slot]
                    self.lib.llama_memory_seq_rm(self.memory, slot, -1, -1)
                    free.append(slot)
        return results

    def _put(self, token: int, place: int, slot: int, *, want: bool) -> None:
        batch, i = self.batch, self.batch.n_tokens
        batch.token[i], batch.pos[i], batch.logits[i] = token, place, want
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = slot
        batch.n_tokens = i + 1

    def _decode(self, num_rows: int) -> list[int]:
        import numpy as np

        if code := self.lib.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode returned {code}")
        if not num_rows:
            return []
        logits = np.ctypeslib.as_array(
            self.lib.llama_get_logits(self.context), shape=(num_rows, self.vocab)
        )
        tokens: list[int] = logits.argmax(axis=1).tolist()
        return tokens


def convert(model: Path, target: Path) -> None:
    """Write f32 GGUF. Token ids go in and out, so it holds no tokenizer."""
    import numpy as np
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(str(target / "model.gguf"), "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, tensor in load_file(model / "model.safetensors").items():
        parts = name.split(".")
        if parts[1] == "layers":
            kind = parts[-2]
            new = f"blk.{parts[2]}.{_LAYER_NAMES[kind]}.weight"
        else:
            kind, new = parts[-2], _OUTER_NAMES[parts[-2]]
        if kind in ("q_proj", "k_proj"):
            # GGUF's llama rotates neighbours, Hugging Face the two halves of a head.
            number = heads if kind == "q_proj" else kv_heads
            halves = tensor.reshape(number, 2, -1, tensor.shape[1])
            rows = halves.swapaxes(1, 2).reshape(tensor.shape)
        else:
            rows = tensor
        writer.add_tensor(new, np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_LAYER_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER_NAMES = {
    "embed_tokens": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
}
