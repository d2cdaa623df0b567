"""Cut a slice out of an unchanged Hugging Face model and load that slice's weights alone.

With `engine.stages`, the only place that knows how transformers builds its models.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from engine.models.checkpoint import Checkpoint, layer_of
from engine.models.model_files import brief
from engine.plan import StageSpec
from queue_api.wire.errors import BatchmillError, ModelNotFoundError, UnsupportedModelError

__all__ = [
    "Absent",
    "find_layers",
    "load_config",
    "load_slice",
    "model_without_weights",
    "resolve_dtype",
]


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The model's config.

    :raises UnsupportedModelError: if transformers can't make sense of it
    """
    path = checkpoint.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        text = config.get_text_config()
        sizes = {name: getattr(text, name, None) for name in ("num_hidden_layers", "vocab_size")}
    except Exception as error:  # each config's class checks in its own way
        raise UnsupportedModelError(f"{path}: {brief(error)}") from error
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UnsupportedModelError(f"{path}: {name!r} is {size!r}, not a whole number above 0")
    return config


def resolve_dtype(name: str, config: Any, devices: tuple[str, ...]) -> torch.dtype:
    """The dtype that `auto` or a name stands for.

    `auto` keeps the checkpoint's, but not on a CPU: without matrix units for it, half precision
    is several times slower there than float32.
    """
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    stored = getattr(config.get_text_config(), "dtype", None)
    if stored is None or any(torch.device(device).type == "cpu" for device in devices):
        return torch.float32
    return cast(torch.dtype, stored)


def model_without_weights(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The whole model on the `meta` device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )


def find_layers(model: Any) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder layers, and the list's attribute name.

    :raises UnsupportedModelError: if there is no such list
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    # The decoder first: a vision tower may have as many layers, and stand before it.
    for root in (model.get_decoder(), model.base_model):
        for module in root.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                    return module, name
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {num_layers} decoder layers to cut"
    )


