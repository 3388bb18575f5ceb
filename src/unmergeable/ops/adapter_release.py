r"""An adapter released as an adapter, in another basis of its own rank.

    B' = B R,   A' = R^{-1} A      R: a secret rotation of the rank, one for each module

The product is the same, so the model is, up to rounding; and so is all that a merge adds to the base. Nothing is
stopped: this hides how A and B were trained, and keeps merges from averaging A with A and B with B, which is a rough
merge anyway (peft's ``linear``). With the base fixed no other change is exact: every other symmetry moves its weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from unmergeable.checkpoint.adapter.alone import LoneAdapter, Product, write_adapter
from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.partial import require_creatable, require_outside
from unmergeable.errors import BadInput, NotEquivalent
from unmergeable.gauge.equivalence import UNIT_ROUNDOFF
from unmergeable.gauge.groups import haar
from unmergeable.ops.protect_result import ProtectResult, StepReport
from unmergeable.protections.base import Inputs
from unmergeable.protections.trained import TrainedFacts, TrainedProtection
from unmergeable.protections.trained_adapter import check_adapter, train_adapter
from unmergeable.randomness import Stream, new_entropy

NAME = "rank_basis"
STOPS_NOTHING = (
    "This stops nothing: the product B A, which is all that a merge adds to the base, is what it was. It keeps merges "
    "from averaging A and B by themselves. To protect the expert, merge the adapter into its base: leave out "
    "--keep-adapter."
)


def release_adapter(adapter: Path, *, base: Path, out: Path, seed: int | None, is_dry_run: bool) -> ProtectResult:
    """Write ``adapter`` to ``out`` with A and B in another basis, and compare every product.

    Raises:
        BadInput: no LoRA adapter, nothing in it to turn, or ``out`` exists.
        NotEquivalent: a product is not what it was; nothing is written.
    """
    opened = LoneAdapter.open(adapter)
    require_creatable(out)
    require_outside(out, adapter)
    turned = [product for product in opened.products if opened.file.specs[product.key_a].shape[0] > product.stacked]
    if not turned:
        raise BadInput(f"{adapter}: every module has rank 1, in which there is nothing to turn.")
    stream = Stream.from_entropy(new_entropy()) if seed is None else Stream.from_seed(seed)
    tensors = {key: opened.file.tensor(key) for key in opened.file.specs}
    worst = 0.0
    for product in turned:
        a, b = turned_factors(tensors[product.key_a], tensors[product.key_b], product, stream.child(product.module))
        error, bound = _error(tensors[product.key_a], tensors[product.key_b], a, b, product)
        if not error <= bound:
            raise NotEquivalent(
                f"the product of module {product.module!r} would move by {error:.1e} relative, rounding explains "
                f"{bound:.1e}; nothing was written."
            )
        worst = max(worst, error)
        tensors[product.key_a], tensors[product.key_b] = a, b
    recipe = {"method": NAME, "settings": {}}
    document = {
        **recipe,
        "architecture": "adapter",
        "modules": len(turned),
        "measured_product_error": worst,
        "dry_run": is_dry_run,
        "note": STOPS_NOTHING,
    }
    if not is_dry_run:
        details = {"kind": "protected", "recipe": recipe, "note": STOPS_NOTHING, "measured": {"product_error": worst}}
        write_adapter(opened.listing, out, tensors, None, details=details, inputs={"source": [opened.listing]})
    report = StepReport(
        (NAME,), out, (f"Largest error of a product B A: {worst:.1e} relative", STOPS_NOTHING), document
    )
    return ProtectResult(out=out, base=base, key=None, steps=(report,), is_dry_run=is_dry_run)


def release_trained_adapter(
    protection: TrainedProtection, inputs: Inputs, adapter: Path, *, out: Path, is_dry_run: bool
) -> ProtectResult:
    """Train the A and B of ``adapter`` as the method says, and write them to ``out``; W stays the base's.

    Raises:
        BadInput: no LoRA adapter, more in it than A and B of linear layers, data of no use, or ``out`` exists.
        UnmergeableError: the training diverged.
    """
    opened = LoneAdapter.open(adapter)
    require_creatable(out)
    require_outside(out, adapter)
    facts = TrainedFacts()
    if is_dry_run:
        check_adapter(protection, inputs, opened)
    else:
        trained = train_adapter(protection, inputs, opened)
        facts = trained.facts
        details = {"kind": "protected", "recipe": trained.job.recipe, "note": protection.limits}
        listings = {"source": [opened.listing]}
        write_adapter(opened.listing, out, trained.tensors, None, details=details, inputs=listings)
    document = {
        **protection.recipe(),
        "architecture": "adapter",
        **facts.to_json(),
        "dry_run": is_dry_run,
        "note": protection.limits,
    }
    report = StepReport((protection.name,), out, (protection.limits,), document, facts)
    return ProtectResult(out=out, base=inputs.base_folder, key=None, steps=(report,), is_dry_run=is_dry_run)


def turned_factors(a: Tensor, b: Tensor, product: Product, stream: Stream) -> tuple[Tensor, Tensor]:
    """A and B of a module in another basis: R^T A and B R, in float64, rounded once. Of experts each has its own R."""
    experts = product.stacked
    rank = a.shape[0] // experts
    r = haar(experts, rank, stream)
    new_a = (r.mT @ a.double().reshape(experts, rank, -1)).reshape(a.shape)
    columns = b.double().flatten(1).reshape(b.shape[0], rank, experts)
    new_b = torch.einsum("ore,erq->oqe", columns, r).reshape(b.shape)
    return new_a.to(a.dtype), new_b.to(b.dtype)


def _error(a: Tensor, b: Tensor, new_a: Tensor, new_b: Tensor, product: Product) -> tuple[float, float]:
    """How far the products lie apart, relative to |B| |A|, and how far one rounding of each factor explains.

    With unit roundoff u the factors move by u |A| and u |B|, and so the product by (2 u + u^2) |A| |B| in the Frobenius
    norm; of experts all products are compared at once.
    """
    unit = max(UNIT_ROUNDOFF[dtype_code(tensor.dtype)] for tensor in (a, b))
    experts = product.stacked
    rank = a.shape[0] // experts

    def products(left: Tensor, right: Tensor) -> Tensor:
        stacked = right.double().reshape(experts, rank, -1)
        return torch.einsum("ore,erq->eoq", left.double().flatten(1).reshape(left.shape[0], rank, experts), stacked)

    before, after = products(b, a), products(new_b, new_a)
    scale = float(torch.linalg.vector_norm(b.double()) * torch.linalg.vector_norm(a.double()))
    error = float(torch.linalg.vector_norm(after - before)) / scale if scale else 0.0
    return error, 2 * unit + unit**2
