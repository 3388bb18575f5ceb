"""One axis of one tensor under a gauge: the right coordinates, in the right order, rounded once, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from unmergeable.architecture.symmetry import Group, GroupKind, Leg, Pairing, Space, SymmetryMap, Variance
from unmergeable.gauge import act
from unmergeable.gauge.act import act_, edits, leg_view, transform_all
from unmergeable.gauge.elements import Element, Monomial
from unmergeable.gauge.gauge import Gauge, fixed_gauge, sampled_gauge, undo
from unmergeable.gauge.groups import sample
from unmergeable.randomness import Stream

EPSILON = torch.finfo(torch.float64).eps
CONDITION = 4.0
laws = settings(max_examples=60, deadline=None, derandomize=True)

HEADS, SIZE, HIDDEN = 3, 4, 10
WIDTH = HEADS * SIZE

# A fused projection [queries; keys; values] of three heads, its bias, an output projection, and a table beside them.
INSIDE = Space("inside", "query_key", Group("general_linear"), HEADS, SIZE)
VALUES = Space("values", "value_output", Group("general_linear"), HEADS, SIZE)
ORDER = Space("order", "heads", Group("permutation"), 1, HEADS)


def head_legs(axis: int = 0) -> tuple[Leg, ...]:
    """Legs of the fused projection on ``axis``: queries, keys and values inside the heads, then the heads' order."""
    inner = (
        Leg("inside", axis, "vector", 0, SIZE),
        Leg("inside", axis, "covector", WIDTH, SIZE),
        Leg("values", axis, "vector", 2 * WIDTH, SIZE),
    )
    outer = tuple(Leg("order", axis, "vector", part * WIDTH, 0, SIZE, ((SIZE, 1),)) for part in range(3))
    return inner + outer


MAP = SymmetryMap(
    {"inside": INSIDE, "values": VALUES, "order": ORDER},
    {
        "fused.weight": head_legs(),
        "fused.bias": head_legs(),
        "transposed.weight": head_legs(axis=1),
        "output.weight": (Leg("values", 1, "covector", 0, SIZE), Leg("order", 1, "vector", 0, 0, SIZE, ((SIZE, 1),))),
        "table": (Leg("order", 1, "vector", 0, 0),),
    },
)
SHAPES = {
    "fused.weight": (3 * WIDTH, HIDDEN),
    "fused.bias": (3 * WIDTH,),
    "transposed.weight": (HIDDEN, 3 * WIDTH),
    "output.weight": (HIDDEN, WIDTH),
    "table": (7, HEADS),
    "elsewhere": (5,),
}


def drawn(seed: int = 0, spaces: tuple[str, ...] = ("inside", "values", "order")) -> Gauge:
    return sampled_gauge({name: MAP.spaces[name] for name in spaces}, Stream.from_seed(seed), CONDITION)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(Stream.from_seed(seed).normal(*shape)).to(dtype)


def state(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: numbers(*shape, seed=place, dtype=dtype) for place, (name, shape) in enumerate(SHAPES.items())}


