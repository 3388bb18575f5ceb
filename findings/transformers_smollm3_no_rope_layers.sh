#!/usr/bin/env bash
# transformers 5.24.0: in SmolLM3's config `no_rope_layers` is 1 for layers that HAVE rotary positions, 0 for those without.
#
# Expected from the name: the layers without rotary positions are marked.
# Seen: the default marks three of four layers with 1, and those three are the ones that rotate queries and keys. A tool
# that reads the name literally rotates, protects or merges the wrong layers, and no error says so.
#
# Output seen:
#   no_rope_layers [1, 1, 1, 0]; layers whose attention depends on positions: [0, 1, 2]
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$place/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0
"$place/venv/bin/python" - <<'PROGRAM'
import torch
import transformers
from transformers import SmolLM3Config, SmolLM3Model

assert transformers.__version__ == "5.24.0", transformers.__version__
torch.manual_seed(0)
config = SmolLM3Config(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=0,
)
network = SmolLM3Model(config).eval()
hidden = torch.randn(1, 5, 32)
rotate = []
for number, layer in enumerate(network.layers):
    outputs = []
    for offset in (1, 3):  # stretching the positions changes what rotary attention computes, and nothing else
        places = offset * torch.arange(5)[None]
        with torch.no_grad():
            cosines = network.rotary_emb(hidden, places)
            outputs.append(layer.self_attn(hidden, position_embeddings=cosines, attention_mask=None)[0])
    if not torch.allclose(*outputs, atol=1e-6):
        rotate.append(number)
print(f"no_rope_layers {config.no_rope_layers}; layers whose attention depends on positions: {rotate}")
assert config.no_rope_layers == [1, 1, 1, 0]
assert rotate == [0, 1, 2], "what the entry means has changed: the finding is out of date"
PROGRAM
