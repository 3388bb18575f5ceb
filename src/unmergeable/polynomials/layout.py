"""Where the feed-forwards of a family lie in its network, and what config.json says of a network of polynomials.

The network is the class of transformers with some of its modules exchanged, so that tensors carry the names of
modules; of the families here only the files of ViT and DINOv2 use others (``renames``). Paths of modules are relative
to the base model, which the classes with heads on top wrap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from unmergeable.architecture import Architecture, FeedForward
from unmergeable.checkpoint.source import RenamedSource, TensorSource
from unmergeable.errors import BadInput, UnsupportedArchitecture
from unmergeable.polynomials.activations import ACTIVATIONS, Activation, Basis

MODEL_TYPE_PREFIX = "polynomial_"
CLASS_PREFIX = "Polynomial"
MODULE = "modeling_polynomial"
SECTION = "polynomial"
"""Key of config.json under which a network of polynomials is described."""

Guard = Literal["clamp", "mask", "none"]


@dataclass(frozen=True)
class Layout:
    """``stem`` begins the names of the family's classes; ``prefix`` those of the base model's tensors, if wrapped.

    ``activation``: path of the function's module from the feed-forward's; None where gated, and the whole module is
    exchanged. ``setting``: the key of config.json that names it, and ``default`` what it is without. ``renames``: what
    to replace, in turn, in a tensor's name on disk to get the module's.
    """

    stem: str
    prefix: str = "model."
    activation: str | None = None
    setting: str = "hidden_act"
    default: str = "silu"
    renames: tuple[tuple[str, str], ...] = ()

    def to_module_name(self, name: str) -> str:
        """The name a tensor on disk has in the network."""
        for stored, loaded in self.renames:
            name = name.replace(stored, loaded)
        return name

    def to_disk_name(self, name: str) -> str:
        """The inverse of :meth:`to_module_name`."""
        for stored, loaded in reversed(self.renames):
            name = name.replace(loaded, stored)
        return name


_DINOV2_RENAMES = (
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
)
_VIT_RENAMES = (
    ("encoder.layer.", "layers."),
    *_DINOV2_RENAMES,
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)

LAYOUTS: Mapping[str, Layout] = {
    "llama": Layout("Llama"),
    "mistral": Layout("Mistral"),
    "qwen2": Layout("Qwen2"),
    "qwen3": Layout("Qwen3"),
    "gemma": Layout("Gemma", default="gelu_pytorch_tanh"),
    "gemma2": Layout("Gemma2", setting="hidden_activation", default="gelu_pytorch_tanh"),
    "gemma3_text": Layout("Gemma3Text", setting="hidden_activation", default="gelu_pytorch_tanh"),
    "gpt2": Layout("GPT2", "transformer.", "act", "activation_function", "gelu_new"),
    "opt": Layout("OPT", "model.", "activation_fn", "activation_function", "relu"),
    "bert": Layout("Bert", "bert.", "intermediate.intermediate_act_fn", default="gelu"),
    "vit": Layout("ViT", "vit.", "mlp.activation_fn", default="gelu", renames=_VIT_RENAMES),
    "dinov2": Layout("Dinov2", "dinov2.", "activation_fn", default="gelu", renames=_DINOV2_RENAMES),
    "t5": Layout("T5", "", "act", "feed_forward_proj", "relu"),
}

_ACTIVATION_SETTINGS = ("hidden_activation", "hidden_act", "activation_function")
"""What configs of other families call the activation, the first that says one."""

_TASKS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
}


@dataclass(frozen=True)
class Place:
    """One feed-forward of a network of polynomials.

    ``up`` is the module whose outputs are expanded (the gate, where there is one), ``down`` the one whose weight became
    coefficients; ``activation`` the function's module, and ``gated`` the names inside ``module`` of gate, up and down.
    ``units`` are expanded and ``rest`` are not. ``bias``: the network has one on its outputs; ``original_bias``: the
    original had. ``transposed``: the original weight is stored [hidden units, outputs].
    """

    module: str
    up: str
    down: str
    units: int
    rest: int
    outputs: int
    bias: bool
    original_bias: bool
    transposed: bool
    activation: str | None = None
    gated: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Section:
    """The ``polynomial`` section of config.json. ``family`` and ``architectures`` are the original's.

    ``prefix`` stands before every path on disk. (A key ``model_type`` would make transformers take the section for the
    configuration of the original.)
    """

    family: str
    architectures: tuple[str, ...]
    prefix: str
    activation: str
    basis: Basis
    order: int
    guard: Guard
    mask_order: int
    mask_radius: float
    feed_forwards: tuple[Place, ...]

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.family]

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        # The network tells gated feed-forwards by the key.
        found["feed_forwards"] = [
            {key: value for key, value in asdict(place).items() if value is not None} for place in self.feed_forwards
        ]
        return found | {"architectures": list(self.architectures)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Section:
        """The section of a parsed config.json.

        Raises:
            BadInput: there is none, or it is not one that this version writes.
        """
        stored = config.get(SECTION)
        if not isinstance(stored, Mapping):
            raise BadInput(f"{where}: config.json has no {SECTION!r} section; its feed-forwards are not polynomials.")
        try:
            places = tuple(Place(**place) for place in stored["feed_forwards"])
            section = cls(**{**stored, "feed_forwards": places, "architectures": tuple(stored["architectures"])})
        except (KeyError, TypeError) as error:
            raise BadInput(f"{where}: the {SECTION!r} section of config.json is damaged ({error}).") from None
        if section.family not in LAYOUTS or section.basis not in get_args(Basis) or section.order < 1:
            raise BadInput(f"{where}: the {SECTION!r} section of config.json is not one that this version writes.")
        return section

    def config_changes(self) -> dict[str, Any]:
        """What turns the original's config.json into that of the network of polynomials."""
        stem = self.layout.stem
        auto_map = {"AutoConfig": f"{stem}Config", "AutoModel": f"{stem}Model"}
        for name in self.architectures:
            auto_map |= {auto: name for suffix, auto in _TASKS.items() if name.endswith(suffix)}
        return {
            "model_type": MODEL_TYPE_PREFIX + self.family,
            "architectures": [CLASS_PREFIX + name for name in self.architectures],
            "auto_map": {auto: f"{MODULE}.{CLASS_PREFIX}{name}" for auto, name in auto_map.items()},
            SECTION: self.to_json(),
        }


