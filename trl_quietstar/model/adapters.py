"""Adapters of PEFT: the causal LM inside one, which can be trained, the policy that a run with one started from, and how saved
ones are put on."""

import copy
import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from .._compat import holds_adapter
from ..settings import QuietStarSettings
from .embeddings import weight_of
from .heads import ThinkingModel, give_heads
from .saved import HEADS_NAME, SETTINGS_NAME, check_apart, file_of, save_beside_adapter, saved_settings


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

# Methods of PEFT that a thinking step would not train as they are meant to be trained
REFUSED = {
    "ADALORA": "it adds a term to the loss and prunes ranks as it trains",
    "POLY": "its layers ask for `task_ids` at every forward",
    "SHADOW": "its layers pass on a second state beside the hidden states, which thoughts do not have",
    "XLORA": "it weighs its adapters by a first forward over token ids, and thoughts are read as embeddings",
}
# Options of methods that are otherwise supported
REFUSED_OPTIONS = {
    "alora_invocation_tokens": "which switches the adapter on at token ids, and thoughts are read as embeddings",
    "kasa_config": "which adds a term to the loss",
    "monteclora_config": "which adds a term to the loss and noise to the weights",
    "use_asa": "which prunes ranks as it trains",
}
TASK_TYPES = (None, "CAUSAL_LM")


def base_of(model: nn.Module) -> ThinkingModel:
    """The causal LM itself, inside a `PeftModel` or not. It has heads but for where a model that a user passed gets them."""
    inside: Any = model
    return inside.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else inside


def check_method(config) -> None:
    """
    Refuses an adapter that would not be trained, or not as its method says.

    Args:
        config ([`~peft.PeftConfig`]):
            Of the adapter.

    Raises:
        `ValueError`: for prompt learning, for a method or an option whose loss or forward is not that of a thinking step, and
            for another task than language modelling.
    """
    method = getattr(config.peft_type, "value", config.peft_type)
    instead = "Take a `LoraConfig`, or another method that changes layers."
    if config.is_prompt_learning:
        raise ValueError(
            f"{type(config).__name__} ({method}) puts virtual tokens before the input, and a thinking step runs the layers "
            f"without them, so that they would not be trained. {instead}"
        )
    if method in REFUSED:
        raise ValueError(f"{type(config).__name__} ({method}) is not supported: {REFUSED[method]}. {instead}")
    for name, reason in REFUSED_OPTIONS.items():
        if getattr(config, name, None):
            raise ValueError(
                f"`{name}` of the {type(config).__name__} is {getattr(config, name)!r}, {reason}; leave it out."
            )
    if config.task_type not in TASK_TYPES:
        task = getattr(config.task_type, "value", config.task_type)
        raise ValueError(f"`task_type` of the {type(config).__name__} is {task!r}; set `task_type='CAUSAL_LM'`.")


def warn_of_absent(base: nn.Module, config) -> None:
    """
    Warns of names in an adapter's lists that no module has: PEFT passes over them, as long as one other name fits.

    Args:
        base (`nn.Module`):
            The causal LM.
        config ([`~peft.PeftConfig`]):
            Of the adapter. A regular expression in place of a list is not looked at.
    """
    known = [f".{name}" for name, _ in base.named_modules()]
    for option in ("target_modules", "modules_to_save"):
        names = getattr(config, option, None)
        absent = [] if names is None or isinstance(names, str) else sorted(names)
        dot = "." if option == "target_modules" else ""  # PEFT saves modules by any end of their names
        absent = [name for name in absent if not any(module.endswith(dot + name) for module in known)]
        if absent:
            logger.warning(
                "`%s` names %s, and no module of %s is called so: nothing is trained there.",
                option,
                ", ".join(map(repr, absent)),
                type(base).__name__,
            )


def trains_added_weights_only(config) -> bool:
    """
    Tells whether an adapter leaves every weight of its base as it is. It does if it is LoRA that begins at zero, and no weight of
    the base is trained beside it or split off into it.

    Args:
        config ([`~peft.PeftConfig`]):
            Of the adapter.
    """
    return (
        getattr(config.peft_type, "value", config.peft_type) == "LORA"
        and config.init_lora_weights in (True, "gaussian")
        and config.bias == "none"
        and not (config.modules_to_save or config.use_dora or config.trainable_token_indices)
    )


