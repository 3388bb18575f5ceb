"""Every kind of adapter that is merged here, against peft: its merge, saved by peft and read from the disk again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.rewrite import output_like, rewrite
from unmergeable.errors import BadInput, CheckpointError, Mismatch
from unmergeable.optional import quiet

UNIT_ROUNDOFF = 2.0**-24  # of float32, rounding to nearest
WIDEST = 48  # of the networks below
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IMAGES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
          "image_size": 8, "patch_size": 4}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def network(family: str, kind: str = "ForCausalLM", **settings: Any) -> Any:
    sizes = IMAGES if family in ("ViT", "Dinov2") else SIZES
    config = getattr(transformers, f"{family}Config")(**{**sizes, **settings})
    made = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            # transformers begins with biases of zero and matrices so small that an adapter's effect drowns.
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=(parameter.shape[0] / parameter.numel()) ** 0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return made


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **settings})


class Adapted:
    """A base, an adapter of it with random values, and what peft makes of the two, in folders."""

    def __init__(self, folder: Path, base: Any, settings: Any, trained_as: str | None = None) -> None:
        self.folder = folder
        with quiet(transformers):
            torch.manual_seed(0)
            base.save_pretrained(folder / "base")
            class_name = trained_as or type(base).__name__
            self.network_class = getattr(transformers, class_name)
            adapted = peft.get_peft_model(self._loaded("base"), settings)
            generator = torch.Generator().manual_seed(1)
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
            adapted.save_pretrained(folder / "adapter")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.used = self._answers(peft.PeftModel.from_pretrained(self._loaded("base"), folder / "adapter"))
                merged = peft.PeftModel.from_pretrained(self._loaded("base"), folder / "adapter").merge_and_unload()
            merged.save_pretrained(folder / "merged")

    def open(self) -> Any:
        return open_checkpoint(self.folder / "adapter", base=self.folder / "base")

    def write(self) -> None:
        source = self.open()
        rewrite(source, self.folder / "written", output_like(source, {}), manifest={}, resume_token="")

    def answers_of(self, folder: str) -> torch.Tensor:
        with quiet(transformers):
            return self._answers(self._loaded(folder))

    def _loaded(self, folder: str) -> Any:
        torch.manual_seed(2)  # of a new head, which peft draws before it reads it
        return self.network_class.from_pretrained(self.folder / folder)

    @torch.no_grad()
    def _answers(self, model: Any) -> torch.Tensor:
        is_vision = hasattr(model.config, "image_size")
        image = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)
        answers = model.eval()(**({"pixel_values": image} if is_vision else {"input_ids": torch.arange(3, 11)[None]}))
        result: torch.Tensor = answers.logits
        return result


LINEAR = ["q_proj", "v_proj", "up_proj"]
MERGED: dict[str, tuple[Callable[[], Any], Any, str | None]] = {
    "DoRA": (lambda: network("Llama"), lora(target_modules=[*LINEAR, "embed_tokens"], use_dora=True), None),
    "DoRA on transposed weights": (
        lambda: network("GPT2", "LMHeadModel", n_layer=1, n_embd=16, n_head=4, tie_word_embeddings=False),
        lora(target_modules=["c_attn", "mlp.c_fc"], use_dora=True, fan_in_fan_out=True),
        None,
    ),
    "biases of B": (lambda: network("Qwen2"), lora(target_modules=["q_proj"], lora_bias=True, use_rslora=True), None),
    "trained tokens": (lambda: network("Llama"), lora(target_modules=LINEAR, trainable_token_indices=[5, 3]), None),
    "trained tokens, tied": (
        lambda: network("Llama", tie_word_embeddings=True),
        lora(target_modules=LINEAR, trainable_token_indices={"embed_tokens": [3, 5]}),
        None,
    ),
    "trained tokens of two modules": (
        lambda: network("Llama"),
        lora(target_modules=LINEAR, trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [4]}),
        None,
    ),
    "trained tokens alone, tied": (
        lambda: network("Llama", tie_word_embeddings=True),
        peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
        None,
    ),
    "AdaLoRA": (
        lambda: network("Llama"),
        peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=4, target_modules=LINEAR, total_step=10,
                           task_type="CAUSAL_LM"),
        None,
    ),
    "LoHa": (
        lambda: network("Llama"),
        peft.LoHaConfig(r=2, alpha=4, target_modules=LINEAR, rank_pattern={"up_proj": 3}, task_type="CAUSAL_LM"),
        None,
    ),
    "LoKr": (
        lambda: network("Llama"),
        peft.LoKrConfig(r=2, alpha=4, target_modules=LINEAR, decompose_both=True, decompose_factor=2,
                        task_type="CAUSAL_LM"),
        None,
    ),
    "VeRA": (lambda: network("Llama"), peft.VeraConfig(r=3, target_modules=["q_proj", "v_proj"]), None),
    "norms": (lambda: network("Llama"), peft.LNTuningConfig(target_modules=["input_layernorm"]), None),
    "stacked experts in the file": (
        lambda: network("GptOss", head_dim=4, **EXPERTS),
        lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        None,
    ),
    "experts in files of their own": (
        lambda: network("Mixtral", **EXPERTS),
        lora(target_modules=["q_proj"], modules_to_save=["gate"],
             target_parameters=["experts.gate_up_proj", "experts.down_proj"],
             rank_pattern={"experts.down_proj": 3}),
        None,
    ),
    "one parameter of experts": (
        lambda: network("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=4),
        lora(target_modules=["q_proj"], target_parameters=["down_proj"]),
        None,
    ),
    "an embedding saved, tied": (
        lambda: network("Llama", tie_word_embeddings=True),
        lora(target_modules=LINEAR, modules_to_save=["embed_tokens"]),
        None,
    ),
    "a head saved, tied": (
        lambda: network("Qwen2", tie_word_embeddings=True),
        lora(target_modules=LINEAR, modules_to_save=["lm_head"]),
        None,
    ),
    "both saved, tied": (
        lambda: network("GPT2", "LMHeadModel", n_layer=1, n_embd=16, n_head=4),
        lora(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wte", "lm_head"]),
        None,
    ),
    "both saved and kept tied": (
        lambda: network("Llama", tie_word_embeddings=True),
        lora(target_modules=LINEAR, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        None,
    ),
    "a classifier": (
        lambda: network("Llama"), lora(target_modules=LINEAR, task_type="SEQ_CLS"), "LlamaForSequenceClassification",
    ),
    "a classifier of a tied base": (
        lambda: network("GPT2", "LMHeadModel", n_layer=1, n_embd=16, n_head=4),
        lora(target_modules=["c_attn"], fan_in_fan_out=True, task_type="SEQ_CLS"),
        "GPT2ForSequenceClassification",
    ),
    "a classifier of tokens": (
        lambda: network("Bert", "ForMaskedLM"),
        lora(target_modules=["query", "value"], task_type="TOKEN_CLS"),
        "BertForTokenClassification",
    ),
    "modules that transformers renames": (
        lambda: network("ViT", "ForImageClassification"), lora(target_modules=["q_proj"], task_type=None), None,
    ),
    "a head that is renamed": (
        lambda: network("GPTNeoX"), lora(target_modules=["query_key_value"], modules_to_save=["lm_head"]), None,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("build", "settings", "trained_as"), MERGED.values(), ids=MERGED)
def test_what_is_written_is_what_peft_writes(
    build: Callable[[], Any], settings: Any, trained_as: str | None, tmp_path: Path
) -> None:
    """The same tensors up to rounding, the same class and tying, and so the same answers as peft's adapter gives.

    peft rounds at each of its sums over a rank or a row, of at most ``WIDEST`` numbers; so with unit roundoff u both
    results lie within (WIDEST + 8) u of the largest number that is summed, here below 4 times that of the result.
    """
    case = Adapted(tmp_path, build(), settings, trained_as)
    case.write()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("written", "merged"))
    base = load_file(tmp_path / "base" / "model.safetensors")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("written", "merged")]

    assert ours.keys() == theirs.keys()
    changed = 0
    for name, tensor in ours.items():
        bound = 4 * (WIDEST + 8) * UNIT_ROUNDOFF * max(float(theirs[name].abs().max()), 1.0)
        assert float((tensor - theirs[name]).abs().max()) <= bound, name
        changed += name not in base or float((tensor - base[name]).abs().max()) > 100 * bound
    assert changed >= 1, "the control: the adapter is far above the tolerance"
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert configs[0].get("id2label") == configs[1].get("id2label")
    scale = float(case.used.abs().max())
    assert float((case.answers_of("written") - case.used).abs().max()) <= 1e-4 * max(scale, 1.0)
    if trained_as is None:
        assert float((case.answers_of("base") - case.used).abs().max()) > 1e-2 * scale, "the control"


PARTED = {
    "an update of a tied embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "an update of a tied head": lora(target_modules=["q_proj", "lm_head"]),
    "updates of both, kept tied": lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "other tokens of a tied head": lora(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [4]}
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", PARTED.values(), ids=PARTED)
def test_what_peft_merges_into_something_else_is_refused(settings: Any, tmp_path: Path) -> None:
    case = Adapted(tmp_path, network("Llama", tie_word_embeddings=True), settings)
    gap = float((case.answers_of("merged") - case.used).abs().max())
    assert gap > 0.1, "the reason: peft's merge does not compute what the adapter computes"
    with pytest.raises(CheckpointError, match=r"are tied in the base, .* tie_word_embeddings=False and merge it with"):
        case.open()


@pytest.mark.filterwarnings("ignore")
def test_a_changed_base_is_refused_and_its_conversion_is_merged(tmp_path: Path) -> None:
    """PiSSA takes its first product out of the base. peft's conversion writes what was learnt as a plain LoRA."""
    for start in ("pissa", "olora"):
        folder = tmp_path / start
        settings = lora(target_modules=["q_proj"], init_lora_weights=start)
        with quiet(transformers):
            base = network("Llama")
            base.save_pretrained(folder / "base")
            adapted = peft.get_peft_model(base, settings)
            adapted.peft_config["default"].init_lora_weights = True
            adapted.save_pretrained(folder / "start")
            adapted.peft_config["default"].init_lora_weights = start
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            adapted.save_pretrained(folder / "adapter")
            adapted.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=folder / "start")
            used = adapted.eval()(torch.arange(8)[None]).logits
        with pytest.raises(CheckpointError, match=f"init_lora_weights '{start}' trains on a changed base"):
            open_checkpoint(folder / "adapter", base=folder / "base")
        source = open_checkpoint(folder / "converted", base=folder / "base")
        rewrite(source, folder / "written", output_like(source, {}), manifest={}, resume_token="")
        with quiet(transformers):
            written = transformers.LlamaForCausalLM.from_pretrained(folder / "written")(torch.arange(8)[None]).logits
        assert torch.allclose(written, used, atol=1e-4)