def layout_of(architecture: Architecture) -> Layout:
    """The layout of a network's family.

    Raises:
        UnsupportedArchitecture: the family has none, or a feed-forward stores gate and up-branch as one tensor.
    """
    layout = LAYOUTS.get(architecture.family)
    if layout is None:
        raise UnsupportedArchitecture(
            f"model type {architecture.family}: no network of polynomials is known for it; "
            f"known: {', '.join(sorted(LAYOUTS))}."
        )
    for block in architecture.feed_forwards:
        if block.along:
            raise UnsupportedArchitecture(
                f"tensor {block.along[0].weight} lies between the hidden units and what reads them; networks of "
                "polynomials are known for feed-forwards with nothing but an activation there."
            )
        if block.gate is not None and block.gate.weight == block.up.weight:
            raise UnsupportedArchitecture(
                f"tensor {block.up.weight} holds gate and up-branch in one; networks of polynomials are known for "
                "separate projections only."
            )
    return layout


def activation_name(config: Mapping[str, Any], layout: Layout) -> str:
    """What transformers calls the activation function of this network."""
    name = str(config.get(layout.setting) or layout.default)
    if layout.setting != "feed_forward_proj":
        return name
    # T5: "gated-gelu" means the tanh form there, and "gated-X" otherwise X.
    return "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")


def activation_of(config: Mapping[str, Any]) -> Activation | None:
    """The activation of a network's feed-forwards, of any family; None where its config names none that is known."""
    layout = LAYOUTS.get(str(config.get("model_type")))
    named = (value for key in _ACTIVATION_SETTINGS if isinstance(value := config.get(key), str))
    name = next(named, "") if layout is None else activation_name(config, layout)
    return ACTIVATIONS.get(name)


def prefix_of(architecture: Architecture, layout: Layout) -> str:
    """What stands before the paths of modules on disk: nothing where the base model was saved by itself."""
    name = layout.to_module_name(architecture.feed_forwards[0].up.weight)
    return layout.prefix if name.startswith(layout.prefix) else ""


def place_of(block: FeedForward, layout: Layout, prefix: str, *, expanded: int, outputs: int, has_bias: bool) -> Place:
    """Where a feed-forward lies, ``expanded`` of its hidden units expanded."""

    def path(weight: str) -> str:
        return layout.to_module_name(weight).removeprefix(prefix).removesuffix(".weight")

    module = path(block.name)
    down, up = path(block.down.weight), path((block.gate or block.up).weight)
    gated = None
    if block.gate is not None:
        tensors = {"gate": block.gate.weight, "up": block.up.weight, "down": block.down.weight}
        gated = {role: path(weight).removeprefix(f"{module}.") for role, weight in tensors.items()}
    elif layout.activation is None:
        raise UnsupportedArchitecture(f"feed-forward {block.name} has no gate, which those of {layout.stem} have.")
    return Place(
        module=module,
        up=up,
        down=down,
        units=expanded,
        rest=block.size - expanded,
        outputs=outputs,
        bias=has_bias or gated is None,
        original_bias=has_bias,
        transposed=block.down.axis == 0,
        activation=f"{module}.{layout.activation}" if gated is None else None,
        gated=gated,
    )


def names_on_disk(config: Mapping[str, Any], description: str, names: Iterable[str]) -> dict[str, str]:
    """The names of a checkpoint's tensors, by those that the files of its family use.

    They differ in networks of polynomials, whose tensors carry the names of modules.
    """
    if SECTION not in config:
        return {name: name for name in names}
    layout = Section.from_config(config, description).layout
    return {layout.to_disk_name(name): name for name in names}


def under_names_on_disk(source: TensorSource) -> TensorSource:
    """The checkpoint under the tensor names that the files of its family use; see :func:`names_on_disk`."""
    if SECTION not in source.config:
        return source
    return RenamedSource(source, names_on_disk(source.config, source.description, source.names))
