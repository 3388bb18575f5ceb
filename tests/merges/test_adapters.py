"""Merges of adapters in their own space: peft's combination types as peft has them, KnOTS and Core Space by what they
promise."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmergeable
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges.adapters import AdapterMerge, truncated
from unmergeable.optional import quiet

WEIGHTS = (0.7, -0.4)
SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
CHECKED = ("cat", "svd", "linear", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd")


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj", "embed_tokens"], **settings}
    )


def base() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """Folders a and b, of one base; every number of them random."""
    for seed, name in enumerate("ab"):
        with warnings.catch_warnings(), quiet(transformers):
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(base(), lora(target_modules=["q_proj", "down_proj"]))
            generator = torch.Generator().manual_seed(seed)
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data = torch.randn(parameter.shape, generator=generator)
            adapted.save_pretrained(tmp_path / name)
    return tmp_path


def merged(adapters: Path, method: str, **settings: Any) -> dict[str, Tensor]:
    """The products by module of what is written, as peft reads it."""
    experts = [(adapters / name, weight) for name, weight in zip("ab", WEIGHTS, strict=True)]
    unmergeable.merge(experts=experts, method=method, settings=settings, out=adapters / method, keep_adapter=True)
    with warnings.catch_warnings(), quiet(transformers):
        warnings.simplefilter("ignore")
        return products(peft.PeftModel.from_pretrained(base(), adapters / method))


def products(adapted: Any, name: str = "default") -> dict[str, Tensor]:
    found = {}
    for path, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and name in module.r:
            found[path] = module.get_delta_weight(name).detach().double()
    return found


def sum_of_products(adapters: Path) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, weight in zip("ab", WEIGHTS, strict=True):
        for path, product in products(peft.PeftModel.from_pretrained(base(), adapters / name)).items():
            total[path] = total.get(path, torch.zeros(())) + weight * product
    return total


@pytest.mark.parametrize("method", CHECKED)
def test_combination_types_are_pefts(adapters: Path, method: str) -> None:
    """peft computes in float32 and both files hold that; products of at most 24 numbers of magnitude below 10 differ by
    less than 1e-4, and a merge of another kind by more than 1e-2."""
    with warnings.catch_warnings(), quiet(transformers):
        warnings.simplefilter("ignore")
        both = peft.PeftModel.from_pretrained(base(), adapters / "a", adapter_name="a")
        both.load_adapter(adapters / "b", adapter_name="b")
        both.add_weighted_adapter(["a", "b"], list(WEIGHTS), "merged", combination_type=method, density=0.4)
    theirs = products(both, "merged")
    ours = merged(adapters, method, density=0.4)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2
    for path, product in ours.items():
        assert float((product - theirs[path]).abs().max()) < 1e-4
    other = merged(adapters, "ties" if method != "ties" else "linear", density=0.6) if method != "ties" else None
    if other is not None:
        assert any(float((other[path] - theirs[path]).abs().max()) > 1e-2 for path in other), "the control"


@pytest.mark.parametrize("method", ["cat", "core_linear"])
def test_exact_merges_are_the_sum(adapters: Path, method: str) -> None:
    found, wanted = merged(adapters, method), sum_of_products(adapters)
    for path, product in found.items():
        assert float((product - wanted[path]).abs().max()) < 1e-4
        assert float((product - truncated_to(wanted[path], 2)).abs().max()) > 1e-2, "the control: rank 2 is not enough"


def truncated_to(product: Tensor, rank: int) -> Tensor:
    a, b = truncated(product, rank)
    return b @ a


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dropping_nothing_is_the_merge_without_it(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator)) for _ in range(3)]
    plain = name.replace("dare_", "").replace("linear_svd", "svd")
    a, b = AdapterMerge(name, density=1.0).merge(factors, (*WEIGHTS, 1.0), "m")  # type: ignore[arg-type]
    a0, b0 = AdapterMerge(plain, density=1.0).merge(factors, (*WEIGHTS, 1.0), "m")  # type: ignore[arg-type]
    assert torch.allclose(b @ a, b0 @ a0, atol=1e-12)
    first, again, other = (
        torch.matmul(*AdapterMerge(name, density=0.5, seed=seed).merge(factors, [1.0] * 3, "m")[::-1])  # type: ignore[arg-type]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other), "the control"


def test_knots_merges_vectors_that_one_basis_aligns() -> None:
    """Equal adapters merge into themselves, and others into what the definition says, computed with their products."""
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(2, 9, generator=generator), torch.randn(6, 2, generator=generator)) for _ in range(2)]
    a, b = factors[0]
    same = AdapterMerge("knots_ties", density=1.0).merge([factors[0], factors[0]], [1.0, 1.0], "m")
    assert torch.allclose(same[1] @ same[0], (b @ a).double(), atol=1e-5)

    side_by_side = torch.cat([w * (y.double() @ x.double()) for (x, y), w in zip(factors, WEIGHTS, strict=True)], 1)
    u, s, vh = torch.linalg.svd(side_by_side, full_matrices=False)
    parts = torch.stack(list(vh[:4].split(9, 1)))
    trimmed = torch.stack(
        [part * (part.abs() >= part.abs().flatten().topk(int(0.5 * 36)).values[-1]) for part in parts]
    )
    agrees = trimmed.sign() == torch.where(trimmed.sum(0) >= 0, 1, -1)
    expected = (u[:, :4] * s[:4]) @ ((trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1))
    merged_a, merged_b = AdapterMerge("knots_ties", density=0.5).merge(factors, WEIGHTS, "m")
    assert merged_a.shape == (4, 9)
    # The sign of a singular vector is free: it turns the sum, the elected sign and the vector of U alike.
    assert torch.allclose(merged_b @ merged_a, expected, atol=1e-10)
    whole = AdapterMerge("knots_ties", density=1.0).merge(factors, WEIGHTS, "m")
    assert not torch.allclose(whole[1] @ whole[0], expected, atol=1e-3), "the control"


def test_core_ties_is_ties_of_the_cores() -> None:
    """Where each A is the same orthonormal matrix, and each B too, the cores are what lies between them."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(9, 3, generator=generator).double())[0]
    p = torch.linalg.qr(torch.randn(6, 3, generator=generator).double())[0]
    cores = [torch.randn(3, 3, generator=generator).double() for _ in range(2)]
    a, b = AdapterMerge("core_ties", density=1.0).merge([(q.T, p @ core) for core in cores], [1.0, 1.0], "m")
    assert a.shape == (3, 9)
    lossless = AdapterMerge("core_linear").merge([(q.T, p @ core) for core in cores], [1.0, 1.0], "m")
    assert torch.allclose(lossless[1] @ lossless[0], p @ sum(cores) @ q.T, atol=1e-12)
    assert not torch.allclose(b @ a, lossless[1] @ lossless[0]), "the control: TIES drops what disagrees"


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such method": ("tiess", {}, "one of|did you mean"),
    "density": ("ties", {"density": 0}, "density must lie above 0"),
    "rank": ("svd", {"rank": -1}, "rank must be at least 1"),
    "setting": ("svd", {"densty": 1}, "did you mean 'density'"),
}


