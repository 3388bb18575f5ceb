"""Which tensor is which: the pairs that names and shapes leave no doubt about, and none that they do."""

from __future__ import annotations

import pytest

from unmergeable.checkpoint.correspondence import corresponding_names, further_names

LAYERS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "norm.weight")


def body(prefix: str, layers: int = 2, width: int = 4) -> dict[str, tuple[int, ...]]:
    names = [f"{prefix}layers.{number}.{name}" for number in range(layers) for name in LAYERS]
    return {f"{prefix}embed_tokens.weight": (9, width), **dict.fromkeys(names, (width, width))}


PREFIXES = [
    ("model.", ""),
    ("", "model."),
    ("bert.", "transformer."),
    ("language_model.model.", "model.language_model."),
    ("model.decoder.", "decoder."),
]


@pytest.mark.parametrize(("ours", "theirs"), PREFIXES)
def test_one_body_under_two_prefixes(ours: str, theirs: str) -> None:
    template, other = body(ours), body(theirs)
    assert corresponding_names(template, other) == dict(zip(template, other, strict=True))


def test_several_prefixes_at_once() -> None:
    """As transformers renamed the parts of multimodal models."""
    template = (
        body("language_model.model.") | body("vision_tower.", width=3) | {"language_model.lm_head.weight": (9, 4)}
    )
    other = body("model.language_model.") | body("model.vision_tower.", width=3) | {"lm_head.weight": (9, 4)}
    assert corresponding_names(template, other) == dict(zip(template, other, strict=True))


def test_the_tower_is_found_in_the_whole_by_what_it_shares_most() -> None:
    """Both towers have layers of these names; the patches are the vision tower's alone."""
    patches = {"embeddings.patch_embedding.weight": (4, 3, 2, 2)}
    tower = body("") | patches
    whole = body("text_model.") | body("vision_model.") | {f"vision_model.{n}": shape for n, shape in patches.items()}
    assert corresponding_names(tower, whole) == {name: f"vision_model.{name}" for name in tower}
    narrow = body("text_model.", width=5) | body("vision_model.")
    assert set(corresponding_names(body(""), narrow).values()) == set(body("vision_model."))


def test_a_tower_is_not_torn_apart() -> None:
    """What the vision tower lacks is not taken from the text tower, whose names would fit."""
    tower = body("") | {"embeddings.position_embedding.weight": (9, 4)}
    whole = body("vision_model.") | {"text_model.embeddings.position_embedding.weight": (9, 4)}
    assert "embeddings.position_embedding.weight" not in corresponding_names(tower, whole)


def test_names_of_tensorflow() -> None:
    new = {"bert.LayerNorm.weight": (4,), "bert.LayerNorm.bias": (4,)}
    old = {"bert.LayerNorm.gamma": (4,), "bert.LayerNorm.beta": (4,)}
    assert corresponding_names(new, old) == dict(zip(new, old, strict=True))


def test_names_of_normed_weights() -> None:
    """wav2vec 2.0's positions: a length and a direction, under the names of PyTorch before and after 2.0."""
    conv = "wav2vec2.encoder.pos_conv_embed.conv"
    new = {
        f"{conv}.parametrizations.weight.original{number}": shape for number, shape in enumerate([(1, 1, 4), (8, 2, 4)])
    }
    old = {f"{conv}.weight_g": (1, 1, 4), f"{conv}.weight_v": (8, 2, 4)}
    assert corresponding_names(new, old) == dict(zip(new, old, strict=True))
    assert corresponding_names(old, new) == dict(zip(old, new, strict=True))
    whole = body("wav2vec2.encoder.") | new
    bare = body("encoder.") | {name.removeprefix("wav2vec2."): shape for name, shape in old.items()}
    assert corresponding_names(whole, bare) == dict(zip(whole, bare, strict=True))


def test_layer_scales_called_gamma_stay_themselves() -> None:
    names = {"blocks.0.ls1.gamma": (4,), "blocks.0.ls1.weight": (4,)}
    assert corresponding_names(names, names) == {name: name for name in names}


def test_what_has_no_counterpart() -> None:
    template, other = body("model.") | {"lm_head.weight": (9, 4)}, body("") | {"score.weight": (2, 4)}
    pairs = corresponding_names(template, other)
    assert "lm_head.weight" not in pairs
    assert further_names(other, pairs) == ["score.weight"]
    assert corresponding_names(template, {"unrelated.weight": (2, 2)}) == {}
