"""Merge: adapters of one base into one adapter, module by module and without the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.adapter.alone import LoneAdapter, Product, write_adapter
from unmergeable.checkpoint.partial import require_creatable
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges.adapters import AdapterMerge
from unmergeable.settings import configure, settings_of


def merge_adapters(
    adapters: Sequence[tuple[Path, float | None]], method: str, settings: Mapping[str, object], out: Path
) -> tuple[AdapterMerge, int]:
    """Merge LoRA adapters into a new one.

    Args:
        adapters: folders with coefficients; None is 1.
        method: one of :data:`unmergeable.merges.adapters.Combination`.
        settings: ``density``, ``rank``, ``majority_sign``, ``seed``.
        out: folder to create.

    Returns:
        The method with its settings, and the number of modules.

    Raises:
        UsageError: no such method or setting, or fewer than two adapters.
        BadInput: an adapter with more than products of modules, adapters of other shapes, or ``out`` exists.
    """
    merge = configure(AdapterMerge, {"name": method, **settings})
    if len(adapters) < 2:
        raise UsageError("a merge of adapters takes at least two; give more with --expert (experts).")
    require_creatable(out)
    opened = [LoneAdapter.open(folder) for folder, _ in adapters]
    for adapter in opened:
        _require_products_only(adapter)
    weights = [1.0 if coefficient is None else coefficient for _, coefficient in adapters]
    tensors, ranks = {}, {}
    for key_a, parts in _by_key(opened).items():
        a, b = [], []
        for adapter, product in parts:
            a.append(adapter.file.tensor(product.key_a))
            b.append(adapter.file.tensor(product.key_b))
        module = parts[0][1].module
        if len({(x.shape[1:], y.shape[:1]) for x, y in zip(a, b, strict=True)}) > 1:
            raise Mismatch(f"module {module!r} has other shapes in {opened[0].folder} and in another adapter; "
                           "merge adapters of one base.")  # fmt: skip
        flat = [(x.flatten(1), y.flatten(1)) for x, y in zip(a, b, strict=True)]
        factors = [weights[opened.index(adapter)] * product.scale for adapter, product in parts]
        merged_a, merged_b = merge.merge(flat, factors, module)
        rank = len(merged_a)
        ranks[module] = rank
        tensors[key_a] = merged_a.view(rank, *a[0].shape[1:]).to(a[0].dtype).contiguous()
        tensors[parts[0][1].key_b] = merged_b.view(len(b[0]), rank, *b[0].shape[2:]).to(b[0].dtype).contiguous()
    details = {"kind": "merged", "recipe": {"method": method, "settings": settings_of_merge(merge)}}
    inputs = {f"expert {number}": [adapter.listing] for number, adapter in enumerate(opened, start=1)}
    write_adapter(opened[0].listing, out, tensors, _config(opened, ranks), details=details, inputs=inputs)
    return merge, len(ranks)


def settings_of_merge(merge: AdapterMerge) -> dict[str, Any]:
    """Without its name."""
    return {name: value for name, value in settings_of(merge).items() if name != "name"}


def _by_key(opened: Sequence[LoneAdapter]) -> dict[str, list[tuple[LoneAdapter, Product]]]:
    """The products of one module, by the key of its A; a module need not be in every adapter."""
    found: dict[str, list[tuple[LoneAdapter, Product]]] = {}
    for adapter in opened:
        for product in adapter.products:
            found.setdefault(product.key_a, []).append((adapter, product))
    return found


def _require_products_only(adapter: LoneAdapter) -> None:
    extra = [product.module for product in adapter.products if product.stacked > 1] or list(adapter.others)
    if extra:
        raise BadInput(
            f"{adapter.folder} holds more than products B A of modules ({extra[0]}), which adapters cannot be merged "
            "with in their own space; leave out --keep-adapter (keep_adapter), and they are merged with their base."
        )


def _config(opened: Sequence[LoneAdapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The settings of the merged adapter: the first one's, with the scale in B, and the ranks that there are now."""
    largest = max(ranks.values())
    other = {module: rank for module, rank in ranks.items() if rank != largest}
    targets = [adapter.config.get("target_modules") for adapter in opened]
    named = sorted({name for target in targets if isinstance(target, list) for name in target})
    return {
        **opened[0].config,
        "r": largest,
        "lora_alpha": largest,
        "use_rslora": False,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "init_lora_weights": True,
        "target_modules": named if all(isinstance(target, list) for target in targets) else sorted(ranks),
    }
