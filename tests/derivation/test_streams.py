"""Two streams in one softmax: SD 3 and Flux, whose text and image have projections of their own and bases in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unmergeable.architecture.blocks import Attention, FeedForward
from unmergeable.architecture.declare import Names
from unmergeable.architecture.derived import architecture_of, known_map
from unmergeable.architecture.rules import symmetry_map
from unmergeable.derivation.build import VARIANTS, Specimen, class_named, default_config
from unmergeable.derivation.derive import Derivation, derive
from unmergeable.derivation.model_types import built, confirm, with_variant
from unmergeable.derivation.probe import Disk
from unmergeable.derivation.prove import TOLERANCE, Prover
from unmergeable.derivation.shrink import SMALL, UNSEEN, Sizes
from unmergeable.errors import UnsupportedArchitecture

SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"


def specimen(kind: str, sizes: Sizes = SMALL, **settings: object) -> Specimen:
    return built({**default_config(kind), **settings}, class_named(kind), sizes)


@pytest.fixture(scope="module")
def sd3() -> tuple[Specimen, Derivation]:
    small = specimen(SD3)
    return small, derive(small)


@pytest.fixture(scope="module")
def flux() -> tuple[Specimen, Derivation]:
    small = specimen(FLUX)
    return small, derive(small)


def attentions(found: Derivation) -> list[Attention]:
    return [block for block in found.blocks if isinstance(block, Attention)]


def failures(small: Specimen, block: Attention) -> set[str]:
    prover = Prover(small, Disk(small.network))
    symmetry = symmetry_map([block])
    every = symmetry.select("query_key", "value_output", "heads")
    return {space.role for space in every.values() if not prover.prove(symmetry, space).holds}


def test_text_and_image_share_their_bases(sd3: tuple[Specimen, Derivation]) -> None:
    first, last = attentions(sd3[1])
    (text,) = first.joined
    assert first.value.weight == "transformer_blocks.0.attn.to_v.weight"
    assert text.value.weight == "transformer_blocks.0.attn.add_v_proj.weight"
    assert text.output is not None
    assert text.output.weight == "transformer_blocks.0.attn.to_add_out.weight"
    assert [heads.weight for heads in text.queries] == ["transformer_blocks.0.attn.add_q_proj.weight"]
    assert last.joined[0].output is None, "nothing reads what the text gathers in the last layer"
    symmetry = symmetry_map([first])
    assert symmetry.spaces[f"{first.name}.query_key"].group.kind == "general_linear"
    assert len(symmetry.tensors_of({f"{first.name}.value_output"})) == 6, "two values with biases, two outputs"
    assert failures(sd3[0], first) == set()


def test_one_stream_alone_is_refused(sd3: tuple[Specimen, Derivation]) -> None:
    """The control: what is done to the image's heads has to be done to the text's."""
    first = attentions(sd3[1])[0]
    assert failures(sd3[0], replace(first, joined=())) == {"query_key", "value_output", "heads"}
    (text,) = first.joined
    assert failures(sd3[0], replace(first, joined=(replace(text, output=None),))) == {"value_output", "heads"}
    swapped = replace(text, queries=text.keys, keys=text.queries)
    assert "query_key" in failures(sd3[0], replace(first, joined=(swapped,)))


def test_flux_has_signs_turns_and_gains_on_both_streams(flux: tuple[Specimen, Derivation]) -> None:
    double = next(block for block in attentions(flux[1]) if block.joined)
    assert [part.rotary for part in double.parts] == ["interleaved"]
    assert [norm.query_gains[0].rsplit(".", 2)[1] for norm in double.norms] == ["norm_q", "norm_added_q"]
    kinds = {space.group.kind for space in symmetry_map([double]).select("query_key").values()}
    assert kinds == {"pair_sign", "quarter_turn", "pair_scale"}
    assert failures(flux[0], double) == set()
    (text,) = double.joined
    assert "query_key" in failures(flux[0], replace(double, joined=(replace(text, norm=None),)))


def test_attention_and_feed_forward_may_end_in_one_weight(flux: tuple[Specimen, Derivation]) -> None:
    single = next(block for block in attentions(flux[1]) if not block.joined)
    wide = next(
        block
        for block in flux[1].blocks
        if isinstance(block, FeedForward) and block.down.weight == single.output.weight
    )
    assert wide.down.offset == single.num_heads * single.value_size
    assert wide.name != single.name
    prover = Prover(flux[0], Disk(flux[0].network))
    symmetry = symmetry_map([single, wide])
    assert prover.together(symmetry, symmetry.select("value_output", "feed_forward")) <= TOLERANCE
    shifted = symmetry_map([replace(wide, down=replace(wide.down, offset=0))])
    assert prover.together(shifted, shifted.select("feed_forward")) > TOLERANCE


@pytest.mark.parametrize("kind", [SD3, FLUX])
@pytest.mark.parametrize("variant", [0, 1])
def test_one_table_holds_for_the_variants_that_are_published(kind: str, variant: int) -> None:
    derived = known_map(kind)
    assert derived is not None
    confirm(derived, specimen(kind, UNSEEN, **({}, *VARIANTS[kind])[variant]))


def test_a_block_says_with_which_settings_it_holds() -> None:
    derived = known_map(SD3)
    assert derived is not None
    (settings,) = VARIANTS[SD3]
    normed = specimen(SD3, UNSEEN, **settings)
    names = Names({name: tuple(tensor.shape) for name, tensor in normed.network.state_dict().items()})
    found = architecture_of(derived, normed.config, names)
    assert all(block.norm is not None for block in found.attentions)
    assert {block.name.rsplit(".", 1)[1] for block in found.attentions} == {"attn", "attn2"}
    mistaken = [
        {name: value for name, value in template.items() if name != "when"}
        for template in derived.attentions
        if template.get("when") != {"qk_norm": "rms_norm"}
    ]
    with pytest.raises(UnsupportedArchitecture):
        confirm(replace(derived, attentions=tuple(mistaken)), normed)


def test_what_is_the_same_in_both_variants_is_listed_once() -> None:
    derived = known_map("granite")
    assert derived is not None
    (own,) = derived.attentions
    other = replace(derived, attentions=({**own, "members": 1}, {**own, "name": "second"}), flags={"new": True})
    both = with_variant(derived, other, {"new": True, "layers": [0]}, {"new": False})
    assert [template.get("when") for template in both.attentions] == [{"new": [False, None]}, {"new": True}, None]
    assert both.feed_forwards == derived.feed_forwards
    assert both.flags == {**derived.flags, "new": True}


def test_a_single_stream_is_one_run_of_tokens() -> None:
    """The control of telling streams apart: where all tokens come from the same weights there is one."""
    found = derive(specimen("PixArtTransformer2DModel"))
    assert attentions(found)
    assert all(block.joined == () for block in attentions(found))
    assert torch.isfinite(torch.tensor(found.joint))
