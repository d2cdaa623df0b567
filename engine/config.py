"""How an engine is set up. Frozen, and reads no environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from queue_api.wire.errors import ConfigurationError
from queue_api.wire.sampling import GenerationDefaults

__all__ = ["DTYPES", "EngineConfig", "PartitionStrategy", "PipelineMode", "Quantization"]

PartitionStrategy = Literal["uniform", "memory", "compute", "mixed", "custom"]
PipelineMode = Literal["auto", "inline", "threads"]
Quantization = Literal["none", "int8"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """One model on one row of devices.

    :raises ConfigurationError: when two settings contradict each other or one is out of range
    """

    model: str
    """A local folder or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    dtype: str = "auto"
    """Of weights, activations and cache. `auto` is the checkpoint's, but float32 on a CPU."""
    quantization: Quantization = "none"
    """`int8` quantizes the weights of the layers' `nn.Linear`, on a CPU in float32 only; the text
    is then the quantized model's."""
    devices: tuple[str, ...] = ("cpu",)
    """One entry per stage, in order; the same device may stand several times."""
    partition: PartitionStrategy = "uniform"
    """How layers are shared out: evenly, by free memory, by time, by time within the memory, or
    as `layer_bounds` says."""
    layer_bounds: tuple[int, ...] | None = None
    """`custom` only: the first layer of every stage but the first, such as (3, 6) for three."""
    max_num_seqs: int = 64
    """Sequences that run at the same time."""
    max_batch_tokens: int = 512
    """Tokens in one forward: decodes, then prefill chunks."""
    max_model_len: int | None = None
    """Prompt and new tokens together; the model's own limit when None."""
    kv_cache_tokens: int | None = None
    """Slots of the KV cache; sized from free memory when None."""
    use_cache: bool = True
    """False recomputes each sequence for each token: slow, for comparison only."""
    prefix_caching: bool = True
    """Sequences with a common prefix compute it once, in models that run packed."""
    pipeline: PipelineMode = "auto"
    """`inline` runs the stages one after the other on all threads, `threads` gives each stage a
    thread and keeps one micro-batch per stage in flight. `auto`: inline if all share a device."""
    num_threads: int | None = None
    """CPU threads for the whole engine; torch's own choice when None."""
    generation_defaults: GenerationDefaults = "model"
    """What of the model's generation config counts where a request says nothing: `model` is what
    `generate(do_sample=False)` applies, `all` its sampling fields too, `none` nothing."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigurationError("no model given; name a local folder or a Hub id")
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if not self.devices:
            raise ConfigurationError("no devices given; name one per stage, such as cpu or cuda:0")
        for name, allowed in (
            ("partition", PartitionStrategy),
            ("pipeline", PipelineMode),
            ("quantization", Quantization),
            ("generation_defaults", GenerationDefaults),
        ):
            if (value := getattr(self, name)) not in get_args(allowed):
                known = ", ".join(get_args(allowed))
                raise ConfigurationError(f"{name} {value!r} is none of {known}")
        self._check_quantization()
        if (self.partition == "custom") != (self.layer_bounds is not None):
            raise ConfigurationError("layer_bounds and partition='custom' belong together")
        for name in ("max_num_seqs", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_model_len", "kv_cache_tokens", "num_threads"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ConfigurationError(f"{name} is {number}; it must be at least 1")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigurationError(
                f"max_batch_tokens ({self.max_batch_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}): every running sequence needs a token's room in a step"
            )

    def _check_quantization(self) -> None:
        if self.quantization == "none":
            return
        others = [name for name in self.devices if name.split(":")[0] != "cpu"]
        if others or self.dtype not in {"auto", "float32"}:
            where = f"{self.dtype} on {','.join(self.devices)}"
            raise ConfigurationError(
                f"quantization {self.quantization} is for float32 on a CPU, not for {where}; "
                "set it to none, or dtype to float32 and all stages to cpu"
            )
