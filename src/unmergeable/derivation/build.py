"""A small random network in float64, and inputs for it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmergeable.derivation.double import in_float64
from unmergeable.derivation.inputs import proposals
from unmergeable.errors import UnsupportedArchitecture, UsageError
from unmergeable.network.disk_weights import find_places


@dataclass(frozen=True)
class Specimen:
    """A small random network with inputs; ``config`` is the one it was built from, as a file would hold it."""

    network: Any
    inputs: Mapping[str, Tensor]
    config: Mapping[str, Any]

    def stored_names(self) -> list[str]:
        """Names of the tensors in the network's files."""
        return list(find_places(self.network))

    def outputs(self) -> Tensor:
        """Every number the network gives out, in one row."""
        with in_float64():
            result = self.network(**self.inputs)
        numbers = [value.reshape(-1) for value in _tensors(result) if value.is_floating_point()]
        return torch.cat(numbers)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for name, value in result.items():
            if "past_key_values" not in name and "cache" not in name:
                yield from _tensors(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from _tensors(value)


def build(config: Mapping[str, Any], network_class: Any, *, seed: int = 0) -> Specimen:
    """A random network of ``network_class`` with the sizes of ``config``.

    Raises:
        UnsupportedArchitecture: the class cannot be built or run with such a config; the message says why.
    """
    settings = {name: value for name, value in config.items() if name not in {"transformers_version", "architectures"}}
    kind = settings.get("model_type", network_class.__name__)
    try:
        torch.manual_seed(seed)
        with in_float64():
            network = _network(settings, network_class).double().eval().requires_grad_(True)
        made = network.config
        stored = {"_class_name": kind, **made} if is_diffusion(network_class) else made.to_dict()
    except Exception as error:
        raise UnsupportedArchitecture(f"{kind}: a small network cannot be built ({_line(error)}).") from error
    _randomise(network, seed)
    first: Exception | None = None
    try:
        for inputs in proposals(network, made):
            specimen = Specimen(network, inputs, json.loads(json.dumps(stored, default=str)))
            try:
                with torch.no_grad():
                    outputs = specimen.outputs()
            except Exception as error:
                first = first or error
            else:
                if bool(torch.isfinite(outputs).any()):
                    return specimen
                first = first or ValueError("no output is a finite number")
    except UsageError as error:
        first = first or error
    assert first is not None
    raise UnsupportedArchitecture(f"{kind}: a small network cannot be run ({_line(first)}).") from first


def is_diffusion(network_class: Any) -> bool:
    """Whether a class is of diffusers, which keeps settings in no class of their own."""
    return not hasattr(network_class, "config_class")


def _network(settings: dict[str, Any], network_class: Any) -> Any:
    if is_diffusion(network_class):
        return network_class.from_config(settings)
    made = network_class.config_class(**settings)
    for part in (made, *(getattr(made, name, None) for name in getattr(made, "sub_configs", ()))):
        if part is not None:
            part._attn_implementation = "eager"
            part._experts_implementation = "eager"
    return network_class(made)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _randomise(network: Any, seed: int) -> None:
    """Every parameter random, norm gains and biases included: at ones and zeros many mistakes would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() >= 2:
                fan_in = max(parameter.shape[-1], 1) if parameter.dim() <= 3 else parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(parameter.mean() + 0.2 * noise)
        for name, buffer in network.named_buffers():
            if buffer.is_floating_point() and name.endswith("correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.2 + 0.3 * torch.rand(buffer.shape, generator=generator))


TASKS = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": "MASKED_LM",
    "image-classification": "IMAGE_CLASSIFICATION",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "speech": "SPEECH_SEQ_2_SEQ",
    "image-text": "IMAGE_TEXT_TO_TEXT",
    "diffusion": "",
}


DIFFUSION = (
    "AllegroTransformer3DModel", "AuraFlowTransformer2DModel", "CogVideoXTransformer3DModel", "DiTTransformer2DModel",
    "Flux2Transformer2DModel", "FluxTransformer2DModel", "HunyuanVideoTransformer3DModel", "LTXVideoTransformer3DModel",
    "Lumina2Transformer2DModel", "PixArtTransformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel",
    "SanaTransformer2DModel", "UNet2DConditionModel", "WanTransformer3DModel",
)  # fmt: skip
"""Networks of diffusers that are tried; there is no list of them that names a task."""


VARIANTS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "FluxTransformer2DModel": ({"guidance_embeds": True},),  # FLUX.1-dev, beside schnell
    "SD3Transformer2DModel": ({"qk_norm": "rms_norm", "dual_attention_layers": [0]},),  # SD 3.5, beside SD 3
    "gemma3": ({"vision_config": {"vision_use_head": False}},),
    "internvl": (
        {"vision_config": {"attention_bias": True}},
        {"vision_config": {"use_qk_norm": True, "norm_type": "rms_norm"}},  # those of 38 and 78 billion
    ),
    "llava": (
        {"vision_config": {"model_type": "siglip_vision_model"}, "vision_feature_select_strategy": "full"},
        {  # Pixtral
            "vision_config": {"model_type": "pixtral"},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
    ),
    "paligemma": ({"vision_config": {"vision_use_head": False}},),
}
"""Settings with which networks of one class are published besides the usual ones.

Nested settings are put beside the usual ones, those of another ``model_type`` in their place.
"""


def varied(usual: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the ``usual`` settings but for some."""
    found = dict(usual)
    for name, value in settings.items():
        if isinstance(value, Mapping):
            kind = value.get("model_type")
            before = usual[name] if kind in {None, usual[name].get("model_type")} else default_config(kind)
            value = varied(before, value)
        found[name] = value
    return found


def class_named(name: str) -> Any:
    """A network class of transformers or diffusers; None where neither has one of that name."""
    found = getattr(importlib.import_module("transformers"), name, None)
    if found is None and name in DIFFUSION and importlib.util.find_spec("diffusers") is not None:
        found = getattr(importlib.import_module("diffusers"), name, None)
    return found


def registered(task: str) -> dict[str, str]:
    """The class of every ``model_type`` that transformers registers for a task of :data:`TASKS`."""
    if task == "diffusion":
        return {name: name for name in DIFFUSION}
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found = getattr(auto, f"MODEL_FOR_{TASKS[task]}_MAPPING_NAMES")
    return {kind: name if isinstance(name, str) else name[0] for kind, name in found.items()}


def registered_class(kind: str) -> str | None:
    """The class of a ``model_type`` for the first task of :data:`TASKS` that has one, or its bare body's."""
    for task in TASKS:
        if kind in registered(task):
            return registered(task)[kind]
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    name = auto.MODEL_MAPPING_NAMES.get(kind)
    return str(name if isinstance(name, str) else name[0]) if name else None


def default_config(kind: str) -> dict[str, Any]:
    """The config that transformers has for a ``model_type``, or diffusers for a class, when nothing is set."""
    if kind in DIFFUSION:
        accepted = inspect.signature(class_named(kind).__init__).parameters
        return {"_class_name": kind} | {name: one.default for name, one in accepted.items() if name != "self"}
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    made: dict[str, Any] = auto.CONFIG_MAPPING[kind]().to_dict()
    return made
