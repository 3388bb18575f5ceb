from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polynomials.written import Original, original
from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import load_network
from unmergeable.network.polynomial_network import approximation, load_polynomial_network
from unmergeable.polynomials.rewriting import Polynomials


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return original("llama", tmp_path_factory.mktemp("llama") / "original")


def test_loads_by_its_own_classes_and_runs_no_code_of_the_folder(llama: Original, tmp_path: Path) -> None:
    out = llama.write(tmp_path / "out", Polynomials("taylor", 6, 0.7))
    (out / "modeling_polynomial.py").write_text("raise SystemExit('this file must not be run')")
    network = load_polynomial_network(out)

    assert type(network).__name__ == "PolynomialLlamaForCausalLM"
    assert not network.training
    with pytest.raises(BadInput, match="'LlamaForCausalLM', which is none of polynomials"):
        load_polynomial_network(llama.folder)


def test_measures_the_error_without_padding(llama: Original, tmp_path: Path) -> None:
    network = load_polynomial_network(llama.write(tmp_path / "out", Polynomials("taylor", 6, 0.7)))
    plain = load_network(llama.folder)
    ids = llama.inputs["input_ids"]
    padded = torch.cat([ids, torch.full((2, 30), 5)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 30, dtype=torch.int64)], dim=1)
    alone = approximation(plain, network, EncodedBatch({"input_ids": ids}))
    with_padding = approximation(plain, network, EncodedBatch({"input_ids": padded, "attention_mask": mask}))

    assert 0 < alone.output_error < 0.05
    # Rounding, of other sums in another order.
    assert with_padding.output_error == pytest.approx(alone.output_error, rel=1e-2)
    assert set(alone.to_json()) == {"output_error", "outside_largest", "outside_mean"}
    # Control: a network is at no distance from itself.
    assert approximation(network, network, EncodedBatch({"input_ids": ids})).output_error == 0
