"""Coefficients and settings that differ from tensor to tensor: per layer, per kind of tensor, per expert.

A merge is given its method and one coefficient per expert; a :class:`Variation` says, tensor by tensor, what departs
from them. :func:`terms_of` checks every departure before anything is merged.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms
from unmergeable.settings import nearest


@dataclass(frozen=True)
class Variation:
    """What departs from the merge's own in one tensor.

    ``coefficients`` replace those of the experts (None for the method's default). ``settings`` map names in the
    method's ``varies`` to a number, or to one number per expert.
    """

    coefficients: tuple[float | None, ...] | None = None
    settings: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)


Vary = Callable[[str], Variation]
"""The variation of a tensor, by its name."""


def terms_of(
    method: Merge, coefficients: Sequence[float | None], names: Iterable[str], vary: Vary | None = None
) -> dict[str, Terms]:
    """What holds for each tensor.

    Raises:
        UsageError: naming the tensor whose coefficients or settings the method cannot use.
    """
    common = Terms(method.resolve(coefficients))
    if vary is None:
        return dict.fromkeys(names, common)
    # Layers hold many tensors of the same terms: each is checked, and kept, once.
    checked: dict[str, Terms] = {}
    terms = {}
    for name in names:
        variation = vary(name)
        key = repr(variation)
        if key not in checked:
            checked[key] = _vary(method, coefficients, variation, name)
        terms[name] = checked[key]
    return terms


def describe(terms: Mapping[str, Terms]) -> list[dict[str, Any]]:
    """The terms for a record: each with the tensors it holds for."""
    tensors: dict[str, list[str]] = {}
    distinct: dict[str, Terms] = {}
    for name, tensor_terms in terms.items():
        distinct[repr(tensor_terms)] = tensor_terms
        tensors.setdefault(repr(tensor_terms), []).append(name)
    return [
        {
            "coefficients": list(tensor_terms.coefficients),
            "settings": {name: list(values) for name, values in tensor_terms.varied.items()},
            "tensors": tensors[key],
        }
        for key, tensor_terms in distinct.items()
    ]


def _vary(method: Merge, coefficients: Sequence[float | None], variation: Variation, name: str) -> Terms:
    given = coefficients if variation.coefficients is None else variation.coefficients
    if len(given) != len(coefficients):
        raise UsageError(f"{name}: {len(given)} coefficients for {len(coefficients)} experts: give one each.")
    try:
        resolved = method.resolve(given)
        varied = {
            setting: _per_expert(method, setting, value, len(resolved)) for setting, value in variation.settings.items()
        }
        for expert in range(len(resolved)):
            at_expert: Any = replace(method, **{setting: values[expert] for setting, values in varied.items()})
            at_expert.validate()
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    return Terms(resolved, varied)


def _per_expert(method: Merge, setting: str, value: float | tuple[float, ...], experts: int) -> tuple[float, ...]:
    if setting not in method.varies:
        raise UsageError(f"{method.name} cannot vary {setting!r}{nearest(setting, method.varies)}")
    values = value if isinstance(value, tuple) else (value,) * experts
    if len(values) != experts:
        raise UsageError(f"{setting}: {len(values)} values for {experts} experts: give one each, or one for all.")
    if method.varies[setting] == "tensor" and len(set(values)) > 1:
        raise UsageError(f"{setting} belongs to the merge, not to an expert: give one value.")
    return values