def test_a_tied_t5_is_not_untied(tmp_path: Path) -> None:
    """It scales what comes before a tied head, so the untied network is another."""
    with quiet(transformers):
        config = transformers.T5Config(
            vocab_size=31, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
        )
        base = transformers.T5ForConditionalGeneration(config)
        base.save_pretrained(tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(
                base, lora(target_modules=["q"], modules_to_save=["lm_head"], task_type="SEQ_2_SEQ_LM")
            )
        adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises((CheckpointError, Mismatch), match="tied"):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architectures", [None, "leave out"])
def test_a_base_that_names_no_class_is_of_the_adapters_task(architectures: str | None, tmp_path: Path) -> None:
    """Whether its embeddings are tied only the class can tell."""
    case = Adapted(
        tmp_path,
        network("Llama", tie_word_embeddings=True),
        lora(target_modules=LINEAR, modules_to_save=["embed_tokens"]),
    )
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text()) | {"architectures": architectures}
    if architectures is not None:
        del config["architectures"]
    path.write_text(json.dumps(config))
    case.write()
    assert torch.allclose(case.answers_of("written"), case.used, atol=1e-4)


def spoilt(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def adapted(tmp_path: Path) -> Adapted:
    return Adapted(tmp_path, network("Llama"), lora(target_modules=["q_proj"]))


def test_an_adapter_that_was_not_gathered_is_refused(adapted: Adapted) -> None:
    """DeepSpeed ZeRO-3 leaves a file without tensors, or with tensors of size 0."""
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    adapted.open()
    for tensors in ({}, {key.format(part): torch.zeros(0) for part in "AB"}):
        spoilt(adapted.folder / "adapter", tensors)
        with pytest.raises(
            CheckpointError, match=r"ZeRO-3 or FSDP .* save the adapter again from the gathered weights"
        ):
            adapted.open()


def test_an_adapter_beside_a_whole_model_is_refused(adapted: Adapted) -> None:
    """Nobody can tell which of the two is meant, and each is another model."""
    both = adapted.folder / "adapter"
    merged = (adapted.folder / "merged" / "model.safetensors").read_bytes()
    (both / "model.safetensors").write_bytes(merged)
    message = r"holds an adapter \(adapter_config.json\) and a whole model \(model.safetensors\): move one of them"
    with pytest.raises(CheckpointError, match=message):
        adapted.open()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(both)
    (both / "model.safetensors").unlink()
    adapted.open()


@pytest.mark.filterwarnings("ignore")
def test_a_head_without_its_weights_is_refused(tmp_path: Path) -> None:
    case = Adapted(
        tmp_path,
        network("Llama"),
        lora(target_modules=["q_proj"], task_type="SEQ_CLS"),
        "LlamaForSequenceClassification",
    )
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    spoilt(tmp_path / "adapter", {key: tensor for key, tensor in tensors.items() if "score" not in key})
    with pytest.raises(
        CheckpointError, match=r"LlamaForSequenceClassification needs 'score.weight' \[2, 16\], .* is lost"
    ):
        case.open()


RENAMED: dict[str, Callable[[str], str]] = {
    "a state dict of peft's own": lambda key: key.replace(".weight", ".default.weight"),
    "DDP": lambda key: f"module.{key}",
    "torch.compile around peft": lambda key: f"_orig_mod.{key}",
    "torch.compile inside peft": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "activation checkpointing": lambda key: key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "wrapped by peft twice": lambda key: f"base_model.model.{key}",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("renamed", RENAMED.values(), ids=RENAMED)
def test_names_that_wrappers_leave_in_keys(renamed: Callable[[str], str], adapted: Adapted) -> None:
    """The tensors are those of the adapter as peft saves it, to the bit."""
    expected = adapted.open()
    names = sorted(expected.names)
    before = {name: expected.tensor(name) for name in names}
    tensors = load_file(adapted.folder / "adapter" / "adapter_model.safetensors")
    spoilt(adapted.folder / "adapter", {renamed(key): tensor for key, tensor in tensors.items()})
    opened = adapted.open()
    assert sorted(opened.names) == names
    assert all(torch.equal(opened.tensor(name), tensor) for name, tensor in before.items())
    spoilt(adapted.folder / "adapter", {f"other.{key}": tensor for key, tensor in tensors.items()})
    with pytest.raises(Mismatch, match="does not start with base_model"):  # the control
        adapted.open()


@pytest.mark.filterwarnings("ignore")
def test_several_adapters_in_one_file(adapted: Adapted) -> None:
    tensors = load_file(adapted.folder / "adapter" / "adapter_model.safetensors")
    both = {key.replace(".weight", f".{name}.weight"): value for key, value in tensors.items() for name in ("b", "a")}
    spoilt(adapted.folder / "adapter", {key: tensor.clone() for key, tensor in both.items()})
    with pytest.raises(CheckpointError, match=r"several adapters \(a, b\): load it with peft and save one of them"):
        adapted.open()
    twice = {**tensors, **{f"module.{key}": tensor.clone() for key, tensor in tensors.items()}}
    spoilt(adapted.folder / "adapter", twice)
    with pytest.raises(CheckpointError, match="are the same tensor"):
        adapted.open()


@pytest.mark.filterwarnings("ignore")
def test_a_bias_that_the_base_has_no_place_for(tmp_path: Path) -> None:
    """peft cannot merge it either, so nobody is sent there."""
    settings = lora(target_modules=["q_proj"], lora_bias=True)
    with quiet(transformers):
        network("Llama").save_pretrained(tmp_path / "base")
        base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        adapted = peft.get_peft_model(base, settings)
        adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="Impossible to merge"):
        adapted.merge_and_unload()
    with pytest.raises(Mismatch, match=r"peft cannot merge it either; train the adapter with lora_bias=False\."):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "task", "headless"),
    [
        ("Llama", "FEATURE_EXTRACTION", True),
        ("Llama", None, True),
        ("GPT2", "FEATURE_EXTRACTION", True),
        ("Bert", "FEATURE_EXTRACTION", True),
        ("Llama", "FEATURE_EXTRACTION", False),
        ("Bert", None, False),
    ],
)
def test_an_adapter_for_embeddings_makes_a_network_without_a_head(
    family: str, task: str | None, headless: bool, tmp_path: Path
) -> None:
    """Trained in the network without its head, it is that network with the update merged in, as peft saves it.

    Only its keys tell: in a network with a head, modules are called otherwise, and the head stays.
    """
    kinds = {"Llama": "ForCausalLM", "GPT2": "LMHeadModel", "Bert": "ForMaskedLM"}
    layers = {"n_layer": 1, "n_embd": 16, "n_head": 4} if family == "GPT2" else {}
    wanted = {"Llama": "q_proj", "GPT2": "c_attn", "Bert": "query"}[family]
    with quiet(transformers):
        network(family, kinds[family], **layers).save_pretrained(tmp_path / "base")
        kind = transformers.AutoModel if headless else getattr(transformers, f"{family}{kinds[family]}")
        torch.manual_seed(0)
        adapted = peft.get_peft_model(
            kind.from_pretrained(tmp_path / "base"), lora(target_modules=[wanted], task_type=task)
        ).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / "adapter")
        inputs = {"input_ids": torch.arange(3, 11)[None], "output_hidden_states": True}
        with torch.no_grad():
            used = adapted(**inputs).hidden_states[-1]
        source = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
        rewrite(source, tmp_path / "written", output_like(source, {}), manifest={}, resume_token="")
        with torch.no_grad():
            written = transformers.AutoModel.from_pretrained(tmp_path / "written").eval()(**inputs).hidden_states[-1]
            plain = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()(**inputs).hidden_states[-1]
    assert torch.allclose(written, used, atol=1e-4)
    assert not torch.allclose(plain, used, atol=1e-2), "the control"
    heads = [name for name in source.names if name.startswith(("lm_head", "cls."))]
    assert source.config["architectures"] == [f"{family}Model" if headless else f"{family}{kinds[family]}"]
    assert bool(heads) is (not headless and family != "GPT2"), "GPT-2's is its embedding"


