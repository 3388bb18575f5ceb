"""A real pretrained language model stored in bfloat16: protecting it leaves its text and its perplexity alone.

A short form of ``benchmarks/real_language_model.py``, from which the functions come.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import unmergeable

pytestmark = pytest.mark.slow

TOKENS, PROMPTS = 4096, 5
UNIT_ROUNDOFF = 2.0**-8
ALLOWED_PERCENT = 0.1
ROOT = Path(__file__).parents[2]


def load_benchmark() -> ModuleType:
    path = ROOT / "benchmarks" / "real_language_model.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    for library in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed, which reading a GGUF file needs")
    module = load_benchmark()
    for file in (module.MODEL, module.EDITORIALS):
        try:
            file.path()
        except FileNotFoundError as error:
            pytest.skip(str(error))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = tmp_path_factory.mktemp("language-model")
    benchmark.convert(scratch / "original")
    return benchmark.Bench.of(scratch / "original", scratch, TOKENS, benchmark.PROMPTS[:PROMPTS])


@pytest.fixture(scope="module")
def protected(benchmark: ModuleType, bench: Any) -> Any:
    """With the default settings."""
    return benchmark.protected_copy(bench.original, bench.scratch / "protected", seed=0)


def perplexity_change(benchmark: ModuleType, bench: Any, copy: Path) -> float:
    """In per cent, in float32 arithmetic: bfloat16 arithmetic alone moves so few tokens by as much as is allowed."""
    found = benchmark.behaviour(copy, torch.float32, bench.windows, ())
    return float(benchmark.perplexity_change_percent(bench.expected["float32"], found))


def test_perplexity_stays(benchmark: ModuleType, bench: Any, protected: Any) -> None:
    assert abs(perplexity_change(benchmark, bench, protected.folder)) <= ALLOWED_PERCENT


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_greedy_text_parts_only_at_near_ties(
    benchmark: ModuleType, bench: Any, protected: Any, arithmetic: str
) -> None:
    original = bench.expected[arithmetic]
    dtype = benchmark.ARITHMETIC[arithmetic]
    found = benchmark.behaviour(protected.folder, dtype, bench.windows[:1], bench.prompts)
    for item in benchmark.divergences(original, found):
        assert item.is_explained(protected.logit_bound)
        # The bound on the norm alone would allow more: what parts are choices that were close to begin with.
        assert item.margin < benchmark.median_margin(original.answers)


def test_a_half_transformed_head_is_refused_and_shows(benchmark: ModuleType, bench: Any, protected: Any) -> None:
    half = bench.scratch / "half"
    benchmark.write_half_transformed(bench.original, protected.folder, half)
    assert not unmergeable.verify(bench.original, half).is_equal
    assert abs(perplexity_change(benchmark, bench, half)) > 10 * ALLOWED_PERCENT


def test_averaging_destroys_it(benchmark: ModuleType, bench: Any, protected: Any) -> None:
    averaged = bench.scratch / "averaged"
    unmergeable.merge(experts=[(bench.original, 0.5), (protected.folder, 0.5)], method="linear", out=averaged)
    found = benchmark.behaviour(averaged, torch.float32, bench.windows[:2], bench.prompts[:2])
    expected = bench.expected["float32"]
    assert found.perplexity > 10 * expected.perplexity
    texts = zip(expected.answers, found.answers, strict=False)
    assert not any(original.tokens == other.tokens for original, other in texts)


def test_restores_up_to_two_roundings(benchmark: ModuleType, bench: Any, protected: Any) -> None:
    restored = bench.scratch / "restored"
    unmergeable.restore(protected.folder, key=protected.key, out=restored)
    assert unmergeable.verify(bench.original, restored).is_equal
    # Rounding on the way there is amplified by the way back, rounding on the way back is not.
    bound = UNIT_ROUNDOFF * (protected.figures["condition"] + 1)
    assert benchmark.weight_distance(bench.original, restored)["relative_weight_distance"] <= bound
    assert benchmark.weight_distance(bench.original, protected.folder)["relative_weight_distance"] > 10 * bound


def test_noise_has_the_mean_square_of_a_rounding(benchmark: ModuleType, tmp_path: Path) -> None:
    """The control of the benchmark is as large as it says: 1/12 squared unit in the last place."""
    from safetensors.torch import load_file, save_file

    name = "layer.q_proj.weight"
    weight = (1 + torch.rand(400, 500, generator=torch.Generator().manual_seed(0)) / 2).bfloat16()
    (tmp_path / "source").mkdir()
    save_file({name: weight, "norm.weight": weight[0].clone()}, tmp_path / "source" / benchmark.WEIGHTS)
    benchmark.write_noise(tmp_path / "source", tmp_path / "noise", 1)
    noisy = load_file(tmp_path / "noise" / benchmark.WEIGHTS)
    units = (noisy[name].double() - weight.double()) / 2.0**-7  # the unit in the last place between 1 and 2
    # 200 000 independent weights, each moved with probability 1/12: a standard error of 0.0006; five of them.
    assert abs(float(units.square().mean()) - 1 / 12) < 0.0035
    assert abs(float(units.mean())) < 0.0035
    assert torch.equal(noisy["norm.weight"], weight[0])
