"""Load a stage, and settle how it runs by comparing it with the model's own forward.

Whatever fits neither of the two ways (stage.py) is refused: better no output than wrong output.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from engine.attention.check import AttentionMismatchError, Heads, check_attention
from engine.attention.hook import AttentionCall
from engine.attention.kv_pool import KVShape
from engine.batch import ForwardBatch, Segment
from engine.kernels.malloc import give_back_freed_memory, give_back_mapped_files
from engine.models.checkpoint import Checkpoint
from engine.models.cut_check import LayerInputs
from engine.models.single_cache import FarCache, SingleCache
from engine.models.slicing import Absent, load_slice
from engine.plan import StageSpec
from engine.stages.probe import CHECKED_ROWS, PROBE_LENGTH, PROBE_SLOTS, probe_steps, whole_probe
from engine.stages.stage import Mode, Stage
from engine.weights.format import AS_PUBLISHED, WeightFormat
from engine.weights.fused_layers import fuse_layers
from engine.weights.layout import can_lay_out, lay_out_linears
from queue_api.wire.errors import EngineError, UnsupportedModelError

__all__ = ["load_stage"]

logger = logging.getLogger(__name__)

PACKABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def load_stage(
    checkpoint: Checkpoint,
    config: Any,
    spec: StageSpec,
    dtype: torch.dtype,
    *,
    longest: int,
    use_cache: bool = True,
    weights: WeightFormat = AS_PUBLISHED,
    trust_remote_code: bool = False,
) -> Stage:
    """Load a stage and settle how it runs.

    :param longest: tokens of the longest sequence
    :param weights: how the layers keep theirs
    :raises UnsupportedModelError: if neither way gives what the model itself gives
    """
    ways = (True, False) if can_lay_out(torch.device(spec.device), dtype) else (False,)
    stage = None
    for lays_out in ways:
        model = load_slice(checkpoint, config, spec, dtype, trust_remote_code=trust_remote_code)
        stage = Stage(model, config, spec, use_cache=use_cache)
        del model
        where = f"stage {spec.index} on {stage.device}"
        name = type(stage.model).__name__
        weights.convert(stage.layers, lays_out=lays_out, where=where, model=name)
        try:
            ModeChoice(stage, longest, checkpoint).settle(lay_out_weights=lays_out)
            if stage.mode == "packed":
                break
        except UnsupportedModelError:
            if not lays_out:
                raise
        if lays_out:
            stage = None  # or the weights would be there twice
            give_back_freed_memory()
    assert stage is not None
    _give_back_pages(checkpoint)
    give_back_freed_memory()
    return stage


def _give_back_pages(checkpoint: Checkpoint) -> None:
    """Let go of what the files' pages and replaced weights took: it comes back if it is needed."""
    give_back_mapped_files(checkpoint.files())
    give_back_freed_memory(collect=False)


class WrongOutputError(EngineError):
    """A way to run a stage gives something else than the model's own forward."""


class CacheMismatchError(UnsupportedModelError):
    """A model's text depends on whether it has a cache: nothing to be equal to."""


