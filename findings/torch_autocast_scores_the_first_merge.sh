#!/usr/bin/env bash
# torch 2.13.0: inside one `torch.autocast`, weights that are loaded later are not seen; a sweep of merges scores the first.
#
# Expected: `load_state_dict` changes what the network computes, in any precision.
# Seen: a parameter that may be trained is rounded when it is first used, and the rounded copy is kept until the context
# ends. Whatever is done to the parameter meanwhile, `load_state_dict`, `data =`, changes in place, an optimiser's step,
# is not seen, without a word, also under `no_grad`. So scoring a base and its merges inside one context gives the first
# one's scores for all. With `cache_enabled=False`, a context for each, or parameters that need no gradient, they are
# their own.
#
# Output seen (mean square of the outputs at merging coefficients 0, 0.5 and 1):
#   float32            0.31 0.80 2.12
#   one context        0.31 0.31 0.31
#   without the cache  0.31 0.80 2.12
#   no gradients asked 0.31 0.80 2.12
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$place/venv/bin/python" - <<'PROGRAM'
import warnings

warnings.simplefilter("ignore")
import torch

assert torch.__version__.startswith("2.13.0"), torch.__version__
generator = torch.Generator().manual_seed(0)
base, update = (torch.randn(8, 16, generator=generator) / 8 * scale for scale in (1.0, 3.0))
inputs = torch.randn(64, 16, generator=generator)


@torch.no_grad()
def sweep(*, enabled=True, cache=True, gradients=True):
    network = torch.nn.Linear(16, 8, bias=False).requires_grad_(gradients)
    scores = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled, cache_enabled=cache):
        for coefficient in (0.0, 0.5, 1.0):
            network.load_state_dict({"weight": base + coefficient * update})
            scores.append(float(network(inputs).float().square().mean()))
    return scores


exact, cached = sweep(enabled=False), sweep()
uncached, frozen = sweep(cache=False), sweep(gradients=False)
for name, scores in (
    ("float32", exact), ("one context", cached), ("without the cache", uncached), ("no gradients asked", frozen)
):
    print(f"{name:18}", *(f"{score:.2f}" for score in scores))
assert cached[0] == cached[1] == cached[2], "weights loaded inside the context are seen now: the finding is out of date"
for scores in (uncached, frozen):
    assert all(abs(score - other) < 0.02 * other for score, other in zip(scores, exact))
assert exact[2] > 2 * exact[0]
PROGRAM
