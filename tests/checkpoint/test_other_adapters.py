"""Adapters that are not merged here: what each line says to do works, and what it says of peft is so.

Every kind that peft knows is here, is merged in test_adapter_kinds.py, or this file fails.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from checkpoint.test_adapter_kinds import LINEAR, Adapted, lora, network
from unmergeable.checkpoint.adapter.settings import Kind
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import CheckpointError
from unmergeable.optional import quiet

pytestmark = pytest.mark.filterwarnings("ignore")

MERGED_HERE = set(get_args(Kind))
KINDS = {str(getattr(kind, "value", kind)): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}

WIDELY_USED = ("BOFT", "FOURIERFT", "HRA", "IA3", "MISS", "OFT", "RANDLORA", "VBLORA")
"""Those of the others that every test run looks at."""

SETTINGS: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": {"oft_block_size": 4},
    "ROAD": {"group_size": 4},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 10},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_tokens_type_mask": [1, 2]},
    "LILY": {"target_modules": ["q_proj"], "r": 2},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "POLY": {"target_modules": ["q_proj"], "r": 2, "n_tasks": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "SHADOW": {"target_modules": ["0", "1"]},
    "XLORA": {},
}
"""Kinds whose effect is in no weights of the base."""


def settings_of(kind: str) -> Any:
    made = KINDS[kind]
    if kind in PROMPTS:
        return made(task_type="CAUSAL_LM", **PROMPTS[kind])
    given: dict[str, Any] = {"target_modules": LINEAR, **SETTINGS.get(kind, {})}
    has_rank = "r" in inspect.signature(made).parameters and kind not in ("OFT", "BOFT")
    return made(task_type="CAUSAL_LM", **given, **({"r": 2} if has_rank else {}))


def peft_merges() -> list[Any]:
    names = sorted(KINDS.keys() - MERGED_HERE - PROMPTS.keys())
    return [pytest.param(name, marks=[] if name in WIDELY_USED else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("kind", peft_merges())
def test_what_peft_merges_is_taken_once_it_has(kind: str, tmp_path: Path) -> None:
    """The line sends to peft; the folder that this gives is opened, and does what the adapter does."""
    case = Adapted(tmp_path, network("Qwen2") if kind == "BEFT" else network("Llama"), biased(kind))
    with pytest.raises(
        CheckpointError, match=rf"type {kind}: .*only LORA, .* here; merge it with peft first\.$"
    ) as told:
        case.open()
    assert "\n" not in str(told.value)
    scale = float(case.used.abs().max())
    assert float((case.answers_of("merged") - case.used).abs().max()) <= 1e-4 * scale
    assert float((case.answers_of("base") - case.used).abs().max()) > 1e-2 * scale, "the control"
    assert set(open_checkpoint(tmp_path / "merged").names) == set(open_checkpoint(tmp_path / "base").names)


def biased(kind: str) -> Any:
    """Biases are merged where the base has them: in Qwen2, of queries and values."""
    if kind != "BEFT":
        return settings_of(kind)
    return KINDS[kind](task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])


def adapted(kind: str, folder: Path) -> Any:
    """A network with an untrained adapter of this kind."""
    base = network("Llama")
    if kind != "XLORA":
        return peft.get_peft_model(base, settings_of(kind))
    adapters = {}
    for name in ("0", "1"):
        peft.get_peft_model(network("Llama"), lora(target_modules=["q_proj"])).save_pretrained(folder / name)
        adapters[name] = str(folder / name)
    base.config.use_cache = False
    return peft.get_peft_model(base, KINDS[kind](task_type="CAUSAL_LM", hidden_size=16, adapters=adapters))


@pytest.mark.parametrize("kind", sorted(PROMPTS))
def test_what_not_even_peft_merges_is_said_to_be_so(kind: str, tmp_path: Path) -> None:
    with quiet(transformers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network("Llama").save_pretrained(tmp_path / "base")
        model = adapted(kind, tmp_path)
        settings_of_saved(kind, model, tmp_path / "adapter")
        require_no_merge(model)
    with pytest.raises(CheckpointError, match=rf"type {kind}: it .* peft cannot merge it either; train one of type"):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


def require_no_merge(model: Any) -> None:
    """peft refuses; or what it merges computes something else than the adapter does."""
    kind = model.peft_config["default"].peft_type.value
    if kind != "XLORA" and not getattr(model.peft_config["default"], "layer_replication", None):
        with pytest.raises((AttributeError, NotImplementedError, TypeError, ValueError)):
            model.merge_and_unload()
        return
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        used = model.eval()(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert float((merged - used).abs().max()) > 0.05 * float(used.abs().max())


def settings_of_saved(kind: str, model: Any, folder: Path) -> None:
    """An adapter folder as peft writes it."""
    model.save_pretrained(folder)
    nested = folder / "default" / "adapter_config.json"
    if not (folder / "adapter_config.json").exists() and nested.exists():
        nested.rename(folder / "adapter_config.json")


ALSO_NOT: dict[str, dict[str, Any]] = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [4, 5]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("name", ALSO_NOT)
def test_settings_of_lora_that_not_even_peft_merges(name: str, tmp_path: Path) -> None:
    with quiet(transformers):
        base = network("Llama")
        base.save_pretrained(tmp_path / "base")
        model = peft.get_peft_model(base, lora(target_modules=["q_proj"], **ALSO_NOT[name]))
        model.save_pretrained(tmp_path / "adapter")
        require_no_merge(model)
    with pytest.raises(
        CheckpointError, match=rf"setting {name}: .* peft cannot merge it either; train an adapter with"
    ):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


def test_every_kind_of_peft_is_looked_at() -> None:
    assert KINDS.keys() >= MERGED_HERE
    assert KINDS.keys() >= PROMPTS.keys(), "another release of peft"
    assert not MERGED_HERE & PROMPTS.keys()
    assert KINDS.keys() >= set(WIDELY_USED)