def on_axis(legs: tuple[Leg, ...], gauge: Gauge, length: int) -> Tensor:
    """The whole axis as one matrix, written out coordinate by coordinate: what ``act_`` must amount to."""
    total = torch.eye(length, dtype=torch.float64)
    for leg in legs:
        if leg.space not in gauge:
            continue
        space, matrix = MAP.spaces[leg.space], gauge[leg.space].matrix()
        matrix = torch.linalg.inv(matrix).mT if leg.variance == "covector" else matrix
        step = torch.eye(length, dtype=torch.float64)
        for block in range(space.blocks):
            for place in itertools.product(*(range(count) for count, _ in leg.spectators)):
                shift = sum(index * stride for index, (_, stride) in zip(place, leg.spectators, strict=True))
                start = leg.offset + block * leg.block_stride + shift
                where = torch.tensor([start + i * leg.element_stride for i in range(space.size)])
                step[where[:, None], where[None, :]] = matrix[block]
        total = step @ total
    return total


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of a few products with matrices of this condition number."""
    return bool((found - expected).abs().max() <= 64 * EPSILON * WIDTH * CONDITION**2 * expected.abs().max())


# ---------------------------------------------------------------------------------------------------- coordinates


@laws
@given(
    before=st.lists(st.integers(1, 3), max_size=2),
    after=st.lists(st.integers(1, 3), max_size=2),
    size=st.integers(1, 4),
    blocks=st.integers(1, 3),
    spectators=st.lists(st.integers(1, 3), max_size=2),
    offset=st.integers(0, 3),
    order=st.permutations(range(4)),
    shift=st.integers(0, 2),
)
def test_a_view_shows_the_coordinates_that_its_leg_lists(
    before: list[int],
    after: list[int],
    size: int,
    blocks: int,
    spectators: list[int],
    offset: int,
    order: list[int],
    shift: int,
) -> None:
    counts = [size, blocks, *spectators]
    nesting = [place for place in order if place < len(counts)]  # which of them runs fastest
    strides, stride = {}, 1
    for place in nesting:
        strides[place] = stride
        stride *= counts[place]
    length = offset + stride + 2
    space = Space("s", "query_key", Group("general_linear"), blocks, size)
    leg = Leg(
        "s",
        len(before),
        "vector",
        offset,
        strides[1],
        strides[0],
        tuple((count, strides[2 + place]) for place, count in enumerate(spectators)),
    )
    assert leg.extent(space) == offset + stride
    whole = torch.arange(shift + length * torch.Size(before).numel() * torch.Size(after).numel())
    tensor = whole[shift:].view(*before, length, *after)  # a storage that begins elsewhere

    view = leg_view(tensor, leg, space)

    flat = tensor.reshape(-1, length, torch.Size(after).numel())
    assert view.shape == (flat.shape[0], blocks, *spectators, size, flat.shape[2])
    for block, index in itertools.product(range(blocks), range(size)):
        for place in itertools.product(*(range(count) for count in spectators)):
            row = offset + block * strides[1] + index * strides[0]
            row += sum(at * strides[2 + which] for which, at in enumerate(place))
            assert torch.equal(view[(slice(None), block, *place, index)], flat[:, row])


# ------------------------------------------------------------------------------------------ what act_ amounts to


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "elsewhere"])
def test_acting_is_one_matrix_on_the_axis(name: str, *, is_inverse: bool) -> None:
    tensor, legs, gauge = state()[name], MAP.legs[name], drawn()
    axis = legs[0].axis
    forwards = on_axis(legs, gauge, tensor.shape[axis])
    matrix = torch.linalg.inv(forwards) if is_inverse else forwards
    expected = torch.tensordot(matrix, tensor, dims=([1], [axis])).movedim(0, axis)

    found = act_(tensor.clone(), name, MAP, [gauge.inverse() if is_inverse else gauge])

    assert close(found, expected)
    assert not close(tensor, expected)


def test_the_inside_of_heads_comes_before_their_order() -> None:
    """The control: the other order is another matrix, so that the test above tells them apart."""
    legs, gauge = MAP.legs["fused.weight"], drawn()
    right, wrong = on_axis(legs, gauge, 3 * WIDTH), on_axis(tuple(reversed(legs)), gauge, 3 * WIDTH)
    assert not torch.allclose(right, wrong, atol=1e-2)


def test_gauges_act_one_after_another() -> None:
    first, second = drawn(1), drawn(2).inverse()
    tensor = state()["fused.weight"]
    together = act_(tensor.clone(), "fused.weight", MAP, [first, second])
    apart = act_(act_(tensor.clone(), "fused.weight", MAP, [first]), "fused.weight", MAP, [second])
    assert torch.equal(together, apart)
    swapped = act_(tensor.clone(), "fused.weight", MAP, [second, first])
    assert not torch.allclose(together, swapped, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_undoing_restores_up_to_rounding(dtype: torch.dtype) -> None:
    tensors, gauges = state(dtype), [drawn(1), drawn(2), drawn(3).inverse()]
    moved = transform_all(tensors, MAP, gauges)
    restored = transform_all(moved, MAP, undo(gauges))
    for name, tensor in tensors.items():
        # One rounding there, carried back by the inverse, and one rounding here.
        bound = torch.finfo(dtype).eps * (1 + CONDITION ** len(gauges)) + 64 * EPSILON * CONDITION**3
        assert (restored[name] - tensor).double().norm() <= bound * tensor.double().norm(), name
        assert torch.equal(moved[name], tensor) == (name == "elsewhere")


def test_undoing_in_the_same_order_does_not() -> None:
    gauges = [drawn(1), drawn(2)]
    tensors = state()
    wrong = transform_all(transform_all(tensors, MAP, gauges), MAP, [gauge.inverse() for gauge in gauges])
    assert not torch.allclose(wrong["fused.weight"], tensors["fused.weight"], atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_everything_is_rounded_once(dtype: torch.dtype) -> None:
    gauges = [drawn(1), drawn(2)]
    stored = state(dtype)["fused.weight"]
    exact = act_(stored.double(), "fused.weight", MAP, gauges)
    assert torch.equal(act_(stored.clone(), "fused.weight", MAP, gauges), exact.to(dtype))
    # The control: storing in between rounds twice, which shows.
    between = act_(stored.clone(), "fused.weight", MAP, gauges[:1])
    assert not torch.equal(act_(between, "fused.weight", MAP, gauges[1:]), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_coordinates_without_a_leg_keep_their_bits(dtype: torch.dtype) -> None:
    tensor = state(dtype)["fused.weight"]
    special = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 4, float("inf")])
    tensor[2 * WIDTH : 2 * WIDTH + 5, 0] = special.to(dtype)
    moved = act_(tensor.clone(), "fused.weight", MAP, [drawn(spaces=("inside",))])
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    assert torch.equal(moved[2 * WIDTH :].view(as_bits), tensor[2 * WIDTH :].view(as_bits))
    assert not (moved[: 2 * WIDTH] == tensor[: 2 * WIDTH]).all(1).any()


def test_a_stored_offset_is_part_of_the_gain() -> None:
    """Gemma stores w where the network uses 1 + w: halving the gain of 3 (w = 2) gives 1.5 (w = 0.5)."""
    space = Space("t", "query_key", Group("diagonal"), 1, 2)
    element = Monomial(torch.tensor([[0, 1]]), torch.tensor([[0.5, 4.0]], dtype=torch.float64))
    for offset, expected in ((1.0, [0.5, 3.0]), (0.0, [1.0, 0.0])):
        symmetry = SymmetryMap({"t": space}, {"gain": (Leg("t", 0, "vector", 0, 0),)}, {"gain": offset})
        gauge = fixed_gauge({"t": space}, {"t": element})
        found = act_(torch.tensor([2.0, 0.0]), "gain", symmetry, [gauge])
        assert found.tolist() == expected
        assert act_(found, "gain", symmetry, undo([gauge])).tolist() == [2.0, 0.0]


def test_signed_permutations_carry_gains_without_signs() -> None:
    space = Space("t", "query_key", Group("quarter_turn", "half"), 1, 2)
    turn = Monomial(torch.tensor([[1, 0]]), torch.tensor([[-1.0, 1.0]], dtype=torch.float64))
    symmetry = SymmetryMap({"t": space}, {"gain": (Leg("t", 0, "gain", 0, 0),), "rows": (Leg("t", 0, "vector", 0, 0),)})
    gauge = fixed_gauge({"t": space}, {"t": turn})
    assert act_(torch.tensor([2.0, 3.0]), "gain", symmetry, [gauge]).tolist() == [3.0, 2.0]
    assert act_(torch.tensor([2.0, 3.0]), "rows", symmetry, [gauge]).tolist() == [-3.0, 2.0]


# ----------------------------------------------------------------------------------------------------- every shape


def test_acting_is_in_place() -> None:
    tensor = state()["fused.weight"]
    assert act_(tensor, "fused.weight", MAP, [drawn()]) is tensor
    assert not torch.equal(tensor, state()["fused.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_memory_layout_does_not_matter(dtype: torch.dtype) -> None:
    expected = act_(state(dtype)["fused.weight"], "fused.weight", MAP, [drawn()])
    larger = torch.full((3 * WIDTH + 2, 2 * HIDDEN), 7.0, dtype=dtype)
    layouts = {
        "transposed": torch.empty(HIDDEN, 3 * WIDTH, dtype=dtype).T,
        "every other column of a larger tensor": larger[1:-1, ::2],
        "an offset into its storage": torch.empty(1 + 3 * WIDTH * HIDDEN, dtype=dtype)[1:].view(-1, HIDDEN),
    }
    for name, tensor in layouts.items():
        tensor.copy_(state(dtype)["fused.weight"])
        assert torch.equal(act_(tensor, "fused.weight", MAP, [drawn()]), expected), name
    assert (larger[0] == 7).all()
    assert (larger[-1] == 7).all()
    assert (larger[:, 1::2] == 7).all()


@pytest.mark.parametrize("shape", [(3 * WIDTH, 0), (3 * WIDTH, 0, 5), (3 * WIDTH, 5, 0)])
def test_nothing_to_transform_is_no_error(shape: tuple[int, ...]) -> None:
    assert act_(torch.empty(shape), "fused.weight", MAP, [drawn()]).shape == shape


def test_further_axes_come_along() -> None:
    """A convolution's kernel, or weights stacked for many experts."""
    kernel = numbers(3 * WIDTH, HIDDEN, 2, 3)
    found = act_(kernel.clone(), "fused.weight", MAP, [drawn()])
    for i, j in itertools.product(range(2), range(3)):
        alone = act_(kernel[..., i, j].clone(), "fused.weight", MAP, [drawn()])
        assert close(found[..., i, j], alone)


