"""A step reads no value from its device before the tokens are chosen, and mixes no devices.

Torch's device `meta` has shapes but no numbers: what reads a value there fails, and so do most
operators that are given tensors of two devices. It stands in for a GPU, where a read is a wait.
"""

from __future__ import annotations

import traceback

import pytest
import torch
from kits.engine_models import VOCAB, mixed_prompts, tiny_model

from engine.attention.backend import AttentionBackend
from engine.attention.sdpa import SdpaBackend
from engine.attention.varlen import VarlenBackend, find_kernel
from engine.batch import CacheCopy
from engine.requests.sequence import Sequence
from engine.sampling.logits import LogitsChange, change_logits
from engine.sampling.sampler import choose_tokens
from engine.scheduling.round import Round
from engine.stages.decode_graphs import _PaddedDecode
from engine.stages.stage import Stage
from engine.transfer import moved
from queue_api.wire.schemas import SamplingParams

META = torch.device("meta")
PROMPTS = mixed_prompts()[:4]
MODELS = ["llama", "mistral", "gemma2", "gemma3", "gpt2"]


def backend_of(name: str) -> AttentionBackend:
    if name == "sdpa":
        return SdpaBackend()
    kernel = find_kernel()
    if kernel is None:
        pytest.skip("this torch has no varlen_attn for a cache")
    return VarlenBackend(kernel)


def stage_on_meta(model: str, backend: AttentionBackend) -> Stage:
    """A stage in bfloat16 on the device without numbers."""
    with pytest.MonkeyPatch.context() as patch:
        # A CPU's layout, and its C code.
        patch.setattr("engine.stages.loading.can_lay_out", lambda *_: False)
        (stage,) = tiny_model(model).engine().stages
    stage.model.to(META).to(torch.bfloat16)
    stage.device, stage.attention = META, backend
    stage.pool = stage.make_pool(400)
    return stage


def sequences(*, num_left: int | None = None, **sampling) -> list[Sequence]:
    """Sequences of which all tokens, or the last `num_left`, are still to be computed."""
    params = SamplingParams(max_tokens=4, **sampling)
    found = []
    for i, prompt in enumerate(PROMPTS):
        sequence = Sequence.create(
            str(i), i, prompt, [], params, seed=i, added_at=0.0, num_stages=1
        )
        sequence.first_slot = 50 * i
        sequence.num_cached = 0 if num_left is None else len(prompt) - num_left
        found.append(sequence)
    return found


@pytest.mark.parametrize("name", ["varlen", "sdpa"])
@pytest.mark.parametrize("model", MODELS)
def test_a_forward_reads_nothing(model: str, name: str) -> None:
    """With the real kernel's arguments, though not its numbers."""
    stage = stage_on_meta(model, backend_of(name))
    for num_left in (None, 1, 2):
        work = [(sequence, sequence.num_pending) for sequence in sequences(num_left=num_left)]
        work[0][0].copy = CacheCopy(300, 10, 5)
        batch = Round.pack(work).batch
        logits = stage.run(batch, batch.token_ids[None])
        assert (logits.device, logits.dtype) == (META, torch.bfloat16)
        assert logits.shape == (len(work), VOCAB)


@torch.inference_mode()
@pytest.mark.parametrize("model", ["llama", "mistral", "gpt2"])
def test_a_graph_s_step_reads_nothing(model: str) -> None:
    """So there is nothing in it that can't be captured, but what only CUDA forbids."""
    stage = stage_on_meta(model, backend_of("varlen"))
    graph = _PaddedDecode(stage._run_eagerly, lambda step, device: step, 8, META, scratch_slot=399)
    batch = Round.pack([(sequence, 1) for sequence in sequences(num_left=1)]).batch
    assert graph.run(batch).shape == (len(PROMPTS), VOCAB)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "top_k": 5, "min_p": 0.1},
        {"logit_bias": {5: 1.0}, "min_tokens": 2, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.2, "presence_penalty": 0.1, "temperature": 1.0},
    ],
    ids=str,
)
def test_choosing_tokens_reads_them_alone(sampling: dict) -> None:
    rows = sequences(**sampling)
    for sequence in rows:
        sequence.change = LogitsChange(sequence.sampling, (), (2, 3))
    logits = torch.empty(len(rows), VOCAB, device=META, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError) as caught:
        choose_tokens(logits, [sequence.sampling_row() for sequence in rows])
    ours = [f.line for f in traceback.extract_tb(caught.tb) if "sampler.py" in f.filename]
    assert len(ours) == 1
    assert "ids: list[int] = chosen.tolist()" in str(ours[0])


def test_a_grammar_s_mask_reads_nothing() -> None:
    class OnlyTheMask:
        def mask(self, scores: torch.Tensor) -> None:
            from engine.sampling.structured import GrammarState

            GrammarState.mask(self, scores)

        class matcher:  # noqa: N801
            @staticmethod
            def fill_next_token_bitmask(bits) -> bool:
                bits[:] = 5
                return True

    (sequence, *_) = sequences()
    sequence.grammar = OnlyTheMask()
    row = sequence.sampling_row()
    logits = torch.empty(1, VOCAB, device=META)
    assert change_logits(logits, [row]).device == META
    found = change_logits(torch.zeros(1, VOCAB), [row])[0].isfinite().nonzero()[:, 0].tolist()
    assert found[:4] == [0, 2, 32, 34]


def test_a_copy_to_a_cpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a CPU stage would read what a CUDA stage has yet to write."""
    calls = []
    own = torch.Tensor.to

    def to(tensor: torch.Tensor, device: torch.device, **kwargs) -> torch.Tensor:
        calls.append((device.type, kwargs))
        return own(tensor, device, **kwargs) if device.type == "cpu" else tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    here = torch.zeros(2)
    moved(here, torch.device("cuda:0"))
    assert calls == [("cuda", {"non_blocking": True})]
    calls.clear()
    with pytest.raises(NotImplementedError):  # meta has nothing to copy
        moved(here.new_empty(2, device=META), torch.device("cpu"))
    assert calls == [("cpu", {})]
    assert moved(here, torch.device("cpu")) is here