def check_adapter_model(model: nn.Module) -> None:
    """
    Refuses a `PeftModel` whose adapters cannot be trained and read again.

    Raises:
        `ValueError`: as [`check_method`], and if the active adapter is not the one called `default`, the only one that is
            saved where it is looked for.
    """
    if holds_adapter(model):
        raise ValueError(
            "The model has an adapter that Transformers put in (`add_adapter`, or an adapter's folder given to "
            "`AutoModelForCausalLM`); load the base model, and the adapter onto it with `PeftModel.from_pretrained(base, "
            "folder, is_trainable=True)`."
        )
    if not is_peft_model(model):
        return
    active = model.active_adapters
    if active != ["default"]:
        raise ValueError(
            f"The active adapters of the model are {active}, and only one that is called 'default' is saved where it is looked "
            "for; load it with `adapter_name='default'`, or merge the others into the base model."
        )
    check_method(model.peft_config["default"])  # type: ignore[index]  # an attribute of a module


def check_trainable(model: nn.Module) -> None:
    """
    Refuses a model of which nothing but the heads would be trained.

    Raises:
        `ValueError`: if adapter or base is frozen.
    """
    if any(p.requires_grad for name, p in model.named_parameters() if "quietstar." not in name):
        return
    if is_peft_model(model):
        raise ValueError(
            "The adapter is frozen, so that nothing but the thinking heads would be trained: load it with "
            "`PeftModel.from_pretrained(base, folder, is_trainable=True)`, and a configuration with "
            "`LoraConfig.from_pretrained(folder, inference_mode=False)`."
        )
    raise ValueError(
        "All parameters of the model are frozen, so that nothing but the thinking heads would be trained: call "
        "`model.requires_grad_(True)`, or pass a `peft_config`. To train the heads alone set `learning_rate=0`."
    )


def starts_as_its_base(model: nn.Module) -> bool:
    """Tells whether the model still predicts as its base does without the adapter. It does if all that is trained beside the heads
    is LoRA that has made no step: one matrix of each pair is 0."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and "quietstar." not in name]
    free, zero = (".lora_A.", ".lora_embedding_B."), (".lora_B.", ".lora_embedding_A.")
    return all(
        any(part in name for part in free) or (any(part in name for part in zero) and not p.any())
        for name, p in trained
    )


class AdapterReference:
    """
    The policy that a run with an adapter started from. Where the adapter started at zero, that is the base without the adapter;
    otherwise it is the model with a copy of the parameters that are trained.

    Args:
        model ([`~peft.PeftModel`]):
            The thinking model, before the first step.
        sharded (`bool`):
            Whether each process holds only a part of the parameters.

    Raises:
        `ValueError`: if a copy is needed and parameters are sharded.
    """

    def __init__(self, model: nn.Module, sharded: bool):
        self.model, self.is_base = model, starts_as_its_base(model)
        if not self.is_base and sharded:
            raise ValueError(
                "A reference (`beta` above 0, or `no_thought_model='reference'`) of an adapter that was trained before, or does "
                "not start as its base, needs a copy of it, which FSDP and ZeRO-3 would not shard. Merge the adapter into the "
                "base and train a new one, or train with DDP."
            )
        self.heads = copy.deepcopy(base_of(model).quietstar).requires_grad_(False) if self.is_base else None
        trained = [] if self.is_base else [p for p in model.parameters() if p.requires_grad]
        copies = {p: nn.Parameter(p.detach().clone(), requires_grad=False) for p in trained}
        # layers may share a parameter, and names leave out all its places but one
        self.places = [
            (module, name, copies[p])
            for module in model.modules()
            for name, p in module.named_parameters(recurse=False)
            if p in copies
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Makes the model what it was at the start, inside the block."""
        base: Any = base_of(self.model)
        heads, own = base.quietstar, [getattr(module, name) for module, name, _ in self.places]
        try:
            if self.heads is not None:
                base.quietstar = self.heads
            for module, name, copied in self.places:
                setattr(module, name, copied)
            with self.model.disable_adapter() if self.is_base else nullcontext():  # type: ignore[operator]  # an attribute of a module
                yield
        finally:
            base.quietstar = heads
            for (module, name, _), parameter in zip(self.places, own, strict=True):
                setattr(module, name, parameter)


# Adapters that are saved


def save_heads_too(model: "PeftModel") -> None:
    """Has the `save_pretrained` of a `PeftModel`, which `push_to_hub` calls, save the heads of its base: PEFT would leave them out,
    and nothing could load what it saves with its thoughts."""
    model.save_pretrained = functools.partial(_save_adapter, model)  # type: ignore[method-assign]  # of this object alone


