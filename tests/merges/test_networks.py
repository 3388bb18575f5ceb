"""Networks are merged with networks: how a tool saved one makes no difference, and what does is said or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from merges.networks_on_disk import (
    CONFIG,
    EMBEDDING,
    HEAD,
    HIDDEN,
    ROWS,
    State,
    close,
    config_of,
    half_of_each,
    language_model,
    merged,
    notes_of,
    write,
)
from unmergeable.errors import Mismatch, UsageError
from unmergeable.merges import MERGES, DareLinear, Linear, Merge, TaskArithmetic, Ties

BASE, FIRST, SECOND = (language_model(seed) for seed in range(3))
MEAN = {name: half_of_each(BASE[name], FIRST[name], SECOND[name]) for name in BASE}


def with_head(state: State) -> State:
    return {**state, HEAD: state[EMBEDDING].clone()}


def renamed(change: Callable[[str], str]) -> Callable[[State], State]:
    return lambda state: {change(name): tensor for name, tensor in state.items()}


def with_buffers(state: State) -> State:
    buffers: State = {"model.rotary_emb.inv_freq": torch.ones(2), "model.embeddings.position_ids": torch.arange(5)}
    for number in range(2):
        buffers[f"model.layers.{number}.attn.bias"] = torch.ones(1, 1, 3, 3, dtype=torch.uint8)
        buffers[f"model.layers.{number}.attn.masked_bias"] = torch.tensor(-1e9)
        buffers[f"model.layers.{number}.relative_position_index"] = torch.arange(9).view(3, 3)
    buffers["model.layers.0.EncDecAttention.relative_attention_bias.weight"] = torch.ones(4, 2)
    return {**state, **buffers}


def old_endings(state: State) -> State:
    return {name.replace("norm.weight", "norm.gamma"): tensor for name, tensor in state.items()}


SAVED: dict[str, Callable[[State], State]] = {
    "head stored": with_head,
    "buffers stored": with_buffers,
    "buffers of another kind": lambda state: {**state, "model.layers.0.attn.bias": torch.ones(1, 1, 5, 5).bool()},
    "no prefix": renamed(lambda name: name.removeprefix("model.")),
    "another prefix": renamed(lambda name: name.replace("model.", "transformer.")),
    "deeper prefix": renamed(lambda name: f"language_model.{name}"),
    "wrapped": renamed(lambda name: f"_orig_mod.module.{name}"),
    "gamma": old_endings,
    "all at once": lambda state: renamed(lambda name: name.removeprefix("model."))(with_buffers(old_endings(state))),
}


@pytest.mark.parametrize("whose", ["base", "one expert", "both experts"])
@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("method", [TaskArithmetic(), Linear()], ids=repr)
def test_how_a_model_was_saved_makes_no_difference(
    method: Merge, save: Callable[[State], State], whose: str, tmp_path: Path
) -> None:
    states = [BASE, FIRST, SECOND]
    for number in {"base": [0], "one expert": [1], "both experts": [1, 2]}[whose]:
        states[number] = save(states[number])
    folders = [write(tmp_path / str(number), state) for number, state in enumerate(states)]
    found = merged(folders[0], folders[1:], tmp_path / "out", method=method)
    # Of an average the base is no part, and half of each is the mean.
    expected = MEAN if isinstance(method, TaskArithmetic) else {n: (FIRST[n] + SECOND[n]) / 2 for n in BASE}
    saved = save(expected) if whose == "base" else expected
    unwrapped = {name.removeprefix("_orig_mod.module."): tensor for name, tensor in saved.items()}
    assert found.keys() == unwrapped.keys()
    for name, tensor in unwrapped.items():
        assert close(found[name].float(), tensor.float()), name


@pytest.mark.parametrize("method", [method() for method in MERGES.values() if not method().needs_data], ids=repr)
def test_a_tied_head_that_is_stored_stays_the_embedding(method: Merge, tmp_path: Path) -> None:
    """Also where masks are drawn by name, for which the copy would be another tensor."""
    folders = [write(tmp_path / str(n), with_head(state)) for n, state in enumerate((BASE, FIRST, SECOND))]
    plain = [write(tmp_path / f"plain{n}", state) for n, state in enumerate((BASE, FIRST, SECOND))]
    if method.most_experts is None and method.name != "model_stock":
        found = merged(folders[0], folders[1:], tmp_path / "out", method=method)
        expected = merged(plain[0], plain[1:], tmp_path / "plain", method=method)
        assert torch.equal(found[HEAD], found[EMBEDDING])
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "head", ["proj_out.weight", "decoder.weight", "output_projection.weight", "lm_head.out_proj.weight"]
)
def test_tied_heads_of_other_names_stay_the_embedding(head: str, tmp_path: Path) -> None:
    """Whisper's, ModernBERT's, BioGPT's and XGLM's kin; one that differs is a head of its own."""
    base = write(tmp_path / "base", {**BASE, head: BASE[EMBEDDING].clone()})
    experts = [write(tmp_path / "a", FIRST), write(tmp_path / "b", {**SECOND, head: SECOND[EMBEDDING].clone()})]
    found = merged(base, experts, tmp_path / "out")
    assert torch.equal(found[head], found[EMBEDDING])
    assert close(found[head], MEAN[EMBEDDING])
    own = [
        write(tmp_path / f"own-{number}", {**state, head: 2 * state[EMBEDDING]}, tie_word_embeddings=False)
        for number, state in enumerate((BASE, FIRST, SECOND))
    ]
    assert close(merged(own[0], own[1:], tmp_path / "control")[head], 2 * MEAN[EMBEDDING])


TABLES = ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight", "shared.weight")


@pytest.mark.parametrize("is_tied", [True, None, False], ids=["tied", "not said", "head of its own"])
@pytest.mark.parametrize("whose", ["base", "a", "base, b", "base, a, b"])
def test_every_copy_of_a_shared_embedding_is_the_merged_one(whose: str, is_tied: bool | None, tmp_path: Path) -> None:
    """T5's table, stored once or as often as its network has it; an untied head is a matrix of its own."""
    folders = {}
    for name, state in (("base", BASE), ("a", FIRST), ("b", SECOND)):
        stored = {key: tensor for key, tensor in state.items() if key != EMBEDDING}
        stored |= {table: state[EMBEDDING].clone() for table in (TABLES if name in whose else TABLES[3:])}
        if is_tied is False:
            stored[HEAD] = 2 * state[EMBEDDING]
        folders[name] = write(tmp_path / name, stored, tie_word_embeddings=is_tied)
    found = merged(folders["base"], [folders["a"], folders["b"]], tmp_path / "out")
    tables = [table for table in TABLES if table in found and (table != HEAD or is_tied is not False)]
    assert len(tables) == (1 if "base" not in whose else 4 if is_tied is not False else 3)
    assert all(close(found[table], MEAN[EMBEDDING]) for table in tables)
    assert is_tied is not False or close(found[HEAD], 2 * MEAN[EMBEDDING])


