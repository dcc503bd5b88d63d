"""The files of a saved thinking model, in a folder or a repository of the Hub.

- `model.safetensors`, `config.json`: the base, with its own `model_type` and `architectures`, and a `quietstar` entry;
- `model.safetensors.index.json`: which file the base's weights are in, for loaders that read all `*.safetensors` else;
- `quietstar.safetensors`: the heads;
- `custom_generate/`: what makes `generate` think where remote code is trusted.

An adapter repository (PEFT) holds the adapter's files, `quietstar.safetensors` and `quietstar.json`, the settings: beside a
`config.json` Transformers would take it for a whole model. Adapters were once saved with one, and load here all the same.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .._compat import find_file, noted_commit
from ..settings import OF_HEADS, QuietStarSettings
from .heads import LinearValueHead, QuietStarHeads, ThinkingModel


logger = logging.getLogger(__name__)

HEADS_NAME = "quietstar.safetensors"
SETTINGS_NAME = "quietstar.json"
CUSTOM_GENERATE = "custom_generate"
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


# Finding files


def as_path(name: str, value: Any) -> str:
    """The value of an argument that names a model, a folder or a file, as a string; a `TypeError` if it names none."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`{name}` is a `{type(value).__name__}`; give a string or a path.")
    return str(value)


def check_source(source: str) -> None:
    """
    Refuses a path of no folder, which would be looked for on the Hub.

    Raises:
        `FileNotFoundError`: if the source reads like a path and there is no such folder.
    """
    if not Path(source).is_dir() and (source[:1] in "./~" or source.count("/") > 1):
        raise FileNotFoundError(f"There is no model folder {source!r}; give a local folder or a Hub id.")


def check_apart(folder: str, base: str | None) -> None:
    """
    Refuses the folder of a base model for its adapter: each is loaded by the files that it finds there, and would find the other's.

    Raises:
        `ValueError`: if the folders are one.
    """
    if base and Path(base).is_dir() and Path(base).resolve() == Path(folder).resolve():
        raise ValueError(
            f"{str(folder)!r} is the folder of the adapter's base model; give the adapter one of its own."
        )


def file_of(source: str, filename: str, hub: dict[str, Any]) -> str | None:
    """Local path of a file of a local directory or Hub repository; None where there is no such file. `hub` has `revision` and
    the like."""
    check_source(source)
    return find_file(source, filename, **hub)


def has_file(source: str, filename: str, hub: dict[str, Any]) -> bool:
    """Whether a local directory or Hub repository has a file; `hub` has `revision` and the like."""
    return file_of(source, filename, hub) is not None


def tokenizer_beside(model: ThinkingModel) -> PreTrainedTokenizerBase:
    """
    The tokenizer from where a model was loaded.

    Raises:
        `ValueError`: if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model.config.name_or_path, trust_remote_code=False, **model._loaded_by)
    except (OSError, ValueError) as error:
        raise ValueError(
            "This model's thoughts may end early, at a token that only its tokenizer knows; pass `tokenizer=...`."
        ) from error


def commit_of(model: PreTrainedModel) -> str | None:
    """The commit of the Hub that a model was plainly loaded from: in the path of the code that came with it."""
    generate = getattr(vars(model).get("generate"), "func", None)
    parts = Path(generate.__code__.co_filename).parts if generate is not None else ()
    return next((part for part in parts if re.fullmatch("[0-9a-f]{40}", part)), noted_commit(model.config))


# Settings


def read_json(file: str) -> dict:
    """
    What a file of JSON holds.

    Raises:
        `ValueError`: if it is damaged.
    """
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file!r} is damaged: it is no valid JSON ({error}). Copy it again.") from error


def read_config(source: str, kwargs: dict[str, Any], hub: dict[str, Any]) -> PreTrainedConfig:
    """
    The configuration that `from_pretrained` would load a model by; Transformers reads it again, with what the arguments change.

    Args:
        source (`str`):
            Model id on the Hub or local directory.
        kwargs, hub (`dict`):
            Arguments of `from_pretrained`, and those of them that say where files are.
    """
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    options = {name: kwargs[name] for name in ("trust_remote_code", "gguf_file", "code_revision") if name in kwargs}
    return AutoConfig.from_pretrained(config or source, **options, **hub)


def settings_in(config: PreTrainedConfig) -> QuietStarSettings | None:
    """The settings in the configuration of a model that was saved with heads; None in that of another."""
    saved = getattr(config, "quietstar", None)
    return None if saved is None else QuietStarSettings.from_dict(saved, str(config.name_or_path))


def saved_settings(source: str, **hub: Any) -> QuietStarSettings | None:
    """
    The settings of a saved thinking model or adapter repository, or of the base of an adapter that has none; None where there are
    none.

    Args:
        source (`str`):
            Model id on the Hub or local directory.
        hub:
            `revision` and the like, as for `from_pretrained`.
    """
    config_file, settings_file = (file_of(source, name, hub) for name in (CONFIG_NAME, SETTINGS_NAME))
    saved = None if config_file is None else read_json(config_file).get("quietstar")
    if settings_file is not None:
        saved = read_json(settings_file)
    adapter = file_of(source, ADAPTER_CONFIG_NAME, hub) if saved is None else None
    if adapter is not None:
        config = read_json(adapter)
        base = config.get("base_model_name_or_path")
        return saved_settings(base, **hub_of_base(config, hub)) if base else None
    return None if saved is None else QuietStarSettings.from_dict(saved, source)


def hub_of_base(config: dict, hub: dict[str, Any]) -> dict[str, Any]:
    """Where on the Hub the base of an adapter is, by the adapter's configuration and where that is."""
    base_hub = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    return base_hub if config.get("revision") is None else {**base_hub, "revision": config["revision"]}