class ModeChoice:
    """The ways to run a stage, one after the other, until one is right."""

    def __init__(self, stage: Stage, longest: int, checkpoint: Checkpoint) -> None:
        self._stage = stage
        self._longest = longest
        self._checkpoint = checkpoint
        rope = stage.long_rope
        self._is_long = rope is not None and rope.is_long(PROBE_LENGTH, PROBE_LENGTH)

    @torch.inference_mode()
    def settle(self, *, lay_out_weights: bool) -> None:
        """Compare both ways with the model's own forward on a short probe; keep the first right.

        :param lay_out_weights: lay out the weights for the CPU once the model's own output is known
        :raises UnsupportedModelError: if neither is
        """
        inbound = self._probe_input()
        try:
            expected = self._expected(inbound)
            self._check_far_positions(inbound)
            far = self._far_output(inbound)
        except UnsupportedModelError:
            raise
        except Exception as problem:  # any model code may fail in any way
            raise UnsupportedModelError(
                f"{type(self._stage.model).__name__} can't run as a stage "
                f"({type(problem).__name__}: {problem})"
            ) from problem
        if lay_out_weights:
            _give_back_pages(self._checkpoint)
            lay_out_linears(self._stage.model, lambda: _give_back_pages(self._checkpoint))
            fuse_layers(self._stage.model)
        reasons: list[str] = []
        for backend in self._stage.backends:
            self._stage.attention = backend
            failure = self._try_packed(inbound, expected, far)
            if failure is None:
                where = f"stage {self._stage.spec.index} on {self._stage.device}"
                logger.info("%s: attention by %s", where, backend.name)
                if reasons:
                    logger.warning("%s: slower attention, not %s", where, "; ".join(reasons))
                return
            anyway = isinstance(failure, UnsupportedModelError)  # whoever attends
            how = (
                "packed" if anyway or backend is self._stage.backends[-1] else f"by {backend.name}"
            )
            reasons.append(f"{how}: {_said(failure)}")
            if anyway:
                break
        for stepwise in (False, True):
            failure = self._try(inbound, expected, "single", stepwise=stepwise)
            if failure is None:
                logger.warning("sequences run one by one in this model (%s)", reasons[0])
                return
            reasons.append(f"single: {_said(failure)}")
        name = type(self._stage.model).__name__
        raise UnsupportedModelError(
            f"{name} can't run here without being wrong: {'; '.join(reasons)}"
        )

    def _try_packed(
        self, inbound: torch.Tensor, expected: torch.Tensor, far: torch.Tensor | None
    ) -> Exception | None:
        """As `_try`, the last layer without what nobody reads or, if that is wrong, with it."""
        if self._stage.last_layer is None:
            failure = self._try(inbound, expected, "packed", stepwise=False)
            return failure or self._own_count(inbound, far)
        self._stage.last_layer.trims = True
        failure = self._try(inbound, expected, "packed", stepwise=False)
        failure = failure or self._own_count(inbound, far)
        if failure is None:
            return None
        self._stage.last_layer.trims = False
        other = self._try(inbound, expected, "packed", stepwise=False)
        other = other or self._own_count(inbound, far)
        if other is None:
            logger.info("the last layer computes all tokens: %s", _said(failure))
        return other

    def _try(
        self,
        inbound: torch.Tensor,
        expected: torch.Tensor,
        mode: Mode,
        *,
        stepwise: bool,
    ) -> Exception | None:
        """Run the probe in a mode; what is wrong with it, None if nothing is."""
        try:
            if mode == "packed":
                self._check_packable()
            self._stage.set_mode(mode, stepwise=stepwise)
            error = _relative_error(self._probe(inbound), expected)
        except CacheMismatchError:
            raise
        except Exception as problem:  # any model code may fail in any way
            return problem
        finally:
            self._stage.release_all()
        if error <= self._stage.tolerance:
            logger.debug("stage %s: %s, error %.1e", self._stage.spec.index, mode, error)
            return None
        return WrongOutputError(f"output is off by {error:.1e}")

    def _expected(self, inbound: torch.Tensor) -> torch.Tensor:
        """What the model itself makes of the probe, in its checked rows.

        :raises UnsupportedModelError: if its layers need more than hidden states from other stages
        """
        absent = [module for module in self._stage.model.modules() if isinstance(module, Absent)]
        early: list[int] = []
        hook = self._stage.layers[0].register_forward_pre_hook(
            lambda *_: early.append(sum(module.num_calls for module in absent))
        )
        with LayerInputs(self._stage.layers) as inputs:
            expected = self._whole(inbound)
        hook.remove()
        if self._stage.spec.is_first and self._stage.spec.is_last:
            return expected
        name = type(self._stage.model).__name__
        if self._stage.spec.is_first and early[0]:
            raise UnsupportedModelError(f"{name} needs modules of other stages before its layers")
        with LayerInputs(self._stage.layers) as others:
            self._stage.blank_noise = 1.0
            self._whole(inbound.flip(1))
        noisy = self._whole(inbound)
        self._stage.blank_noise = 0.0
        if (strange := inputs.strange()) or (strange := inputs.differ(others)):
            raise UnsupportedModelError(f"{name}: layers pass on {strange} besides hidden states")
        if _relative_error(noisy, expected) > 1e-5:
            raise UnsupportedModelError(f"{name}: all layers need the embeddings")
        return expected

    def _whole(self, inbound: torch.Tensor) -> torch.Tensor:
        """The model's own output for the probe in one go, in its checked rows."""
        positions = torch.arange(PROBE_LENGTH, device=self._stage.device)
        ones = torch.ones(1, PROBE_LENGTH, dtype=torch.bool, device=self._stage.device)
        out = self._stage.forward(inbound, positions[None], positions, attention_mask=ones)
        return out.reshape(PROBE_LENGTH, -1)[CHECKED_ROWS]

    def _check_far_positions(self, inbound: torch.Tensor) -> None:
        """See that a token's output doesn't change with the positions of the tokens behind it.

        It would depend on how a prompt is cut into chunks, and on the sequences beside it.

        :raises UnsupportedModelError: if it does
        """
        if not self._stage.takes_positions or self._longest <= PROBE_LENGTH:
            return
        if not self._keeps_keys_alone():
            return  # to such layers positions with gaps may be another text
        ratio = (self._longest - PROBE_LENGTH) ** (1 / (PROBE_LENGTH - 1))
        spread = [i + int(ratio**i) - 1 for i in range(PROBE_LENGTH)]
        positions = torch.tensor([*spread[:-1], self._longest - 1])
        ends = (PROBE_LENGTH // 2, 3 * PROBE_LENGTH // 4)
        whole = self._at(positions, inbound)
        for end in ends:
            alone = self._at(positions[:end], inbound[:, :end])
            if _relative_error(whole[end - 1 : end], alone[-1:]) > self._stage.tolerance:
                name = type(self._stage.model).__name__
                raise UnsupportedModelError(
                    f"{name}: what a token gives depends on the length of the whole sequence, "
                    "in a way that isn't known here"
                )

    def _at(self, positions: torch.Tensor, inbound: torch.Tensor) -> torch.Tensor:
        """The model's output [n, ...] for n tokens at `positions`, none of its attention ours."""
        count = len(positions)
        on_device = positions.to(self._stage.device)
        ones = torch.ones(1, count, dtype=torch.bool, device=self._stage.device)
        rows = torch.arange(count, device=self._stage.device)
        segments = [Segment(0, count, 0, 0, 0)]
        with self._stage.rotating(segments, positions):
            out = self._stage.forward(inbound, on_device[None], rows, attention_mask=ones)
        return out.reshape(count, -1)

    def _far_positions(self) -> torch.Tensor:
        """[n], of the probe at the end of the longest sequence, from a chunk's first token on."""
        text = self._stage.model.config.get_text_config()
        chunk = getattr(text, "attention_chunk_size", None) or 1
        first = max(0, self._longest - PROBE_LENGTH) // chunk * chunk
        return torch.arange(first, min(first + PROBE_LENGTH, max(self._longest, PROBE_LENGTH)))

    def _far_output(self, inbound: torch.Tensor) -> torch.Tensor | None:
        """What the model itself makes of the probe [n, ...] if it thinks that it stands far behind.

        None if it can't think so, as with layers whose state isn't K and V.
        """
        positions = self._far_positions()
        count = len(positions)
        rows = torch.arange(count, device=self._stage.device)
        cache = FarCache(self._stage.whole_config, self._stage.spec)
        cache.num_seen = int(positions[0])
        on_device = positions.to(self._stage.device)
        try:
            with self._stage.rotating([self._far_segment(count)], positions):
                out = self._stage.forward_with(cache, inbound[:, :count], on_device[None], rows)
        except Exception as problem:  # any model code may fail in any way
            logger.debug("no check of far positions: %s", _said(problem))
            return None
        return out.reshape(count, -1)

    def _far_segment(self, count: int) -> Segment:
        rope = self._stage.long_rope
        return Segment(
            *(0, count, 0, 0, 0), rope is not None and rope.is_long(self._longest, self._longest)
        )

    def _own_count(self, inbound: torch.Tensor, far: torch.Tensor | None) -> Exception | None:
        """What is wrong with packed tokens at far positions.

        The model knows them from `position_ids` alone there; some layers count their cache.
        """
        if far is None:
            return None
        positions = self._far_positions()
        count = len(positions)
        batch = ForwardBatch(
            segments=[self._far_segment(count)],
            token_ids=torch.arange(count),  # not read, but counted
            positions=positions,
            slots=None,
            logit_rows=torch.arange(count),
        )
        out, _ = self._stage.run_packed(batch, inbound[:, :count], None)
        if _relative_error(out.reshape(count, -1), far) <= self._stage.tolerance:
            return None
        return UnsupportedModelError(
            f"a layer counts positions by itself, which shows in sequences of {self._longest} "
            "tokens"
        )

    def _check_packable(self) -> None:
        """See what the config alone tells.

        :raises UnsupportedModelError: if packed tokens won't do
        """
        if not self._keeps_keys_alone():
            raise UnsupportedModelError("layers that keep another state than K and V")

    def _keeps_keys_alone(self) -> bool:
        text = self._stage.model.config.get_text_config()
        return set(getattr(text, "layer_types", None) or ()) <= PACKABLE_LAYERS

    def _probe_input(self) -> torch.Tensor:
        if self._stage.spec.is_first:
            vocabulary = self._stage.model.config.get_text_config().vocab_size
            tokens = torch.arange(PROBE_LENGTH, device=self._stage.device)[None] * 7
            return tokens.remainder(vocabulary)
        size = self._stage.model.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, PROBE_LENGTH, size, generator=generator)
        return hidden.to(self._stage.device, self._stage.dtype)

    def _probe(self, inbound: torch.Tensor) -> torch.Tensor:
        """Output of the probe's checked rows, run in two steps next to another sequence."""
        pool = None
        if self._stage.mode == "packed":
            self._stage.kv_shapes = self._hooked_shapes(inbound)
            if self._stage.use_cache:
                pool = self._stage.make_pool(PROBE_SLOTS)
        outputs = []
        for step in probe_steps(use_cache=self._stage.use_cache, is_long=self._is_long):
            packed = inbound[:, step.source.to(self._stage.device)]
            if self._stage.mode == "packed":
                out = self._stage.run_packed(step.batch, packed, pool)[0]
            else:
                out = self._stage.run_singly(step.batch, packed)
            rows = out if self._stage.spec.is_last else out[0, step.batch.on(self._stage.device)[2]]
            outputs.append(rows)
        return torch.cat(outputs)

    def _hooked_shapes(self, inbound: torch.Tensor) -> list[KVShape]:
        """The shape of each layer's K and V.

        :raises UnsupportedModelError: if attention isn't called exactly once per layer
        """
        _, call = self._stage.run_packed(whole_probe(is_long=self._is_long), inbound, None)
        num_layers = len(self._stage.layers)
        if call.num_calls != num_layers or sorted(call.shapes) != list(range(num_layers)):
            raise UnsupportedModelError(f"{call.num_calls} attention calls in {num_layers} layers")
        self._check_windows(call)
        if self._stage.attention is not self._stage.backends[-1]:
            layers = (
                Heads(call.num_heads[i], call.shapes[i], call.rules[i]) for i in range(num_layers)
            )
            check_attention(self._stage.attention, layers, self._stage.device, self._stage.dtype)
        return [call.shapes[i] for i in range(num_layers)]

    def _check_windows(self, call: AttentionCall) -> None:
        """See that transformers' cache, which `generate` uses, keeps what the masks show.

        :raises UnsupportedModelError: if it would drop tokens within the length of a sequence
        """
        text = self._stage.whole_config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        layers = SingleCache(self._stage.whole_config, self._stage.spec).layers
        for i, layer in enumerate(layers):
            kept = getattr(layer, "sliding_window", None)
            rule = call.rules[i]
            if kept not in {None, rule.window, rule.chunk} and not (longest and kept >= longest):
                raise CacheMismatchError(
                    f"{type(self._stage.model).__name__}: transformers' cache keeps {kept} tokens, "
                    f"but the masks of layer {i} show {rule.window or rule.chunk or 'all'}"
                )


def _said(failure: Exception) -> str:
    ours = isinstance(failure, WrongOutputError | AttentionMismatchError)
    return str(failure) if ours else f"{type(failure).__name__}: {failure}"


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.float() - expected.float()).norm(dim=-1)
    # A padding token's output may be nothing but zeros.
    return float((difference / expected.float().norm(dim=-1).clamp(min=1e-30)).max())
