#!/usr/bin/env bash
# transformers 5.24.0: a ViT-MSN classifier is saved with half of its tensors named without `vit.`.
#
# Expected: `save_pretrained` writes the names that published ViT-MSN classifiers have, `vit.encoder.layer.0…`, as the same version
# does for ViT, and as 4.57.6 did.
# Seen: embeddings and the last norm keep `vit.`, every tensor of the encoder loses it: `encoder.layer.0…`. 5.24.0 reads the folder
# back; 4.57.6 leaves the whole encoder at random numbers and says so in a warning only, so that a fine-tune becomes noise for whoever
# uses an older version. A tool that takes one prefix off all names finds two networks.
#
# Output seen:
#   saved by 5.24.0: ViT keeps its prefix in 38 of 38 names, ViT-MSN keeps its prefix in 6 of 38 names
#   read by 4.57.6: ViT differs by 0, ViT-MSN differs by 2.64
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
for version in 5.24.0 4.57.6; do
  python3 -m venv "$place/$version"
  "$place/$version/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
  "$place/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version" torch==2.13.0
done
cat > "$place/both.py" <<'PROGRAM'
import sys

import torch
import transformers
from safetensors import safe_open
from transformers import ViTConfig, ViTForImageClassification, ViTMSNConfig, ViTMSNForImageClassification

transformers.logging.set_verbosity_error()
version, place = sys.argv[1:]
assert transformers.__version__ == version, transformers.__version__
sizes = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_labels": 3, "initializer_range": 0.5,
}
pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
kinds = {"ViT": (ViTConfig, ViTForImageClassification), "ViT-MSN": (ViTMSNConfig, ViTMSNForImageClassification)}
kept, differs = {}, {}
for kind, (config_class, network_class) in kinds.items():
    folder = f"{place}/{kind}"
    if version == "5.24.0":
        torch.manual_seed(0)
        network = network_class(config_class(**sizes)).eval()
        network.save_pretrained(folder)
        with torch.no_grad():
            torch.save(network(pixels).logits, f"{folder}.outputs")
        with safe_open(f"{folder}/model.safetensors", "pt") as file:
            names = [name for name in file.keys() if not name.startswith("classifier")]
        kept[kind] = sum(name.startswith("vit.") for name in names), len(names)
    else:
        network = network_class.from_pretrained(folder).eval()
        with torch.no_grad():
            differs[kind] = float((network(pixels).logits - torch.load(f"{folder}.outputs")).abs().max())
if kept:
    print(f"saved by {version}: " + ", ".join(f"{kind} keeps its prefix in {a} of {b} names" for kind, (a, b) in kept.items()))
    assert kept == {"ViT": (38, 38), "ViT-MSN": (6, 38)}, "names have changed: the finding is out of date"
else:
    print(f"read by {version}: " + ", ".join(f"{kind} differs by {gap:.3g}" for kind, gap in differs.items()))
    assert differs["ViT"] < 1e-5
    assert differs["ViT-MSN"] > 0.01, "it is read now: the finding is out of date"
PROGRAM
for version in 5.24.0 4.57.6; do
  "$place/$version/bin/python" "$place/both.py" "$version" "$place" 2>/dev/null
done