def save_config(model: ThinkingModel, save_directory: str) -> None:
    """Writes `config.json` with the family's plain class as architecture, so that plain loading finds it."""
    model.config.architectures = [model._plain_class.__name__]
    model.config.save_pretrained(save_directory)


# Heads


def write_heads(heads: QuietStarHeads, save_directory: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """
    Writes `quietstar.safetensors`.

    Args:
        heads ([`QuietStarHeads`]):
            Written where `state_dict` has none.
        save_directory (`str`):
            Folder to write into.
        state_dict (`dict`, *optional*):
            State of the whole model. Where an engine has sharded the parameters, only that has the heads whole.

    Raises:
        `ValueError`: if the state has some of the heads' tensors and not all.
    """
    folder, given = Path(as_path("save_directory", save_directory)), state_dict or {}
    state = {name.split("quietstar.")[1]: tensor for name, tensor in given.items() if "quietstar." in name}
    state = state or heads.state_dict()
    missing = sorted(set(heads.state_dict()) - set(state))
    if missing:
        raise ValueError(
            f"`state_dict` holds some of the heads, but not {', '.join(missing)}; give all of them, or none to save the "
            "model's own."
        )
    tensors = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / HEADS_NAME, metadata={"format": "pt"})


def read_heads(heads: QuietStarHeads, source: str | Path) -> dict[str, torch.Tensor]:
    """
    What a `quietstar.safetensors` holds, known to fit.

    Args:
        heads ([`QuietStarHeads`]):
            The heads that are to be loaded.
        source (`str`):
            The file, or the directory that holds it.

    Returns:
        `dict`: the state of the heads.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it is damaged, or the heads were saved for another model or with other head settings.
    """
    path = Path(as_path("path", source))
    path = path / HEADS_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There is no {str(path)!r}: the heads are not there.")
    try:
        # the bias of the mixing head was a scalar once
        tensors = {name: x.view(-1) if x.ndim == 0 else x for name, x in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is damaged: it cannot be read as safetensors ({error}). Copy it again."
        ) from error
    shapes, saved = ({k: tuple(v.shape) for k, v in x.items()} for x in (heads.state_dict(), tensors))
    wrong = sorted(name for name in shapes | saved if shapes.get(name) != saved.get(name))
    if wrong:
        raise ValueError(
            f"The heads in {str(path)!r} do not fit this model: {', '.join(wrong)} differ in name or shape. Load "
            f"them into the model they were trained with, with the same {' and '.join(f'`{name}`' for name in OF_HEADS)}."
        )
    return tensors


def load_trl_value_head(heads: QuietStarHeads, weights: str | None) -> None:
    """Starts a linear value head from a checkpoint of TRL's former `AutoModelForCausalLMWithValueHead`, if `weights` is one."""
    if weights is None or not isinstance(heads.value_head, LinearValueHead):
        return
    with safe_open(weights, framework="pt") as file:
        if "v_head.summary.weight" in file.keys():
            state = {name: file.get_tensor(f"v_head.summary.{name}") for name in ("weight", "bias")}
            heads.value_head.summary.load_state_dict(state)


def warn_of_lost_heads(source: str) -> None:
    """Says that a model that learned to think begins anew."""
    logger.warning(
        "%r was saved by trl-quietstar, but %s is not there: its heads are new ones. Copy the whole folder; or, if another trainer "
        "saved it, give that trainer the model as `QuietStarForCausalLM.from_pretrained` loads it, which saves its heads.",
        source,
        HEADS_NAME,
    )


# What others read


def save_beside_weights(
    model: ThinkingModel, save_directory: str, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes what a thinking model has beside the weights of its base: configuration, index, heads and `custom_generate/`.
    `state_dict` is as for [`write_heads`]."""
    save_config(model, save_directory)
    save_index(save_directory)
    write_heads(model.quietstar, save_directory, state_dict)
    save_custom_generate(save_directory)


def save_beside_adapter(base: ThinkingModel, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Writes what a thinking model has beside the files of an adapter: settings and heads. `state_dict` is as for [`write_heads`]."""
    Path(folder, CONFIG_NAME).unlink(missing_ok=True)  # of an older save
    Path(folder, SETTINGS_NAME).write_text(json.dumps(base.config.quietstar, indent=2) + "\n")
    base.save_heads(str(folder), state_dict)


def save_index(save_directory: str) -> None:
    """Writes the index of a model that is one file, as Transformers does of one that is several: vLLM and others take all
    `*.safetensors` of a folder without one for the model's, the heads among them."""
    weights, index = (Path(save_directory, name) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if not weights.is_file():
        return
    with safe_open(weights, framework="pt") as file:
        names = sorted(file.keys())
    content = {
        "metadata": {"total_size": weights.stat().st_size},
        "weight_map": dict.fromkeys(names, SAFE_WEIGHTS_NAME),
    }
    index.write_text(json.dumps(content, indent=2) + "\n")


def save_custom_generate(save_directory: str) -> None:
    """Writes `custom_generate/`, by which a plainly loaded model thinks if its user trusts remote code."""
    source, target = Path(__file__).parent.parent / CUSTOM_GENERATE, Path(save_directory, CUSTOM_GENERATE)
    target.mkdir(exist_ok=True)
    for name in ("generate.py", "requirements.txt"):
        shutil.copyfile(source / name, target / name)