def test_an_untied_expert_of_a_tied_base_gives_a_head_of_its_own(tmp_path: Path) -> None:
    own = torch.randn(BASE[EMBEDDING].shape, generator=torch.Generator().manual_seed(9))
    base, tied = write(tmp_path / "base", BASE), write(tmp_path / "tied", SECOND)
    untied = write(tmp_path / "untied", {**FIRST, HEAD: own}, tie_word_embeddings=False)
    found = merged(base, [untied, tied], tmp_path / "out")
    assert close(found[HEAD], half_of_each(BASE[EMBEDDING], own, SECOND[EMBEDDING]))
    assert close(found[EMBEDDING], MEAN[EMBEDDING])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert HEAD in notes_of(tmp_path / "out")
    # The same with a base that stores its copy.
    stored = write(tmp_path / "stored", with_head(BASE))
    again = merged(stored, [untied, tied], tmp_path / "again")
    assert all(torch.equal(again[name], found[name]) for name in found)
    assert config_of(tmp_path / "again")["tie_word_embeddings"] is False
    # Control: without it nothing is untied.
    merged(base, [tied, write(tmp_path / "c", FIRST)], tmp_path / "control")
    assert config_of(tmp_path / "control")["tie_word_embeddings"] is True


def test_a_tied_expert_of_an_untied_base_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {**BASE, HEAD: FIRST[EMBEDDING]}, tie_word_embeddings=False)
    with pytest.raises(Mismatch, match=r"lm_head.weight: base .* has its own output head, expert 1 .* ties it"):
        merged(base, [write(tmp_path / "a", FIRST)], tmp_path / "out")


