"""``ties`` against a reference that sorts, against peft, and in its corners."""

import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties
from torch import Tensor

from merges.small_models import DTYPES, State, flat, make_models, rounding_bound, size_bound
from unmergeable.errors import UsageError
from unmergeable.merges import TaskArithmetic, Ties, merge_state_dicts
from unmergeable.merges.election import Average
from unmergeable.merges.magnitudes import largest_below, rank_kept
from unmergeable.merges.ties import Trim

COEFFICIENTS = [1.0, 0.5, 1.25]


def task_vectors(base: State, experts: list[State]) -> list[State]:
    """In the compute dtype, as the method defines them, then widened."""
    compute = torch.float64 if base["scale"].dtype == torch.float64 else torch.float32
    return [
        {
            name: (expert[name].to(compute) - tensor.to(compute)).double()
            for name, tensor in base.items()
            if tensor.is_floating_point()
        }
        for expert in experts
    ]


def trim_by_sorting(values: Tensor, density: float) -> Tensor:
    if values.numel() == 0:
        return values
    magnitudes = values.abs().reshape(-1).sort(descending=True).values
    return torch.where(values.abs() >= magnitudes[rank_kept(density, values.numel()) - 1], values, 0.0)


def trimmed(task: State, density: float, trim: Trim) -> Tensor:
    if trim == "global":
        return trim_by_sorting(flat(task), density)
    return flat({name: trim_by_sorting(values, density) for name, values in task.items()})