@pytest.mark.filterwarnings("ignore")
def test_labels_are_as_many_as_the_head_has_rows(tmp_path: Path) -> None:
    """A classifier of five classes: peft stores the rows, and no number of labels."""
    with quiet(transformers):
        network("Llama").save_pretrained(tmp_path / "base")
        classifier = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
        adapted = peft.get_peft_model(classifier, lora(target_modules=["q_proj"], task_type="SEQ_CLS"))
        adapted.save_pretrained(tmp_path / "adapter")
    source = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    assert source.config["id2label"] == {str(number): f"LABEL_{number}" for number in range(5)}
    assert source.config["architectures"] == ["LlamaForSequenceClassification"]
    assert "lm_head.weight" not in source.names
    rewrite(source, tmp_path / "written", output_like(source, {}), manifest={}, resume_token="")
    with quiet(transformers):
        written = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "written")
    assert written.config.num_labels == 5


def test_another_base_is_refused(adapted: Adapted, tmp_path: Path) -> None:
    with quiet(transformers):
        network("Llama", hidden_size=32).save_pretrained(tmp_path / "wider")
    with pytest.raises(BadInput, match="pass the base it was trained on, or merge it with peft first"):
        open_checkpoint(adapted.folder / "adapter", base=tmp_path / "wider")