HEADS: State = {"score.weight": torch.ones(3, HIDDEN), "score.bias": torch.zeros(3)}
REFUSED: dict[str, tuple[State, State, str]] = {
    "layer lost": (
        BASE,
        {n: t for n, t in FIRST.items() if "layers.1" not in n},
        r"layers.1.*: in base .* not in expert",
    ),
    "layer more": (BASE, {**FIRST, "model.layers.2.mlp.up_proj.weight": torch.ones(6, 4)}, r"layers.2.*in expert 1"),
    "bias more": (BASE, {**FIRST, "model.layers.0.mlp.up_proj.bias": torch.ones(6)}, r"up_proj.bias: in expert 1"),
    "norm lost": (BASE, {n: t for n, t in FIRST.items() if n != "model.norm.weight"}, "model.norm.weight: in base"),
    "embedding lost": (BASE, {n: t for n, t in FIRST.items() if n != EMBEDDING}, "embed_tokens.weight: in base"),
    "width": (BASE, {**FIRST, "model.layers.0.mlp.up_proj.weight": torch.ones(7, 4)}, r"\[6, 4\] in base .* \[7, 4\]"),
    "integers differ": (
        {**BASE, "model.table": torch.arange(3)},
        {**FIRST, "model.table": torch.zeros(3, dtype=torch.int64)},
        "model.table: this torch.int64 buffer differs",
    ),
}