def naive_ties(
    base: State, experts: list[State], coefficients: list[float], *, density: float, trim: Trim, average: Average
) -> tuple[Tensor, Tensor]:
    """The merged weights, and where the election is decided by more than its rounding error. All in float64."""
    tasks = [
        coefficient * trimmed(task, density, trim)
        for coefficient, task in zip(coefficients, task_vectors(base, experts), strict=True)
    ]
    stacked = torch.stack(tasks)
    mass = stacked.sum(dim=0)
    agree = (stacked.sign() == mass.sign()) & (stacked != 0)
    weights = torch.tensor(coefficients, dtype=torch.float64)[:, None]
    divisor = {
        "count": agree.sum(dim=0).double(),
        "weight": (agree * weights).sum(dim=0),
        "sum": torch.ones_like(mass),
    }[average]
    merged = flat(base) + torch.where(agree, stacked, 0.0).sum(dim=0) / torch.where(divisor == 0, 1.0, divisor)
    decided = mass.abs() > 4 * len(tasks) * torch.finfo(torch.float32).eps * stacked.abs().sum(dim=0)
    return merged, decided | (stacked == 0).all(dim=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trim", ["global", "tensor"])
@pytest.mark.parametrize("average", ["count", "weight", "sum"])
def test_equals_a_reference_that_sorts(dtype: torch.dtype, trim: Trim, average: Average) -> None:
    base, experts = make_models(3, dtype, several_blocks=dtype == torch.float32 and average == "count")
    method = Ties(density=0.3, trim=trim, average=average)
    merged = flat(merge_state_dicts(base, experts, method=method, coefficients=COEFFICIENTS))

    expected, decided = naive_ties(base, experts, COEFFICIENTS, density=0.3, trim=trim, average=average)
    # 3 differences, 3 products, 3 sums, a quotient by a rounded divisor (3), the last sum
    bound = rounding_bound(size_bound(base, experts, COEFFICIENTS), dtype, operations=14)
    assert bool(((merged - expected).abs() <= bound)[decided].all())
    assert float(decided.double().mean()) > 0.995  # among bfloat16's few values a mass of exactly zero is not rare
    # Control: the other trim keeps other weights.
    other, _ = naive_ties(
        base, experts, COEFFICIENTS, density=0.3, trim="tensor" if trim == "global" else "global", average=average
    )
    assert bool(((merged - other).abs() > bound)[decided].any())


def test_the_three_averages_differ() -> None:
    base, experts = make_models(3)
    merged = [
        flat(merge_state_dicts(base, experts, method=Ties(average=average), coefficients=COEFFICIENTS))
        for average in ("count", "weight", "sum")
    ]
    assert not torch.equal(merged[0], merged[1])
    assert not torch.equal(merged[0], merged[2])
    # With equal coefficients of 1 the first two are one.
    alike = [flat(merge_state_dicts(base, experts, method=Ties(average=average))) for average in ("count", "weight")]
    assert torch.equal(*alike)


def kept_fraction(base: State, expert: State, method: Ties) -> tuple[float, dict[str, float]]:
    """How much of one expert's task vector survives the trim: the other expert is the base, whose task is zero."""
    merged = merge_state_dicts(base, [expert, base], method=method)
    moved = {n: (merged[n] != base[n]).double() for n in base if base[n].numel() and base[n].is_floating_point()}
    return float(flat(moved).mean()), {name: float(values.mean()) for name, values in moved.items()}


def test_global_trim_keeps_a_fraction_of_the_whole_and_tensor_trim_of_each() -> None:
    base, (expert,) = make_models(1, several_blocks=True)
    whole, each = kept_fraction(base, expert, Ties(density=0.2))
    # Zero base weights aside, a kept task vector moves its weight: it is far above the base's rounding step.
    assert whole == pytest.approx(0.2, abs=1e-4)
    assert each["embed.weight"] < 0.1 < 0.3 < each["layers.1.weight"]  # task vectors grow from tensor to tensor
    _, each = kept_fraction(base, expert, Ties(density=0.2, trim="tensor"))
    for name in ("embed.weight", "layers.0.weight", "layers.1.weight"):
        assert each[name] == pytest.approx(0.2, abs=1 / base[name].numel())


@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_of_equals_at_the_threshold_all_are_kept(trim: Trim) -> None:
    base = {"weight": torch.zeros(100)}
    expert = {"weight": torch.cat([torch.full((5,), 3.0), torch.full((20,), -2.0), torch.full((75,), 1.0)])}
    merged = merge_state_dicts(base, [expert, base], method=Ties(density=0.1, trim=trim))
    assert torch.equal(merged["weight"][:25], expert["weight"][:25])  # 10 asked for; 5 threes and 20 equal twos
    assert not merged["weight"][25:].any()


def test_a_threshold_of_zero_trims_nothing() -> None:
    base = {"weight": torch.zeros(100)}
    expert = {"weight": torch.cat([torch.full((5,), 1e-45), torch.zeros(95)])}
    merged = merge_state_dicts(base, [expert, base], method=Ties(density=0.2))
    assert torch.equal(merged["weight"], expert["weight"])


def test_mass_of_zero() -> None:
    base = {"weight": torch.zeros(3)}
    experts = [{"weight": torch.tensor([1.0, 2.0, 0.0])}, {"weight": torch.tensor([-1.0, 1.0, 0.0])}]
    drop = merge_state_dicts(base, experts, method=Ties(density=1))
    positive = merge_state_dicts(base, experts, method=Ties(density=1, undecided="positive"))
    assert drop["weight"].tolist() == [0.0, 1.5, 0.0]
    assert positive["weight"].tolist() == [1.0, 1.5, 0.0]


def test_the_sign_is_elected_by_mass_not_by_number() -> None:
    base = {"weight": torch.zeros(2)}
    experts = [{"weight": torch.tensor(values)} for values in ([1.0, 5.0], [1.0, 5.0], [-3.0, -1.0])]
    assert merge_state_dicts(base, experts, method=Ties(density=1))["weight"].tolist() == [-3.0, 5.0]


def test_coefficients_and_scaling() -> None:
    base, experts = make_models(3)
    left_out = merge_state_dicts(base, experts, method=Ties(), coefficients=[1.0, 1.0, 0.0])
    assert torch.equal(flat(left_out), flat(merge_state_dicts(base, experts[:2], method=Ties())))
    by_coefficient = flat(merge_state_dicts(base, experts, method=Ties(), coefficients=[0.5] * 3))
    by_scaling = flat(merge_state_dicts(base, experts, method=Ties(scaling_coefficient=0.5)))
    assert torch.equal(by_coefficient, by_scaling)  # powers of two round nothing
    assert not torch.equal(by_scaling, flat(merge_state_dicts(base, experts, method=Ties())))


def test_density_one_of_agreeing_experts_is_their_mean_task() -> None:
    base, (expert,) = make_models(1)
    merged = merge_state_dicts(base, [expert, expert], method=Ties(density=1))
    assert torch.equal(
        flat(merged), flat(merge_state_dicts(base, [expert], method=TaskArithmetic(), coefficients=[1.0]))
    )


def test_the_order_of_tensors_does_not_matter() -> None:
    base, experts = make_models(3, torch.bfloat16)

    def turned(state: State) -> State:
        return dict(reversed(state.items()))

    merged = merge_state_dicts(base, experts, method=Ties())
    other = merge_state_dicts(turned(base), [turned(expert) for expert in experts], method=Ties())
    assert all(torch.equal(merged[name], other[name]) for name in base)


@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_equals_peft(trim: Trim) -> None:
    """peft trims what it is given, divides by the number that agree, and lets a mass of zero elect +.

    Among equals at the threshold it keeps an exact number, so the values here are all different.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (30, 40), "b": (500,)}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    experts = []
    for _ in range(3):
        signs = torch.randint(0, 2, (1700,), generator=generator) * 2 - 1
        values = signs * (1 + torch.randperm(1700, generator=generator)) / 2048
        parts = values.split(list(sizes.values()))
        experts.append({name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)})

    merged = merge_state_dicts(base, experts, method=Ties(density=0.2, trim=trim, undecided="positive"))
    weights = torch.ones(3)
    if trim == "global":
        expected = peft_ties([flat(expert).float() for expert in experts], weights, density=0.2)
    else:
        expected = torch.cat(
            [peft_ties([e[name] for e in experts], weights, density=0.2).reshape(-1) for name in shapes]
        )
    # Multiples of 1/2048 add up exactly; both divide once.
    assert torch.equal(flat(merged).float(), expected)


def test_largest_below() -> None:
    for dtype in (torch.float32, torch.float64):
        for threshold in (1.0, 1e-3, 1e-45, 3.0e38):
            cut = largest_below(threshold, dtype)
            assert cut is not None
            assert cut < threshold
            above = torch.tensor(cut, dtype=dtype).nextafter(torch.tensor(torch.inf, dtype=dtype))
            assert float(above) >= threshold
    assert largest_below(0.0, torch.float32) is None


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Ties(density=0.0), "density"),
        (Ties(density=1.5), "density"),
        (Ties(density=float("nan")), "density"),
        (Ties(scaling_coefficient=float("nan")), "scaling_coefficient"),
        (Ties(trim="layer"), "trim=layer: must be one of global, tensor"),  # type: ignore[arg-type]
        (Ties(average="mean"), "average"),  # type: ignore[arg-type]
        (Ties(undecided="maybe"), "undecided"),  # type: ignore[arg-type]
    ],
)
def test_refuses_settings(method: Ties, message: str) -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match=message):
        merge_state_dicts(base, experts, method=method)


@pytest.mark.parametrize("coefficients", [[1.0, -1.0], [0.0, 0.0]])
def test_refuses_coefficients_that_cannot_vote(coefficients: list[float]) -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match="must be positive"):
        merge_state_dicts(base, experts, method=Ties(), coefficients=coefficients)
