"""Layers of several models, read as one network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merges.networks_on_disk import EMBEDDING, HEAD, HIDDEN, State, config_of, language_model, notes_of, write
from unmergeable.checkpoint.manifest import check_files, read_manifest
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import BadInput, Mismatch
from unmergeable.merges import merge, stacks
from unmergeable.merges.mergekit.methods import Passthrough
from unmergeable.merges.stacks import Piece, stacked

Q = "self_attn.q_proj.weight"


def layer(number: int, rest: str = Q) -> str:
    return f"model.layers.{number}.{rest}"


def merged(pieces: list[tuple[Path, int, int]], out: Path, donor: Path | None = None, **options: object) -> State:
    sources = {folder: open_checkpoint(folder) for folder, *_ in pieces}
    stack = stacked(
        [Piece(sources[folder], first, stop) for folder, first, stop in pieces],
        None if donor is None else open_checkpoint(donor),
    )
    merge(None, [(stack, None)], Passthrough(), out, **options)  # type: ignore[arg-type]
    return {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}


def two(tmp_path: Path, **config: object) -> tuple[Path, Path]:
    return tuple(write(tmp_path / name, language_model(seed), **config) for seed, name in enumerate("ab"))  # type: ignore[return-value]


def test_layers_are_numbered_anew(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    one, other = language_model(0), language_model(1)
    found = merged([(a, 0, 2), (b, 1, 2), (a, 0, 1)], tmp_path / "out")
    origins = [(one, 0), (one, 1), (other, 1), (one, 0)]
    assert len(found) == 2 + 4 * 3
    for number, (state, own) in enumerate(origins):
        for rest in (Q, "mlp.up_proj.weight", "input_norm.weight"):
            assert torch.equal(found[layer(number, rest)], state[layer(own, rest)])
    assert torch.equal(found[EMBEDDING], one[EMBEDDING])
    assert torch.equal(found["model.norm.weight"], one["model.norm.weight"])
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 4


def test_a_whole_model_is_itself(tmp_path: Path) -> None:
    source = open_checkpoint(two(tmp_path)[0])
    assert stacked([Piece(source)]) is source
    assert stacked([Piece(source, 0, 1), Piece(source, 1, 2)]) is source
    assert stacked([Piece(source, 0, 1)]) is not source
    assert stacked([Piece(source, 1, 2), Piece(source, 0, 1)]) is not source


def test_what_is_listed_for_each_layer_goes_with_it(tmp_path: Path) -> None:
    a = write(tmp_path / "a", language_model(0), layer_types=["sliding", "full"], eos_token_id=[1, 2])
    b = write(tmp_path / "b", language_model(1), layer_types=["linear", "full"])
    merged([(a, 0, 2), (b, 0, 2), (a, 1, 2)], tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["layer_types"] == ["sliding", "full", "linear", "full", "full"]
    assert config["eos_token_id"] == [1, 2]  # as many as layers, by chance


def test_layers_counted_in_a_part_of_the_configuration(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 2, "layer_types": ["x", "y"], "vocab_size": 9}
    a = write(tmp_path / "a", language_model(0), text_config=text, num_hidden_layers=None)
    merged([(a, 0, 2), (a, 1, 2)], tmp_path / "out")
    assert config_of(tmp_path / "out")["text_config"] == {
        **text,
        "num_hidden_layers": 3,
        "layer_types": ["x", "y", "y"],
    }


def test_the_last_models_head(tmp_path: Path) -> None:
    """Tied to the first model's embedding, or not: the merge ends as the last model does, unless the donor ties."""
    head = torch.ones(9, HIDDEN)
    tied = write(tmp_path / "tied", language_model(0))
    untied = write(tmp_path / "untied", {**language_model(1), HEAD: head}, tie_word_embeddings=False)
    found = merged([(tied, 0, 1), (untied, 0, 2)], tmp_path / "own")
    assert torch.equal(found[HEAD], head)
    assert config_of(tmp_path / "own")["tie_word_embeddings"] is False
    found = merged([(untied, 0, 1), (tied, 0, 2)], tmp_path / "from tied")
    assert torch.equal(found[HEAD], language_model(0)[EMBEDDING])
    assert config_of(tmp_path / "from tied")["tie_word_embeddings"] is False
    copies = write(tmp_path / "copies", {**language_model(2), HEAD: language_model(2)[EMBEDDING].clone()})
    assert HEAD not in merged([(tied, 0, 1), (copies, 0, 2)], tmp_path / "both tied")


def test_other_prefixes(tmp_path: Path) -> None:
    a = write(tmp_path / "a", language_model(0))
    bare = {name.removeprefix("model."): tensor for name, tensor in language_model(1).items()}
    b = write(tmp_path / "b", bare)
    found = merged([(a, 0, 1), (b, 1, 2)], tmp_path / "out")
    assert torch.equal(found[layer(1)], bare["layers.1." + Q])
    assert torch.equal(found["model.norm.weight"], bare["norm.weight"])
    assert set(found) == set(language_model(0))


