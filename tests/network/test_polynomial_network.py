from __future__ import annotations

from pathlib import Path

import pytest

from polynomials.written import Original, original
from unmergeable.errors import BadInput
from unmergeable.network.polynomial_network import load_polynomial_network
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
