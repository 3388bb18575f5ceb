"""Coefficients and settings that differ from tensor to tensor."""

import pytest
import torch

from merges.small_models import flat, make_models
from unmergeable.errors import UsageError
from unmergeable.merges import MERGES, Della, Merge, Slerp, TaskArithmetic, Ties, merge_state_dicts
from unmergeable.merges.base import Terms
from unmergeable.merges.variation import Variation, describe, terms_of

NAMES = ["embed.weight", "layers.0.weight", "layers.1.weight"]


def test_without_a_variation_all_tensors_share_the_terms() -> None:
    terms = terms_of(TaskArithmetic(), [None, 0.5], NAMES)
    assert terms == dict.fromkeys(NAMES, Terms((0.3, 0.5)))


def test_a_variation_replaces_what_it_names() -> None:
    varied = {
        "layers.0.weight": Variation((0.1, None)),
        "layers.1.weight": Variation(settings={"density": (0.5, 0.25), "scaling_coefficient": 2.0}),
    }
    terms = terms_of(Ties(), [None, 0.5], NAMES, lambda name: varied.get(name, Variation()))
    assert terms["embed.weight"] == Terms((1.0, 0.5))
    assert terms["layers.0.weight"] == Terms((0.1, 1.0))
    own = terms["layers.1.weight"]
    assert own.coefficients == (1.0, 0.5)
    assert own.per_expert("density", 0.2) == (0.5, 0.25)
    assert own.of_tensor("scaling_coefficient", 1.0) == 2.0
    assert terms["embed.weight"].per_expert("density", 0.2) == (0.2, 0.2)
    assert [entry["tensors"] for entry in describe(terms)] == [[name] for name in NAMES]


@pytest.mark.parametrize("name", MERGES)
def test_a_tensor_is_merged_as_if_its_terms_held_for_all(name: str) -> None:
    """Every setting that a method lets vary, in one tensor; the others stay as they were."""
    method: Merge = MERGES[name]()
    if name == "ties":
        method = Ties(trim="tensor")
    base, experts = make_models(min(2, method.most_experts or 2))
    values = {
        "density": 0.6,
        "gamma": 0.1,
        "epsilon": 0.2,
        "t": 0.25,
        "mask_threshold": 0.6,
        "scaling_coefficient": 0.7,
        "threshold": 0.02,
        "amplify": 0.5,
        "most": 0.9,
        "width": 0.5,
        "iterations": 5,
        "tolerance": 1e-3,
    }
    if name == "nearswap":
        values["t"] = 1e-3
    settings = {setting: values[setting] for setting in method.varies}
    coefficients = None if name in ("model_stock", "slerp", "nuslerp") else (0.5, 0.25)[: len(experts)]
    changed = "layers.0.weight"

    def vary(tensor: str) -> Variation:
        return Variation(coefficients, settings) if tensor == changed else Variation()

    merged = merge_state_dicts(base, experts, method=method, vary=vary)
    plain = merge_state_dicts(base, experts, method=method)
    whole = merge_state_dicts(
        base, experts, method=type(method)(**{**vars(method), **settings}), coefficients=coefficients
    )  # type: ignore[call-arg]
    assert torch.equal(merged[changed], whole[changed])
    if settings or coefficients:
        assert not torch.equal(merged[changed], plain[changed])
    assert all(torch.equal(merged[tensor], plain[tensor]) for tensor in base if tensor != changed)


def test_experts_may_have_densities_of_their_own() -> None:
    base, experts = make_models(2)
    variation = Variation(settings={"density": (1.0, 0.1)})
    for trim in ("global", "tensor"):
        merged = merge_state_dicts(base, experts, method=Ties(trim=trim), vary=lambda name: variation)
        both = merge_state_dicts(base, experts, method=Ties(trim=trim, density=0.1))
        moved, fewer = (int((flat(state) != flat(base)).sum()) for state in (merged, both))
        assert moved > 0.99 * len(flat(base)) > fewer


@pytest.mark.parametrize(
    ("method", "variation", "message"),
    [
        (Ties(trim="tensor"), Variation(settings={"densty": 0.5}), r"cannot vary 'densty'; did you mean 'density'\?"),
        (TaskArithmetic(), Variation(settings={"density": 0.5}), "cannot vary 'density'"),
        (Ties(trim="tensor"), Variation(settings={"density": (0.5,)}), "1 values for 2 experts"),
        (Ties(trim="tensor"), Variation(settings={"density": (0.5, 2.0)}), "density=2.0: must lie"),
        (Ties(), Variation(settings={"scaling_coefficient": (1.0, 2.0)}), "belongs to the merge"),
        (Ties(), Variation((1.0, -1.0)), "must be positive"),
        (TaskArithmetic(), Variation((1.0,)), "1 coefficients for 2 experts"),
        (Della(), Variation(settings={"epsilon": 0.5}), "epsilon=0.5"),
        (Slerp(), Variation(settings={"t": 1.5}), "t=1.5"),
    ],
)
def test_refuses_naming_the_tensor(method: Merge, variation: Variation, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^embed.weight: .*{message}"):
        terms_of(method, [None, None], NAMES, lambda name: variation)


def test_one_threshold_for_the_model_has_one_density() -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match="trim=global ranks the whole task vector"):
        merge_state_dicts(
            base, experts, method=Ties(), vary=lambda name: Variation(settings={"density": 0.1 + 0.1 * len(name) / 20})
        )