@pytest.mark.parametrize(("part", "other"), [("vision", "text"), ("text", "vision")])
def test_an_adapter_of_one_tower_changes_that_tower_of_the_whole(part: str, other: str, tmp_path: Path) -> None:
    """Both towers of CLIP have modules of the adapter's names: its class says which of them is meant."""
    config = transformers.CLIPConfig(
        text_config={**IMAGES, "vocab_size": 31, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=IMAGES,
        projection_dim=8,
    )
    class_name = f"CLIP{part.title()}Model"
    with quiet(transformers):
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(tmp_path / "whole")
        tower = getattr(transformers, class_name).from_pretrained(tmp_path / "whole")
        before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(tower, settings)
        adapted.save_pretrained(tmp_path / "adapter")
        expected = adapted.merge_and_unload().state_dict()
    source = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "whole").folder)
    whole = open_checkpoint(tmp_path / "whole")
    changed = "encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(expected[changed], before[changed])
    for name, tensor in expected.items():
        if f"{part}_model.{name}" in whole.names:
            torch.testing.assert_close(source.tensor(f"{part}_model.{name}"), tensor, msg=name)
    for name in whole.names:
        if name.startswith(f"{other}_model."):
            assert torch.equal(source.tensor(name), whole.tensor(name)), name

    # The control: without the class nobody knows which tower is meant, and the adapter is refused.
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": None}))
    with pytest.raises(Mismatch, match=r"encoder\.layers\.0\.self_attn\.q_proj"):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "whole")
