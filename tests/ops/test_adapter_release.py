"""An adapter written again as an adapter: the same products in other numbers, and a plain word on what that stops."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import unmergeable
from unmergeable.checkpoint.manifest import check_files
from unmergeable.errors import BadInput, CheckpointError, UsageError
from unmergeable.optional import quiet

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ADAPTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LoRA": ("Llama", {}, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "DoRA and a saved norm": (
        "Llama", {}, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["norm"]},
    ),
    "stacked experts": ("Mixtral", EXPERTS, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
}  # fmt: skip


def adapted(folder: Path, family: str, sizes: dict[str, Any], settings: dict[str, Any]) -> torch.Tensor:
    """Write a base and an adapter of random numbers; what the adapter answers."""
    with warnings.catch_warnings(), quiet(transformers):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SIZES, **sizes)
        network = getattr(transformers, f"{family}ForCausalLM")(config)
        network.save_pretrained(folder / "base")
        model = peft.get_peft_model(network, peft.LoraConfig(r=3, lora_alpha=4, **settings))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / "adapter")
        (folder / "adapter" / "LICENSE").write_text("mine")
    return answers(folder, "adapter")


@torch.no_grad()
def answers(folder: Path, adapter: str) -> torch.Tensor:
    with warnings.catch_warnings(), quiet(transformers):
        warnings.simplefilter("ignore")
        network = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        model = peft.PeftModel.from_pretrained(network, folder / adapter).eval()
        result: torch.Tensor = model(input_ids=torch.arange(8)[None]).logits
    return result


@pytest.mark.parametrize(("family", "sizes", "settings"), ADAPTERS.values(), ids=ADAPTERS)
def test_it_answers_the_same_with_other_factors(
    family: str, sizes: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    before = adapted(tmp_path, family, sizes, settings)
    result = unmergeable.protect(
        tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out", keep_adapter=True, seed=1
    )
    assert torch.allclose(answers(tmp_path, "out"), before, atol=1e-4)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "adapter"))
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        is_factor = ".lora_A" in key or ".lora_B" in key or "embedding_" in key
        distance = float((tensor - theirs[key]).norm() / theirs[key].norm())
        assert distance > 0.1 if is_factor else distance == 0, key
    assert check_files(tmp_path / "out") == ()
    assert (tmp_path / "out" / "LICENSE").read_text() == "mine"
    assert any(note.startswith("This stops nothing:") for note in result.notes)
    assert result.key is None
    assert "This stops nothing" in "\n".join(result.lines())


def test_a_dry_run_writes_nothing_and_refuses_the_same(tmp_path: Path) -> None:
    adapted(tmp_path, *ADAPTERS["LoRA"])

    def release(**options: Any) -> Any:
        given = {"base": tmp_path / "base", "out": tmp_path / "out", "keep_adapter": True, "dry_run": True}
        return unmergeable.protect(options.pop("expert", tmp_path / "adapter"), **{**given, **options})

    assert release().is_dry_run
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        UsageError, match="mergelock changes whole weights: with keep_adapter give one of collapse, trap2"
    ):
        release(method="mergelock")
    with pytest.raises(UsageError, match="leave out key"):
        release(key=tmp_path / "k")
    with pytest.raises(CheckpointError, match="not an adapter"):
        release(expert=tmp_path / "base")
    with pytest.raises(BadInput, match="lie inside each other"):
        release(out=tmp_path / "adapter" / "out")


def test_rank_one_has_nothing_to_turn(tmp_path: Path) -> None:
    with quiet(transformers):
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        peft.get_peft_model(network, peft.LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(
            tmp_path / "adapter"
        )
    with pytest.raises(BadInput, match="rank 1, in which there is nothing to turn"):
        unmergeable.protect(tmp_path / "adapter", base=tmp_path, out=tmp_path / "out", keep_adapter=True)