@pytest.mark.parametrize(("method", "settings", "message"), WRONG.values(), ids=WRONG)
def test_wrong_requests(adapters: Path, method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merged(adapters, method, **settings)
    assert not (adapters / method).exists()


def test_adapters_that_do_not_go_together(adapters: Path) -> None:
    two = [adapters / "a", adapters / "b"]
    with pytest.raises(UsageError, match="at least two"):
        unmergeable.merge(experts=two[:1], method="cat", out=adapters / "out", keep_adapter=True)
    weights = load_file(adapters / "b" / "adapter_model.safetensors")
    saved = dict(weights) | {"base_model.model.lm_head.weight": torch.zeros(31, 16)}
    save_file(saved, adapters / "b" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(
        BadInput, match=r"holds more than products B A of modules \(base_model\.model\.lm_head\.weight\)"
    ):
        unmergeable.merge(experts=two, method="cat", out=adapters / "out", keep_adapter=True)
    wider = {key: torch.cat([x, x], 1) if "lora_A" in key else x for key, x in weights.items()}
    save_file(wider, adapters / "b" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(Mismatch, match="has other shapes"):
        unmergeable.merge(experts=two, method="cat", out=adapters / "out", keep_adapter=True)


def test_ranks_may_differ_where_products_are_merged(adapters: Path) -> None:
    config = json.loads((adapters / "b" / "adapter_config.json").read_text())
    weights = load_file(adapters / "b" / "adapter_model.safetensors")
    wider = {key: torch.cat([x, x], 0 if "lora_A" in key else 1) for key, x in weights.items()}
    save_file(wider, adapters / "b" / "adapter_model.safetensors", {"format": "pt"})
    (adapters / "b" / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(UsageError, match="all ranks must be equal; use svd or cat"):
        merged(adapters, "linear")
    found, wanted = merged(adapters, "svd", rank=4), sum_of_products(adapters)
    for path, product in found.items():
        assert float((product - wanted[path]).abs().max()) < 1e-4