def load_slice(
    checkpoint: Checkpoint,
    config: Any,
    spec: StageSpec,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """The model with the layers of `spec` only, on its device, nothing else ever read.

    The model keeps its class and the names of its weights. What other stages own is taken out
    before weights are loaded; the embedding stays with the first stage (and with the last, if
    the head is tied to it), the final norm and the head with the last.

    :raises UnsupportedModelError: if the class can't be cut
    :raises ModelNotFoundError: if a weight that the slice needs isn't in the checkpoint
    """
    try:
        return _load_slice(checkpoint, config, spec, dtype, trust_remote_code)
    except (BatchmillError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the code of a model that wasn't made to be cut may fail in any way
        raise UnsupportedModelError(
            f"{checkpoint.name}: layers {spec.first_layer} to {spec.end_layer - 1} can't be cut "
            f"out ({type(error).__name__}: {brief(error)})"
        ) from error


def _load_slice(
    checkpoint: Checkpoint,
    config: Any,
    spec: StageSpec,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> Any:
    skeleton = _skeleton(checkpoint, config, trust_remote_code=trust_remote_code)
    parameters = skeleton.state_dict()
    whole = set(parameters)
    ties = list(skeleton.all_tied_weights_keys.items())
    _prune(skeleton, spec)
    held = set(skeleton.state_dict())
    names = _needed(checkpoint, config, spec, held=held, absent=whole - held)
    others = _under_other_names(checkpoint, ties, held)
    with checkpoint.open([*names, *others.values()], dtype) as tensors, _quiet_loading():
        tensors |= {name: tensors[other] for name, other in others.items()}
        if getattr(config, "quantization_config", None) is None:  # else several in one
            _check_sizes(checkpoint, tensors, parameters)
        model, report = _pruned_class(type(skeleton), spec).from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=tensors,
            dtype=dtype,
            generation_config=GenerationConfig(),
            output_loading_info=True,
            **_own_attention(config),
        )
    # transformers would fill these with random numbers and carry on.
    wrong = [*report["missing_keys"], *report["mismatched_keys"], *report["error_msgs"]]
    if wrong:
        raise ModelNotFoundError(f"{checkpoint.name}: weights missing or misshapen: {wrong[:5]}")
    _drop_placeholders(model, spec)
    return model.eval().requires_grad_(False).to(spec.device)


def _skeleton(checkpoint: Checkpoint, config: Any, *, trust_remote_code: bool) -> Any:
    try:
        return model_without_weights(config, trust_remote_code=trust_remote_code)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a field of a value that nobody looked at before
        raise UnsupportedModelError(
            f"{checkpoint.folder / 'config.json'}: no model can be made of it "
            f"({type(error).__name__}: {brief(error)})"
        ) from error


def _check_sizes(
    checkpoint: Checkpoint, tensors: dict[str, Any], parameters: dict[str, torch.Tensor]
) -> None:
    """See that tensors have the sizes that the config gives them.

    transformers would tell, too, but make all weights first, of whatever size.

    :raises UnsupportedModelError: naming the first that hasn't
    """
    for name, tensor in tensors.items():
        if name not in parameters:
            continue
        stored, made = list(tensor.get_shape()), list(parameters[name].shape)
        if math.prod(stored) != math.prod(made):
            raise UnsupportedModelError(
                f"{checkpoint.folder}: config.json doesn't fit the weights: {name} is {stored} in "
                f"{checkpoint.weight_map.get(name, 'them')}, by the config it would be {made}"
            )


def _own_attention(config: Any) -> dict[str, str]:
    """What the model attends by where it isn't our function: the measure of the load check.

    transformers' default, but SDPA knows no soft-capping, and transformers before 5.23 left it out
    of Gemma 2 without a word.
    """
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {} if softcap is None else {"attn_implementation": "eager"}


def _needed(
    checkpoint: Checkpoint, config: Any, spec: StageSpec, *, held: set[str], absent: set[str]
) -> list[str]:
    """Names in the checkpoint that the slice may need.

    A checkpoint may name its tensors otherwise than the model does (transformers renames and
    merges while loading), so what the slice is known not to have is left out, not the reverse.
    A vision tower may have as many layers as the text model: what the slice holds is kept.
    """
    lists = checkpoint.layer_lists(config.get_text_config().num_hidden_layers)
    own_layers = range(spec.first_layer, spec.end_layer)
    names = []
    for name in checkpoint.weight_map:
        layer = layer_of(name, lists)
        if name in held or (name not in absent and (layer is None or layer in own_layers)):
            names.append(name)
    return names


def _under_other_names(
    checkpoint: Checkpoint, ties: list[tuple[str, str]], held: set[str]
) -> dict[str, str]:
    """Tied weights that the slice holds, and the name that alone is in the checkpoint for each."""
    stored = checkpoint.weight_map
    return {
        name: other
        for tie in ties
        for name, other in (tie, tie[::-1])
        if name in held and not {name, other} <= held and name not in stored and other in stored
    }


class Absent(nn.Module):
    """Stands where another stage's module was, and hands on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return args[0] if args else next(iter(kwargs.values()))


def _prune(model: Any, spec: StageSpec) -> None:
    """Take out what `spec` doesn't own; the names of what stays don't change."""
    owner, attribute = find_layers(model)
    layers = cast(nn.ModuleList, getattr(owner, attribute))
    for i in range(len(layers)):
        if not spec.first_layer <= i < spec.end_layer:
            layers[i] = Absent()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = _are_tied(model, embedding, head)
    behind_layers = False
    for name, child in list(owner.named_children()):
        if child is layers:
            behind_layers = True
        elif child is embedding:
            if not spec.is_first and not (spec.is_last and tied):
                setattr(owner, name, Absent())
        elif behind_layers and not spec.is_last and _is_final(name, child):
            setattr(owner, name, Absent())
    if not spec.is_last:
        for name, child in list(model.named_children()):
            if child is head:
                setattr(model, name, Absent())
    _forget_ties(model)


def _are_tied(model: Any, embedding: nn.Module, head: nn.Module | None) -> bool:
    """Whether transformers makes one weight of the embedding's and the head's.

    Which of a composite's configs says so differs from model to model; `post_init` has read them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    ends = ({embedding}, {head})
    for names in model.all_tied_weights_keys.items():
        owners = [{modules.get(name.rpartition(".")[0])} for name in names]
        if owners in ([*ends], [*reversed(ends)]):
            return True
    return False


def _forget_ties(model: Any) -> None:
    """Leave out ties of weights that other stages own."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = model.all_tied_weights_keys
    kept = {one: other for one, other in ties.items() if one in names and other in names}
    if kept != ties:
        model._tied_weights_keys, model.all_tied_weights_keys = kept or None, kept


def _is_final(name: str, module: nn.Module) -> bool:
    """True for what is defined and run behind the layers: the final norm and the like.

    Some models define the norm of their embeddings there; the check at load finds any others.
    """
    return "emb" not in name and next(module.parameters(), None) is not None


def _pruned_class(cls: type[Any], spec: StageSpec) -> Any:
    """A subclass of the model class that is built without what `spec` doesn't own."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        _prune(self, spec)

    members = {"__init__": init, "__module__": cls.__module__}
    # The checkpoint has tensors that the slice doesn't need: no cause for a warning.
    members["_keys_to_ignore_on_load_unexpected"] = [r".*"]
    return type(cls.__name__, (cls,), members)


def _drop_placeholders(model: Any, spec: StageSpec) -> None:
    """Shorten the list of layers, and each list in the config that has one entry per layer."""
    owner, attribute = find_layers(model)
    layers = list(getattr(owner, attribute))
    setattr(owner, attribute, nn.ModuleList(layers[spec.first_layer : spec.end_layer]))
    config = model.config.get_text_config()
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(config, name, list(value)[spec.first_layer : spec.end_layer])
    config.num_hidden_layers = spec.num_layers


def forward_parameters(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of a module's forward."""
    return frozenset(inspect.signature(module.forward).parameters)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars of transformers while a stage loads, nor its table of what is missing.

    What is missing is an error here, and said in a line.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(max(verbosity, logging.ERROR))
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
