#!/usr/bin/env bash
# transformers 5.24.0 (with torch 2.13.0): a Llama whose every weight is float64 computes its RMS norms in float32.
#
# Expected: a network loaded or cast to float64 computes in float64, so that its output is exact to about 1e-15.
# Seen: the norm rounds its input to float32 on the way. Its output is off by about 7e-8 relative, eight digits more
# than float64 allows, although it is a float64 tensor. Whoever compares two networks in float64 (for equality after
# a rewrite of weights, say) finds differences of float32 and may blame the weights.
#
# Output seen:
#   dtype torch.float64, relative error 6.8e-08
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$place/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0
"$place/venv/bin/python" - <<'PROGRAM'
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

assert transformers.__version__ == "5.24.0", transformers.__version__
norm = LlamaRMSNorm(64, eps=0.0).double()
x = torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
found = norm(x)
exact = x / x.square().mean(-1, keepdim=True).sqrt()
error = float((found - exact).norm() / exact.norm())
print(f"dtype {found.dtype}, relative error {error:.1e}")
assert found.dtype == torch.float64
assert 1e-9 < error < 1e-6, "the norm is now computed in float64: the finding is out of date"
PROGRAM