def test_layers_that_predict_further_tokens_are_none_of_the_networks(tmp_path: Path) -> None:
    state = language_model(0) | {layer(2, "enorm.weight"): torch.ones(HIDDEN)}
    a = write(tmp_path / "a", state)
    found = merged([(a, 0, 2), (a, 1, 2)], tmp_path / "out")
    assert layer(2, "enorm.weight") not in found
    with pytest.raises(BadInput, match=r"ends behind the 2 layers of .*/a: let it end at 2 at most"):
        stacked([Piece(open_checkpoint(a), 0, 3)])


def test_shards_and_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_SHARD_BYTES", 500)
    a, b = two(tmp_path)
    for checksums in (True, False):
        out = tmp_path / f"out {checksums}"
        found = merged([(a, 0, 2), (b, 0, 2)], out, checksums=checksums)
        shards = sorted(path.name for path in out.glob("*.safetensors"))
        assert len(shards) > 1
        weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(weight_map) == set(found)
        assert sorted(set(weight_map.values())) == shards
        manifest = read_manifest(out)
        assert manifest is not None
        assert check_files(out) == ()
        records = [record for record in manifest.inputs["source"] if record.name == "model.safetensors"]
        assert len(records) == 2  # of both models
        assert all((record.xxh3_128 is not None) == checksums for record in records)


def test_a_donor_of_configuration_and_files(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    donor = write(tmp_path / "donor", language_model(2), {"x": 0}, rope_theta=5.0)
    found = merged([(a, 0, 2), (b, 0, 1)], tmp_path / "out", donor)
    assert torch.equal(found[EMBEDDING], language_model(0)[EMBEDDING])
    config = config_of(tmp_path / "out")
    assert (config["rope_theta"], config["num_hidden_layers"]) == (5.0, 3)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (donor / "tokenizer.json").read_bytes()


def test_settings_that_differ_are_said(tmp_path: Path) -> None:
    a = write(tmp_path / "a", language_model(0), rope_theta=1e4)
    b = write(tmp_path / "b", language_model(1), rope_theta=5e5)
    merged([(a, 0, 2), (b, 0, 1)], tmp_path / "out")
    assert "rope_theta is 10000.0 in " in notes_of(tmp_path / "out")
    merged([(a, 0, 2), (a, 0, 1)], tmp_path / "same")
    assert not notes_of(tmp_path / "same")


def test_what_does_not_stack(tmp_path: Path) -> None:
    a = open_checkpoint(write(tmp_path / "a", language_model(0)))
    state = language_model(1)
    other = {**state, layer(0): torch.ones(6, HIDDEN)}
    with pytest.raises(Mismatch, match=r"self_attn.q_proj.weight of a layer: \[4, 4\] in .*/a but \[6, 4\]"):
        stacked([Piece(a, 0, 1), Piece(open_checkpoint(write(tmp_path / "b", other)), 0, 1)])
    longer = {**state, EMBEDDING: torch.ones(12, HIDDEN)}
    with pytest.raises(Mismatch, match=r"embed_tokens.weight: \[9, 4\] in .* but \[12, 4\]"):
        stacked([Piece(a, 0, 1), Piece(open_checkpoint(write(tmp_path / "c", longer)), 0, 1)])
    towers = {f"{tower}.{name}": tensor.clone() for tower in ("text", "vision") for name, tensor in state.items()}
    with pytest.raises(BadInput, match=r"layers in more than one place .* merge it whole, with models"):
        stacked([Piece(open_checkpoint(write(tmp_path / "d", towers)), 0, 1)])
    with pytest.raises(Mismatch, match=r"num_attention_heads is 2 in .* but 4"):
        stacked([Piece(a, 0, 1), Piece(open_checkpoint(write(tmp_path / "e", state, num_attention_heads=4)), 0, 1)])


SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
NARROW = SIZES | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3": ("Qwen3ForCausalLM", NARROW),
    "gemma3": ("Gemma3ForCausalLM", NARROW | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "smollm3": ("SmolLM3ForCausalLM", NARROW | {"pad_token_id": 0}),
    "mixtral": ("MixtralForCausalLM", NARROW | {"num_local_experts": 2}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES | {"intermediate_size": 24}),
    "bert": ("BertForSequenceClassification", SIZES | {"intermediate_size": 24}),
}


@pytest.mark.parametrize(("network", "sizes"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_stacks_are_loaded_whole(network: str, sizes: dict[str, object], tmp_path: Path) -> None:
    import transformers

    cls = getattr(transformers, network)
    depth = 4 if "layer_types" in sizes else 3
    sizes = {name: depth if name in ("n_layer", "num_hidden_layers") else size for name, size in sizes.items()}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        cls(cls.config_class(**sizes)).save_pretrained(tmp_path / name)
    merged([(tmp_path / "a", 0, 2), (tmp_path / "b", 1, depth)], tmp_path / "out")
    loaded, report = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert loaded.config.num_hidden_layers == depth + 1
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