@pytest.mark.parametrize("chunk", [1, 4, act.CHUNK_ELEMENTS])
def test_legs_on_two_axes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(act, "CHUNK_ELEMENTS", chunk)
    rows, columns = Leg("order", 0, "vector", 0, 0), Leg("order", 1, "vector", 0, 0)
    both = SymmetryMap(MAP.spaces, {"square": (rows, columns)})
    order = drawn()["order"].matrix()[0]
    square = numbers(HEADS, HEADS)
    assert torch.equal(act_(square.clone(), "square", both, [drawn()]), order @ square @ order.T)


def test_only_tensors_with_a_leg_get_an_edit() -> None:
    assert set(edits(MAP, [drawn()])) == set(MAP.legs)
    assert set(edits(MAP, [drawn(spaces=("values",))])) == {
        "fused.weight", "fused.bias", "transposed.weight", "output.weight",
    }  # fmt: skip
    assert set(edits(MAP, [drawn(spaces=("values",)), drawn(spaces=("order",))])) == set(MAP.legs)
    assert edits(MAP, []) == {}
    tensors = state()
    moved = transform_all(tensors, MAP, [drawn()])
    assert moved["elsewhere"] is tensors["elsewhere"]
    assert list(moved) == list(tensors)
    assert all(torch.equal(tensor, state()[name]) for name, tensor in tensors.items())  # the originals are untouched
    edit = edits(MAP, [drawn()])["fused.bias"]
    assert torch.equal(edit(tensors["fused.bias"].clone()), moved["fused.bias"])


