"""Checkpoints of quantised models in the layouts of their formats, as published ones have them.

What their tensors hold need not make sense to a kernel: it is their names, dtypes, shapes and settings that are cut.
Where a format can be computed with on a CPU it holds the rounded weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def rewritten(folder: Path, layout: Callable[[str, Tensor], Tensors], settings: dict[str, Any], skip: set[str]) -> Path:
    """The checkpoint in `folder`, each matrix of a layer in another layout, but for those of the modules `skip`."""
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        quantised = ".layers." in name and tensor.dim() == 2 and module not in skip and name.endswith(".weight")
        tensors |= layout(module, tensor) if quantised else {name: tensor.clone()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def _integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(0, 100, shape, dtype=dtype)


def gptq(module: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{module}.qweight": _integers(columns // 8, rows),
        f"{module}.qzeros": _integers(1, rows // 8),
        f"{module}.scales": torch.rand(1, rows, dtype=torch.float16),
        f"{module}.g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def awq(module: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        f"{module}.qweight": _integers(columns, rows // 8),
        f"{module}.qzeros": _integers(1, rows // 8),
        f"{module}.scales": torch.rand(1, rows, dtype=torch.float16),
    }


def fp8(module: str, weight: Tensor) -> Tensors:
    scale = weight.abs().max().float() / 448
    return {
        f"{module}.weight": (weight.float() / scale).to(torch.float8_e4m3fn),
        f"{module}.weight_scale_inv": scale.reshape(1, 1),
    }


def packed(module: str, weight: Tensor) -> Tensors:
    """compressed-tensors, format pack-quantized, 8 bits: four of a row in one integer, each plus 128."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    rounded = (weight.float() / scale).round().to(torch.int16) + 128
    return {
        f"{module}.weight_packed": rounded.to(torch.uint8).view(torch.int32),
        f"{module}.weight_scale": scale.to(weight.dtype),
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }


LAYOUTS: dict[str, tuple[Callable[[str, Tensor], Tensors], dict[str, Any]]] = {
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False, "sym": True}
        | {"dynamic": {r"-:.*\.3\.mlp\.down_proj": {}, r"+:model\.layers\.[12]\..*": {"bits": 4}}},
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "gemm"}
        | {"modules_to_not_convert": ["lm_head", "model.layers.3.mlp.down_proj"]},
    ),
    "fp8": (
        fp8,
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        | {"modules_to_not_convert": ["lm_head", "model.layers.3.mlp.down_proj"]},
    ),
    "compressed-tensors": (
        packed,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
        | {"ignore": ["lm_head", r"re:.*layers\.3\.mlp\.down_proj"]}
        | {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
                }
            }
        },
    ),
}
# The module that no layout quantises, by name in the dense checkpoint.
LEFT = "model.layers.3.mlp.down_proj"