def _save_adapter(model: "PeftModel", save_directory: str, *args, **kwargs) -> None:
    check_apart(save_directory, base_of(model).config.name_or_path)
    for config in model.peft_config.values():
        # else PEFT notes the thinking class, and then refuses to import it
        config.task_type = config.task_type or "CAUSAL_LM"
    save = type(model).save_pretrained
    save(model, save_directory, *args, **kwargs)
    given = inspect.signature(save).bind(model, save_directory, *args, **kwargs)
    given.apply_defaults()
    if not given.arguments["is_main_process"]:
        return
    for name in given.arguments["selected_adapters"] or model.peft_config:
        folder = Path(save_directory, "" if name == "default" else name)  # as PEFT names it
        save_beside_adapter(base_of(model), folder, kwargs.get("state_dict"))


# Adapters that were saved


@contextmanager
def heads_aside(model: PreTrainedModel) -> Iterator[None]:
    """Takes the heads out while an adapter is put in, which would otherwise land on them (`target_modules="all-linear"`)."""
    heads = model.quietstar
    del model.quietstar
    try:
        yield
    finally:
        model.quietstar = heads


def check_heads(source: str, base: str, hub: dict[str, Any], base_hub: dict[str, Any]) -> None:
    """
    Refuses a saved adapter without heads, unless another trainer saved it, of a thinking model: then the heads are that model's.

    Args:
        source (`str`), base (`str`):
            Hub ids or local folders of the adapter and of its base.
        hub, base_hub (`dict`):
            `revision` and the like, of each.

    Raises:
        `FileNotFoundError`: if there are no heads.
    """
    if file_of(source, HEADS_NAME, hub) is not None:
        return
    if file_of(source, SETTINGS_NAME, hub) is not None or file_of(base, HEADS_NAME, base_hub) is None:
        raise FileNotFoundError(
            f"The adapter {source!r} has no {HEADS_NAME}: it was not saved by trl-quietstar. To teach its model to think, give the "
            "trainer what `AutoPeftModelForCausalLM.from_pretrained(..., is_trainable=True)` returns."
        )
    logger.warning("The adapter %r has no %s: the heads are those of its base, %r.", source, HEADS_NAME, base)


def check_saved_adapter(source: str, hub: dict[str, Any]) -> str:
    """
    Finds the weights of a saved adapter.

    Args:
        source (`str`):
            Hub id or local folder.
        hub (`dict`):
            `revision` and the like.

    Returns:
        `str`: path of the weights.

    Raises:
        `FileNotFoundError`: if the adapter is not saved as safetensors.
        `ValueError`: if it is of a method that does not go with thoughts.
    """
    from peft import PeftConfig

    weights = file_of(source, ADAPTER_SAFE_WEIGHTS_NAME, hub)
    if weights is None:
        raise FileNotFoundError(
            f"The adapter {source!r} has no {ADAPTER_SAFE_WEIGHTS_NAME}, the only form in which trl-quietstar saves one and "
            "reads it."
        )
    check_method(PeftConfig.from_pretrained(source, **hub))
    return weights


def resize_as(base: PreTrainedModel, weights: str) -> None:
    """Gives a base as many tokens as it had when an adapter was saved. PEFT saves embeddings with the adapter of a base that was
    resized, and they fit no other size."""
    with safe_open(weights, framework="pt") as file:
        for table in (base.get_input_embeddings(), base.get_output_embeddings()):
            size = weight_of(table).shape[0]
            name = next(name for name, module in base.named_modules() if module is table)
            saved = [key for key in file.keys() if key.endswith((f".{name}.weight", f".{name}.base_layer.weight"))]
            rows: Any = file.get_slice(saved[0]).get_shape()[0] if saved else size
            if rows != size:
                base.resize_token_embeddings(rows, mean_resizing=False)
                return


def put_adapter(
    model: PreTrainedModel, source: str, settings: QuietStarSettings | None = None, **hub: Any
) -> "PeftModel":
    """
    Puts a saved adapter on a thinking model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Its base, with heads.
        source (`str`):
            Hub id or local folder of the adapter. Heads and settings that are saved there become the model's.
        settings ([`QuietStarSettings`], *optional*):
            In place of the saved ones.
        hub:
            `revision` and the like.

    Returns:
        [`~peft.PeftModel`]

    Raises:
        `FileNotFoundError`: if the adapter is not saved as safetensors.
        `ValueError`: if it is of a method that does not go with thoughts, or its heads do not fit.
    """
    from peft import PeftModel

    weights, heads = check_saved_adapter(source, hub), file_of(source, HEADS_NAME, hub)
    settings = settings or saved_settings(source, **hub)
    if heads is not None and settings is not None:
        give_heads(model, settings)
    with heads_aside(model):
        resize_as(model, weights)
        adapted = PeftModel.from_pretrained(model, source, is_trainable=True, **hub)  # as any model is that was loaded
    if heads is not None:
        model.load_heads(heads)  # type: ignore[operator]  # an attribute of a module
    save_heads_too(adapted)
    return adapted
