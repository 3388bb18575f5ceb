#!/usr/bin/env bash
# transformers 5.24.0: a model read from a GGUF file cannot be saved, although its weights were unpacked on reading.
#
# Expected: `from_pretrained(folder, gguf_file=name)` and `save_pretrained` make a safetensors checkpoint, as in
# transformers 4, which is how people turn GGUF files back into checkpoints. Its documentation says that a model of any
# architecture but one is unpacked when it is read.
# Seen: ValueError, "The model is quantized with gguf and is not serializable", even for a file that holds float32 alone.
# With `quantization_config=GgufConfig(dequantize=True)`, which changes no weight here, the same model is saved.
#
# Output seen:
#   as read, every parameter is torch.float32: The model is quantized with gguf and is not serializable
#   asked to be unpacked: saved, largest difference of a weight 0.0
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cd "$place"
"$place/venv/bin/python" - <<'PROGRAM'
import gguf
import numpy
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GgufConfig

assert transformers.__version__ == "5.24.0", transformers.__version__
generator, width, inner, rows = numpy.random.default_rng(0), 32, 64, 16
writer = gguf.GGUFWriter("m-F32.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(width)
writer.add_block_count(1)
writer.add_feed_forward_length(inner)
writer.add_head_count(4)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(width // 4)
writer.add_vocab_size(rows)
shapes = {"token_embd": (rows, width), "output": (rows, width), "output_norm": (width,)}
layer = {"attn_q": (width, width), "attn_k": (width // 2, width), "attn_v": (width // 2, width), "attn_norm": (width,)}
layer |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
shapes |= {f"blk.0.{name}": shape for name, shape in {**layer, "ffn_norm": (width,)}.items()}
arrays = {name: generator.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}
for name, array in arrays.items():
    writer.add_tensor(f"{name}.weight", array)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

model = AutoModelForCausalLM.from_pretrained(".", gguf_file="m-F32.gguf")
dtypes = {parameter.dtype for parameter in model.parameters()}
try:
    model.save_pretrained("converted")
except ValueError as error:
    refused = str(error).split(" - ")[0]
else:
    raise SystemExit("transformers saves what it reads from GGUF files: the finding is out of date")
print(f"as read, every parameter is {', '.join(map(str, dtypes))}: {refused}")
unpacked = AutoModelForCausalLM.from_pretrained(
    ".", gguf_file="m-F32.gguf", quantization_config=GgufConfig(dequantize=True)
)
unpacked.save_pretrained("converted")
found = load_file("converted/model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy()
print(f"asked to be unpacked: saved, largest difference of a weight {numpy.abs(found - arrays['blk.0.ffn_up']).max()}")
PROGRAM