@pytest.mark.parametrize(("base", "expert", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("template", [None, "base", 1])
def test_what_belongs_to_the_body_must_be_there(
    template: str | int | None, base: State, expert: State, message: str, tmp_path: Path
) -> None:
    folders = [write(tmp_path / str(n), state, num_hidden_layers=3) for n, state in enumerate((base, expert))]
    if template == 1:  # what one lacks, the other has too much
        message = r"model\."
    with pytest.raises(Mismatch, match=message) as caught:
        merged(folders[0], folders[1:], tmp_path / "out", template=template)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_heads_of_experts_are_kept_or_lost_by_choice(tmp_path: Path) -> None:
    base = write(tmp_path / "base", BASE)
    classifier = write(tmp_path / "a", {**FIRST, **HEADS}, architectures=["LlamaForSequenceClassification"])
    other = write(tmp_path / "b", {**SECOND, "score.weight": torch.ones(5, HIDDEN), "score.bias": torch.zeros(5)})
    with pytest.raises(Mismatch, match=r"score.\w+ is in expert 1 .* --template 1 keeps it, --template base leaves"):
        merged(base, [classifier, other], tmp_path / "out")
    without = merged(base, [classifier, other], tmp_path / "without", template="base")
    assert without.keys() == BASE.keys()
    assert all(close(without[name], MEAN[name]) for name in BASE)
    assert "left out of expert 1: score.bias, score.weight" in notes_of(tmp_path / "without")
    kept = merged(base, [classifier, other], tmp_path / "kept", template=1)
    assert all(close(kept[name], MEAN[name]) for name in BASE)
    assert torch.equal(kept["score.weight"], HEADS["score.weight"])
    assert config_of(tmp_path / "kept")["architectures"] == ["LlamaForSequenceClassification"]
    assert "kept as expert 1 has them" in notes_of(tmp_path / "kept")


def test_heads_of_other_labels_are_told_from_those_that_merge(tmp_path: Path) -> None:
    two, three = ({"classifier.weight": torch.full((count, HIDDEN), 1.0)} for count in (2, 3))
    base = write(tmp_path / "base", {**BASE, **two})
    folders = [
        write(tmp_path / "a", {**FIRST, **three}),
        write(tmp_path / "b", {**SECOND, "classifier.weight": torch.zeros(2, 4)}),
    ]
    with pytest.raises(
        Mismatch, match=r"classifier.weight: .*\[2, 4\] in base .*\[3, 4\] .* --template base or --template 1"
    ):
        merged(base, folders, tmp_path / "out")
    chosen = merged(base, folders, tmp_path / "chosen", template="base")
    assert close(chosen["classifier.weight"], torch.full((2, 4), 0.5))  # expert 1 counts as unchanged there
    assert "expert 1 counts as unchanged" in notes_of(tmp_path / "chosen")
    averaged = merged(None, [folders[1], base], tmp_path / "mean", method=Linear())
    assert close(averaged["classifier.weight"], torch.full((2, 4), 0.5))


def test_rows_of_one_label_merge_whatever_their_order(tmp_path: Path) -> None:
    """Labels in another order are the same classifier; other labels, one for one, are another."""
    rows = torch.arange(3.0)[:, None].expand(3, HIDDEN).contiguous()

    def classifier(folder: str, state: State, head: torch.Tensor, labels: str) -> Path:
        named = {str(number): label for number, label in enumerate(labels)}
        return write(tmp_path / folder, {**state, "classifier.weight": head}, id2label=named)

    base = classifier("base", BASE, rows, "abc")
    first = classifier("first", FIRST, rows + 1, "abc")
    turned = classifier("turned", SECOND, (rows + 3)[[2, 0, 1]], "cab")
    found = merged(base, [first, turned], tmp_path / "out")
    assert close(found["classifier.weight"], rows + 2)
    assert all(close(found[name], MEAN[name]) for name in BASE)
    assert "expert 2 has its labels in another order than base" in notes_of(tmp_path / "out")

    strange = classifier("strange", SECOND, rows + 3, "xyz")
    with pytest.raises(Mismatch, match=r"its rows are a, b, c in base .* but x, y, z in expert 2 .* --template base"):
        merged(base, [first, strange], tmp_path / "refused")
    kept = merged(base, [first, strange], tmp_path / "kept", template="base")
    assert close(kept["classifier.weight"], rows + 0.5)  # expert 2 counts as unchanged there
    # The control: names that only count rows say nothing, and rows merge by number.
    counted = write(
        tmp_path / "counted",
        {**SECOND, "classifier.weight": rows + 3},
        id2label={str(number): f"LABEL_{number}" for number in range(3)},
    )
    plain = write(tmp_path / "plain", {**BASE, "classifier.weight": rows})
    assert close(merged(plain, [first, counted], tmp_path / "by number")["classifier.weight"], rows + 2)


def test_a_head_that_no_expert_has_stays(tmp_path: Path) -> None:
    head = {"cls.seq_relationship.weight": torch.ones(2, HIDDEN), "model.pooler.dense.weight": torch.ones(4, 4)}
    found = merged(
        write(tmp_path / "base", {**BASE, **head}),
        [write(tmp_path / "a", FIRST), write(tmp_path / "b", SECOND)],
        tmp_path / "out",
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in head.items())
    assert all(close(found[name], MEAN[name]) for name in BASE)
    assert "cls.seq_relationship.weight" in notes_of(tmp_path / "out")


def tower(name: str, state: State) -> State:
    return {tensor_name.replace("model.", f"{name}."): tensor for tensor_name, tensor in state.items()}


def test_a_tower_is_merged_into_the_whole_that_holds_it(tmp_path: Path) -> None:
    whole = {**tower("vision_model", BASE), **tower("text_model", SECOND), "logit_scale": torch.tensor(2.0)}
    vision = {"model_type": "clip_vision_model", "num_attention_heads": 2}
    text = {"model_type": "clip_text_model", "num_attention_heads": 1}
    base = write(
        tmp_path / "base", whole, model_type="clip", num_attention_heads=None, vision_config=vision, text_config=text
    )
    experts = [
        write(tmp_path / "a", tower("vision_model", FIRST), **vision),
        # Saved alone, a tower may lose its prefix; which of the two it is, its config says, and its shapes.
        write(tmp_path / "b", {**tower("vision_model", SECOND)}, **vision),
    ]
    found = merged(base, experts, tmp_path / "out")
    assert all(close(found[name], tensor) for name, tensor in tower("vision_model", MEAN).items())
    assert all(torch.equal(found[name], tensor) for name, tensor in tower("text_model", SECOND).items())
    with pytest.raises(Mismatch, match=r"num_attention_heads is 2 .* but 4"):
        merged(
            base,
            [write(tmp_path / "c", tower("vision_model", FIRST), **vision | {"num_attention_heads": 4})],
            tmp_path / "no",
        )
    with pytest.raises(Mismatch, match=r"model_type is clip .* but vit"):
        merged(base, [write(tmp_path / "d", tower("vision_model", FIRST), model_type="vit")], tmp_path / "no")
    with pytest.raises(
        Mismatch, match=r"logit_scale is in expert 1 .*--template base"
    ):  # the whole is no fine-tune of a part
        merged(experts[0], [base], tmp_path / "no")


def test_the_bias_on_barts_output_may_be_missing(tmp_path: Path) -> None:
    """A bare BART and its classifiers have none; what is lost without it is chosen, and all else merges."""
    bias = {"final_logits_bias": torch.ones(1, ROWS)}
    base, with_bias = write(tmp_path / "base", BASE), write(tmp_path / "with", {**BASE, **bias})
    first, second = write(tmp_path / "a", {**FIRST, **bias}), write(tmp_path / "b", SECOND)
    with pytest.raises(Mismatch, match=r"final_logits_bias is in expert 1 .*--template 1 keeps it"):
        merged(base, [first, second], tmp_path / "refused")
    kept = merged(base, [first, second], tmp_path / "chosen", template=1)
    assert torch.equal(kept["final_logits_bias"], bias["final_logits_bias"])
    found = merged(with_bias, [second, second], tmp_path / "lacking")
    assert torch.equal(found["final_logits_bias"], bias["final_logits_bias"])
    assert all(close(kept[name], MEAN[name]) for name in MEAN)
    other = {**FIRST, "model.other_bias": torch.ones(1, ROWS)}
    with pytest.raises(Mismatch, match="hold the same tensors"):  # the control
        merged(base, [write(tmp_path / "other", other), second], tmp_path / "refused")


def test_prediction_layers_and_value_heads_are_carried(tmp_path: Path) -> None:
    predicting = {
        "model.layers.2.eh_proj.weight": torch.ones(4, 8),
        "model.layers.2.mlp.up_proj.weight": torch.ones(6, 4),
    }
    value_head = {"v_head.summary.weight": torch.ones(1, 4), "v_head.summary.bias": torch.zeros(1)}
    base = write(tmp_path / "base", {**BASE, **predicting})
    trained = write(tmp_path / "a", {**FIRST, **{n: 3 * t for n, t in predicting.items()}, **value_head})
    lost = write(tmp_path / "b", SECOND)
    found = merged(base, [trained, lost], tmp_path / "out")
    assert all(close(found[name], MEAN[name]) for name in BASE)
    assert all(close(found[name], 2 * tensor) for name, tensor in predicting.items())  # half of one task vector
    assert all(torch.equal(found[name], tensor) for name, tensor in value_head.items())
    assert "expert 2 counts as unchanged" in notes_of(tmp_path / "out")
    alone = merged(base, [lost], tmp_path / "alone")
    assert all(torch.equal(alone[name], tensor) for name, tensor in predicting.items())
    with pytest.raises(Mismatch, match=r"v_head.*--template"):  # two value heads are no one's
        merged(base, [trained, write(tmp_path / "c", {**SECOND, **value_head})], tmp_path / "no")


def test_classes_do_not_matter_where_tensors_agree(tmp_path: Path) -> None:
    base = write(tmp_path / "base", BASE)
    for number, classes in enumerate((None, ["MyOwnLlama"], ["LlamaModel"])):
        expert = write(tmp_path / str(number), FIRST, architectures=classes)
        assert close(
            merged(base, [expert], tmp_path / f"out{number}")[EMBEDDING],
            half_of_each(BASE[EMBEDDING], FIRST[EMBEDDING]),
        )


SETTINGS: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "rope_theta": ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000.0 in base"),
    "scaling": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "factor is 2.0",
    ),
    "activation": ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act is silu"),
    "equal": ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 10000}}, ""),
    "said by one": ({"rope_theta": 1e4}, {}, ""),
}


