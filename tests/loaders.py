"""How engines that do not know this package read a folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def loaded_by_pattern(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """All weights of a folder, as vLLM and SGLang take them: of the files that match, those in the index, if there is one."""
    files, index = sorted(folder.glob(pattern)), folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        files = [file for file in files if file.name in named]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
