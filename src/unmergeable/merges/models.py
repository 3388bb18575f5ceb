"""The models of a merge as operands by name, and the checks that they belong together.

A tensor that goes missing in a merge would later be scored as a protection, so names, shapes and dtypes must agree
exactly. Floating-point tensors are merged; integer and boolean ones are buffers such as position ids: they must be
equal, and are copied.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from unmergeable.checkpoint.dtypes import dtype_code, torch_dtype
from unmergeable.checkpoint.source import TensorSource, require_same_tensors
from unmergeable.errors import BadInput, Mismatch
from unmergeable.merges.blocks import BLOCK_ELEMENTS, FLOATING_DTYPES, Operand, tensor_blocks, tensor_operand

Model = Mapping[str, Operand]
"""One model: its operands by tensor name."""

# What makes models of equal shapes compute differently; merging across it is meaningless. The head counts are here
# because other heads hide behind equal shapes. The last is diffusers' name for the class.
ARCHITECTURE_KEYS = (
    "model_type",
    "architectures",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_heads",
    "n_head",
    "tie_word_embeddings",
    "_class_name",
)

# Output heads that a model with tied embeddings leaves out of its files.
OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight")

_SAME_TYING = "merge models that are all tied or all untied."


@runtime_checkable
class ChunkSource(Protocol):
    """A source that reads a tensor's stored bytes piece by piece, so that a merge never holds the tensor."""

    def raw_chunks(self, name: str, chunk_bytes: int) -> Iterator[memoryview]:
        """The bytes in order; each piece is valid until the next one is asked for."""
        ...


def state_dict_model(label: str, state: Mapping[str, Tensor]) -> Model:
    """A model in memory."""
    return {name: tensor_operand(label, tensor) for name, tensor in state.items()}


def source_model(label: str, source: TensorSource) -> Model:
    """A model in files: nothing is read before a pass over one of its tensors starts."""
    return {
        name: Operand(
            label=label,
            shape=tuple(source.spec(name).shape),
            dtype=torch_dtype(source.spec(name).dtype),
            read=partial(_read_blocks, source, name),
            device=torch.device("cpu"),
        )
        for name in source.names
    }


def _read_blocks(source: TensorSource, name: str, size: int) -> Iterator[Tensor]:
    if not isinstance(source, ChunkSource):  # an adapter computes its tensors as wholes
        yield from tensor_blocks(source.tensor(name), size)
        return
    dtype = torch_dtype(source.spec(name).dtype)
    for chunk in source.raw_chunks(name, size * dtype.itemsize):
        yield torch.frombuffer(chunk, dtype=dtype)


def mergeable_names(models: Sequence[Model]) -> tuple[str, ...]:
    """The tensors to be merged, in the first model's order.

    Raises:
        Mismatch: naming the first tensor that is not in every model with one shape and dtype, or a buffer that
            is not equal in all.
        BadInput: for dtypes that cannot be merged, or when there is nothing to merge.
    """
    template, *others = models
    for other in others:
        _require_same_tensors(template, other)
    merged = tuple(name for name, operand in template.items() if _is_merged(name, operand.dtype))
    if not merged:
        raise BadInput("nothing to merge: the models hold no floating-point tensors.")
    for name in sorted(template.keys() - set(merged)):
        for other in others:
            _require_equal_buffer(name, template[name], other[name])
    return merged


def require_same_architecture(template: TensorSource, other: TensorSource) -> None:
    """Require that two configurations, where both say something, describe one architecture.

    Raises:
        Mismatch: naming the first entry of ``ARCHITECTURE_KEYS`` that differs.
    """
    for key in ARCHITECTURE_KEYS:
        ours, theirs = template.config.get(key), other.config.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            remedy = _SAME_TYING if key == "tie_word_embeddings" else "only models of one architecture can be merged."
            raise Mismatch(
                f"config.json: {key} is {ours} in {template.description} but {theirs} in {other.description}; {remedy}"
            )


def require_nothing_lost(template: TensorSource, merge: TensorSource, out_dtype: torch.dtype | None) -> None:
    """Require a merge to hold the template's tensors, in their shapes and in the dtype asked for.

    Raises:
        Mismatch: naming the first tensor that is lost, new, or another. A tensor lost in a merge would be scored as
            a protection.
    """
    require_same_tensors(template, merge, "template and merge")
    for name in template.names:
        stored = template.spec(name).dtype
        is_float = torch_dtype(stored).is_floating_point
        expected = stored if out_dtype is None or not is_float else dtype_code(out_dtype)
        if merge.spec(name).dtype != expected:
            raise Mismatch(
                f"template and merge: tensor {name!r} was to be {expected} but is {merge.spec(name).dtype} in "
                f"{merge.description}; name the dtype wanted as out_dtype."
            )


def _label(model: Model) -> str:
    return next((operand.label for operand in model.values()), "an empty model")


def _require_same_tensors(first: Model, second: Model) -> None:
    for one, other in ((first, second), (second, first)):
        for name in one:
            if name not in other:
                raise Mismatch(_missing(name, has=_label(one), lacks=_label(other)))
    for name, operand in first.items():
        other_operand = second[name]
        if (operand.shape, operand.dtype) != (other_operand.shape, other_operand.dtype):
            raise Mismatch(
                f"{name}: {_describe(operand)} in {operand.label} but {_describe(other_operand)} in "
                f"{other_operand.label}; merge fine-tunes of one base, not resized and stored in one dtype."
            )


def _missing(name: str, *, has: str, lacks: str) -> str:
    if name in OUTPUT_HEADS:
        return f"{name}: {has} has its own output head, {lacks} ties it to the embeddings; {_SAME_TYING}"
    return f"{name}: in {has} but not in {lacks}; merge fine-tunes of one base that hold the same tensors."


def _describe(operand: Operand) -> str:
    return f"{str(operand.dtype).removeprefix('torch.')} {list(operand.shape)}"


def _is_merged(name: str, dtype: torch.dtype) -> bool:
    if dtype in FLOATING_DTYPES:
        return True
    if dtype.is_floating_point or dtype.is_complex:
        raise BadInput(f"{name}: {dtype} cannot be merged; convert the checkpoint to bfloat16 or wider first.")
    return False


def _require_equal_buffer(name: str, first: Operand, second: Operand) -> None:
    for block, other in zip(first.read(BLOCK_ELEMENTS), second.read(BLOCK_ELEMENTS), strict=True):
        if not torch.equal(block, other):
            raise Mismatch(
                f"{name}: this {first.dtype} buffer differs between {first.label} and {second.label}; "
                "only floating-point tensors can be merged."
            )