@pytest.mark.parametrize(("ours", "theirs", "note"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_the_merge_has_of_one_model_are_said(
    ours: dict[str, object], theirs: dict[str, object], note: str, tmp_path: Path
) -> None:
    folders = [write(tmp_path / "base", BASE, **ours), write(tmp_path / "a", FIRST, **theirs)]
    merged(folders[0], folders[1:], tmp_path / "out")
    notes = notes_of(tmp_path / "out")
    assert note in notes if note else not notes


def test_a_template_there_is_not(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(n), state) for n, state in enumerate((BASE, FIRST))]
    with pytest.raises(UsageError, match=r"template 2: .* choose one of base, 1"):
        merged(folders[0], folders[1:], tmp_path / "out", template=2)
    with pytest.raises(UsageError, match=r"template base: .* choose one of 1, 2"):
        merged(None, folders, tmp_path / "out", method=Linear(), template="base")


@pytest.mark.parametrize("method", [Ties(), DareLinear(), TaskArithmetic()], ids=repr)
def test_threads_and_shards_change_nothing(method: Merge, tmp_path: Path) -> None:
    whole = [write(tmp_path / str(n), s) for n, s in enumerate((with_head(BASE), FIRST, with_buffers(SECOND)))]
    first = merged(whole[0], whole[1:], tmp_path / "one", method=method, threads=1)
    second = merged(whole[0], whole[1:], tmp_path / "many", method=method, threads=5)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "many" / "model.safetensors"
    ).read_bytes()
    assert first.keys() == second.keys()


assert CONFIG["num_hidden_layers"] == 2, "the tests of prediction layers count on it"
