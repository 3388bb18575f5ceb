"""Models of a merge as operands by name, and the checks that those in memory belong together.

A tensor that goes missing in a merge would later be scored as a protection, so the names and shapes of state dicts must
agree exactly (what checkpoints may differ in is in :mod:`unmergeable.merges.comparison`). Floating-point tensors are
merged; integer and boolean ones are buffers such as position ids: they must be equal, and are copied.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from unmergeable.checkpoint.dtypes import dtype_code, torch_dtype
from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.source import ChunkSource, TensorSource
from unmergeable.errors import BadInput, Mismatch
from unmergeable.merges.blocks import BLOCK_ELEMENTS, FLOATING_DTYPES, Operand, tensor_blocks, tensor_operand

Model = Mapping[str, Operand]
"""One model: its operands by tensor name."""


def state_dict_model(label: str, state: Mapping[str, Tensor]) -> Model:
    """A model in memory."""
    return {name: tensor_operand(label, tensor) for name, tensor in state.items()}


def source_model(label: str, source: TensorSource) -> Model:
    """A model in files: nothing is read before a pass over one of its tensors starts."""
    return {name: source_operand(label, source, name) for name in source.names}


def source_operand(label: str, source: TensorSource, name: str) -> Operand:
    """One tensor of a model in files."""
    spec = source.spec(name)
    width = TensorSpec(spec.dtype, spec.shape[1:]).nbytes
    return Operand(
        label=label,
        shape=tuple(spec.shape),
        dtype=torch_dtype(spec.dtype),
        read=lambda size: _read_blocks(source, name, size, 0, spec.nbytes),
        device=torch.device("cpu"),
        rows=lambda start, count, size: _read_blocks(source, name, size, start * width, (start + count) * width),
    )


def _read_blocks(source: TensorSource, name: str, size: int, start: int, stop: int) -> Iterator[Tensor]:
    dtype = torch_dtype(source.spec(name).dtype)
    if not isinstance(source, ChunkSource):  # an adapter computes its tensors as wholes
        flat = source.tensor(name).reshape(-1)
        yield from tensor_blocks(flat[start // dtype.itemsize : stop // dtype.itemsize], size)
        return
    for chunk in source.raw_chunks(name, size * dtype.itemsize, start=start, stop=stop):
        yield torch.frombuffer(chunk, dtype=dtype)


def mergeable_names(models: Sequence[Model]) -> tuple[str, ...]:
    """The tensors to be merged, in the first model's order.

    Raises:
        Mismatch: naming the first tensor that is not in every model with one shape, or a buffer that
            is not equal in all.
        BadInput: for dtypes that cannot be merged, or when there is nothing to merge.
    """
    template, *others = models
    for other in others:
        _require_same_tensors(template, other)
    merged = tuple(name for name, operand in template.items() if is_merged(name, operand.dtype))
    if not merged:
        raise BadInput("nothing to merge: the models hold no floating-point tensors.")
    for name in sorted(template.keys() - set(merged)):
        for other in others:
            require_equal_buffer(name, template[name], other[name])
    return merged


def require_nothing_lost(expected: Mapping[str, TensorSpec], merge: TensorSource) -> None:
    """Require a merge to hold these tensors, in their shapes and dtypes, and no others.

    Raises:
        Mismatch: naming the first tensor that is lost, new, or another. A tensor lost in a merge would be scored as
            a protection.
    """
    for name, spec in expected.items():
        if name not in merge.index.entries:
            raise Mismatch(f"template and merge: tensor {name!r} is in the models but not in {merge.description}.")
        written = merge.spec(name)
        if written.shape != spec.shape:
            raise Mismatch(
                f"template and merge: tensor {name!r} was to be {spec} but is {written} in {merge.description}."
            )
        if written.dtype != spec.dtype:
            raise Mismatch(
                f"template and merge: tensor {name!r} was to be {spec.dtype} but is {written.dtype} in "
                f"{merge.description}; name the dtype wanted as out_dtype."
            )
    for name in merge.names:
        if name not in expected:
            raise Mismatch(f"template and merge: tensor {name!r} is in {merge.description} but in none of the models.")


def stored_as(spec: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    """The spec of a tensor in the dtype of a merge, None for its own, which integers keep in any case."""
    if dtype is None or not torch_dtype(spec.dtype).is_floating_point:
        return spec
    return TensorSpec(dtype_code(dtype), spec.shape)


def _label(model: Model) -> str:
    return next((operand.label for operand in model.values()), "an empty model")


def _require_same_tensors(first: Model, second: Model) -> None:
    for one, other in ((first, second), (second, first)):
        for name in one:
            if name not in other:
                raise Mismatch(missing(name, has=_label(one), lacks=_label(other)))
    for name, operand in first.items():
        other_operand = second[name]
        if operand.shape != other_operand.shape or is_merged(name, operand.dtype) != is_merged(
            name, other_operand.dtype
        ):
            raise Mismatch(
                f"{name}: {_describe(operand)} in {operand.label} but {_describe(other_operand)} in "
                f"{other_operand.label}; merge fine-tunes of one base, not resized."
            )


def missing(name: str, *, has: str, lacks: str) -> str:
    """The line for a tensor that one model lacks."""
    return f"{name}: in {has} but not in {lacks}; merge fine-tunes of one base that hold the same tensors."


def _describe(operand: Operand) -> str:
    return f"{str(operand.dtype).removeprefix('torch.')} {list(operand.shape)}"


def is_merged(name: str, dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are merged; those that are no numbers are compared and copied.

    Raises:
        BadInput: for numbers that cannot be merged, naming the tensor.
    """
    if dtype in FLOATING_DTYPES:
        return True
    if dtype.is_floating_point or dtype.is_complex:
        raise BadInput(f"{name}: {dtype} cannot be merged; convert the checkpoint to bfloat16 or wider first.")
    return False


def require_equal_buffer(name: str, first: Operand, second: Operand) -> None:
    """Raise Mismatch unless two tensors that are not merged are equal."""
    for block, other in zip(first.read(BLOCK_ELEMENTS), second.read(BLOCK_ELEMENTS), strict=True):
        if not torch.equal(block, other):
            raise Mismatch(
                f"{name}: this {first.dtype} buffer differs between {first.label} and {second.label}; "
                "only floating-point tensors can be merged."
            )