def test_threads_do_not_disturb_each_other() -> None:
    names = [name for name in SHAPES if name != "elsewhere"] * 20
    edit = edits(MAP, [drawn(1), drawn(2)])
    expected = transform_all(state(), MAP, [drawn(1), drawn(2)])
    with ThreadPoolExecutor(8) as pool:
        for name, found in zip(names, pool.map(lambda name: edit[name](state()[name]), names), strict=True):
            assert torch.equal(found, expected[name])


# ----------------------------------------------------------------------------------------------- pieces and memory


def one_leg(
    kind: GroupKind, axis: int, variance: Variance, *, heads: int, size: int, members: int = 1
) -> tuple[SymmetryMap, Gauge]:
    pairing: Pairing | None = "half" if kind == "rotary" else None
    space = Space("s", "query_key", Group(kind, pairing), heads, size)
    spectators = ((members, size),) if members > 1 else ()
    symmetry = SymmetryMap({"s": space}, {"w": (Leg("s", axis, variance, 0, members * size, 1, spectators),)})
    element: Element = sample(space, Stream.from_seed(0), CONDITION)
    return symmetry, fixed_gauge(symmetry.spaces, {"s": element})


@pytest.mark.parametrize("kind", ["general_linear", "rotary", "permutation"])
@pytest.mark.parametrize("variance", ["vector", "covector"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_size_of_pieces_does_not_show_in_the_result(
    kind: GroupKind, variance: Variance, axis: int, members: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    symmetry, gauge = one_leg(kind, axis, variance, heads=4, size=16, members=members)
    length = 4 * 16 * members
    tensor = numbers(length, 37, dtype=dtype) if axis == 0 else numbers(37, length, dtype=dtype)
    expected = act_(tensor.clone(), "w", symmetry, [gauge])
    for chunk in (1, 100, length, 5 * length + 1, 36 * length, 37 * length):
        monkeypatch.setattr(act, "CHUNK_ELEMENTS", chunk)
        found = act_(tensor.clone(), "w", symmetry, [gauge])
        if dtype == torch.float32 or kind != "general_linear":
            assert torch.equal(found, expected), chunk
            continue
        # Sums of 16 products in float32 may be ordered differently: 2^-20 relative, which moves a bfloat16 by one step
        # where it lies that close to the middle of two, about one number in 2^11.
        differs = found != expected
        assert int(differs.sum()) <= 8 + tensor.numel() // 2**9, chunk
        assert (found - expected).float().abs().max() <= torch.finfo(dtype).eps * expected.float().abs().max()


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 2, 9), (6, 9, 2)])
@pytest.mark.parametrize("chunk", [1, 4, 7, 30, 10**9])
def test_pieces_cover_the_tensor_once(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(act, "CHUNK_ELEMENTS", chunk)
    tensor = torch.zeros(shape)
    pieces = list(act._pieces(tensor, {0}))
    for piece in pieces:
        assert piece.shape[0] == shape[0]
        piece += 1
    assert (tensor == 1).all()
    longest = max(shape[1:], default=1)
    thinnest = tensor.numel() // longest  # one step along the longest free axis: pieces are never thinner
    assert max(piece.numel() for piece in pieces) <= max(chunk, thinnest)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory torch held at one time during ``work``, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    # The summaries leave out what operators allocate inside themselves; the raw events do not.
    results = profiler.profiler.kineto_results.events()
    events = sorted((event.start_ns(), event.nbytes()) for event in results if event.name() == "[memory]")
    held = itertools.accumulate(nbytes for _, nbytes in events)
    return max(held)


@pytest.fixture(scope="module")
def large() -> Tensor:
    """64 MiB of bfloat16: 128 MiB as float32."""
    return torch.ones(2048, 16384, dtype=torch.bfloat16)


MEMORY_CASES = [
    ("general_linear", "vector", 1),
    ("general_linear", "covector", 4),
    ("rotary", "covector", 1),
    ("permutation", "vector", 4),
]


@pytest.mark.parametrize(("kind", "variance", "members"), MEMORY_CASES)
@pytest.mark.parametrize("axis", [0, 1])
def test_memory_is_three_chunks_however_large_the_tensor(
    kind: GroupKind, variance: Variance, members: int, axis: int, large: Tensor
) -> None:
    tensor = large if axis == 0 else large.view(16384, 2048)
    symmetry, gauge = one_leg(kind, axis, variance, heads=32 // members, size=64, members=members)
    # The element and its inverse are there before the tensor comes.
    gauge["s"].apply(torch.ones(1, 32 // members, *([members] if members > 1 else []), 64, 1).double(), variance)
    assert peak_bytes(lambda: act_(tensor, "w", symmetry, [gauge])) <= 3 * BYTES_PER_CHUNK + SLACK


BYTES_PER_CHUNK = act.compute_dtype(torch.bfloat16).itemsize * act.CHUNK_ELEMENTS
SLACK = 1 << 20  # elements, index tensors


def test_memory_would_show_a_whole_copy(large: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: in one piece the same work takes the tensor in float32 twice over."""
    monkeypatch.setattr(act, "CHUNK_ELEMENTS", 1 << 40)
    quarter = large[:512]
    symmetry, gauge = one_leg("rotary", 0, "vector", heads=8, size=64)
    assert peak_bytes(lambda: act_(quarter, "w", symmetry, [gauge])) >= 2 * 4 * quarter.numel()
    assert 2 * 4 * quarter.numel() > 3 * BYTES_PER_CHUNK + SLACK


def test_bytes_of_tiny_tensors_are_not_seen_as_many() -> None:
    """The second control: the meter counts what is held at a time, not what is allocated in all."""
    held = peak_bytes(lambda: [torch.ones(1 << 17, dtype=torch.float64).sum() for _ in range(20)])
    assert 1 << 20 <= held <= (1 << 20) + (1 << 16)


def test_an_unused_space_changes_nothing() -> None:
    empty = fixed_gauge(MAP.spaces, {})
    tensor = state()["fused.weight"]
    assert torch.equal(act_(tensor.clone(), "fused.weight", MAP, [empty]), tensor)
