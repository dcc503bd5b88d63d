"""`QuietStarForCausalLM`: any causal LM of Transformers, with heads for thinking.

The model is the family's own class with a mixin (`QuietStarLlamaForCausalLM`, …), never a wrapper: base weights keep
their names, so plain loading, adapters, merging and serving keep working. On disk:

- `model.safetensors`, `config.json`: the base, with its own `model_type` and `architectures`, and a `quietstar` entry;
- `model.safetensors.index.json`: which file the base's weights are in, for loaders that read all `*.safetensors` else;
- `quietstar.safetensors`: the heads;
- `custom_generate/`: what makes `generate` think where remote code is trusted.

An adapter repository (PEFT) holds the adapter's files, `quietstar.safetensors` and `quietstar.json`, the settings: beside a
`config.json` Transformers would take it for a whole model. Adapters were once saved with one, and load here all the same.
"""

import functools
import inspect
import json
import logging
import re
import shutil
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StopStringCriteria,
)
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from ._compat import find_file, is_compiled, noted_commit, set_unsaved_keys
from .branches.base import BranchPath
from .branches.replay import Replay
from .model.adapters import base_of, check_method
from .model.concurrency import LOCK, eval_mode
from .model.heads import QuietStarHeads
from .model.sharding import load_full
from .settings import QuietStarSettings
from .thinking.check import choose_path, takes_masks
from .thinking.generation import think_and_speak
from .thinking.likelihood import log_likelihoods
from .thinking.when import Thinking


logger = logging.getLogger(__name__)

HEADS_NAME = "quietstar.safetensors"
SETTINGS_NAME = "quietstar.json"
CUSTOM_GENERATE = "custom_generate"
PUBLISHED_HEADS = ("talk_head.", "start_embedding", "end_embedding")  # names in the published code's weights
NOT_WITH_THOUGHTS = (
    *("custom_generate", "assistant_model", "assistant_tokenizer", "synced_gpus", "token_healing"),
    *("output_attentions", "output_hidden_states"),
)  # arguments of `generate`
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class QuietStarMixin:
    """What a model class gains: the submodule `quietstar`, scoring in its forward, and a checkpoint that others read
    as the plain base model."""

    quietstar: QuietStarHeads
    _fresh_embedding: torch.Tensor | None = None  # of shape (E,): a start or end embedding that nothing has set yet
    _loaded_by: Mapping[str, Any] = MappingProxyType({})  # `revision` and the like that it was loaded with
    _plain_class: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        settings = _settings_in(config)
        if settings is not None:  # made by its class, as TRL's `BEMACallback` copies a model
            attach_heads(self, settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args, **kwargs):
        """As [`QuietStarForCausalLM.from_pretrained`]."""
        return QuietStarForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def quietstar_settings(self) -> QuietStarSettings:
        """The settings saved in the config."""
        return QuietStarSettings.from_dict(self.config.quietstar, self.config.name_or_path)

    @property
    def quietstar_thinking(self) -> Thinking:
        """When the model thinks unless it is told otherwise: as it was trained."""
        return Thinking.of(self.quietstar_settings)

    @property
    def thought_path(self) -> BranchPath:
        """How thoughts are run on this model, by the start-up check."""
        return self._checked("_thought_path", lambda: choose_path(self))

    @thought_path.setter
    def thought_path(self, path: BranchPath) -> None:
        vars(self)["_thought_path"] = path

    @property
    def branches_in_cache(self) -> bool:
        """Whether a thought may share a cache with the text it branches off, told apart by a mask."""
        return self._checked(
            "_branches_in_cache", lambda: not isinstance(self.thought_path, Replay) and takes_masks(self)
        )

    def _checked(self, name: str, check: Callable[[], Any]) -> Any:
        """What a check found when it was first asked for; it runs once, in whichever thread."""
        with LOCK:
            if name not in vars(self):
                vars(self)[name] = check()
            return vars(self)[name]

    def thought_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase | None:
        """
        The tokenizer that says when a thought ends: the one given, or the one beside the model; None if thoughts have a
        fixed length.

        Raises:
            `ValueError`: if there is none.
        """
        if tokenizer is not None or self.quietstar_settings.min_thought_length is None:
            return tokenizer
        try:
            return AutoTokenizer.from_pretrained(self.config.name_or_path, trust_remote_code=False, **self._loaded_by)
        except (OSError, ValueError) as error:
            raise ValueError(
                "This model's thoughts may end early, at a token that only its tokenizer knows; pass `tokenizer=...`."
            ) from error

    def generate(
        self,
        *args,
        think: str | Thinking | None = None,
        think_every: int | None = None,
        thinking_threshold: float | None = None,
        return_thoughts: bool = False,
        thought_streamer: BaseStreamer | None = None,
        **kwargs,
    ):
        """
        Generates visible text, thinking before it speaks. All arguments of [`~transformers.GenerationMixin.generate`] work
        with greedy search and sampling.

        Args:
            think (`str`, *optional*):
                `"always"`; `"adaptive"`: where the prediction is uncertain; `"prompt_end"`: once, before the first new token;
                or `"never"`, as the base model. Defaults to what the model was trained for (`quietstar_thinking`).
            think_every (`int`, *optional*):
                How many tokens a thought serves, up to the model's `talk_length`.
            thinking_threshold (`float`, *optional*):
                Least entropy of the no-thought prediction, divided by log V, to think at (adaptive).
            return_thoughts (`bool`):
                Whether to return [`~thinking.generation.GenerateThoughtfulOutput`], with the thoughts.
            thought_streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
                Gets the tokens of each thought, before `streamer` gets the text that it served.

        Returns:
            `torch.Tensor` of shape `(B, T + new)`, or an output class as with `return_dict_in_generate`.

        Raises:
            `ValueError`: if a value is outside its limits, or the decoding method cannot think.
        """
        thinking = Thinking.of(self.quietstar_settings, think, think_every, thinking_threshold)
        if thinking.mode == "never":
            if return_thoughts or thought_streamer is not None:
                raise ValueError(
                    "There are no thoughts to return or to stream: this model does not think (`think='never'`)."
                )
            return super().generate(*args, **kwargs)
        bound = inspect.signature(super().generate).bind_partial(*args, **kwargs).arguments
        options = {**bound.pop("kwargs", {}), **bound}
        check_options(options)
        tokenizer = options.pop("tokenizer", None)
        self._take_stop_strings(options, tokenizer)
        loop = functools.partial(
            think_and_speak,
            thinking=thinking,
            return_thoughts=return_thoughts,
            tokenizer=tokenizer,
            streamer=options.get("streamer"),
            thought_streamer=thought_streamer,
        )
        with eval_mode(self):
            return super().generate(custom_generate=loop, **options)

    def _take_stop_strings(self, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Makes a stopping criterion of stop strings, wherever they are given: Transformers keeps the tokenizer, which says
        what they are, from a custom loop."""
        configs = (options.get("generation_config"), self.generation_config)
        saved = next((config.stop_strings for config in configs if config is not None and config.stop_strings), None)
        stop_strings = options.pop("stop_strings", saved)
        if saved is not None:
            options["stop_strings"] = None
        if stop_strings is None:
            return
        if tokenizer is None:
            raise ValueError(f"`stop_strings={stop_strings!r}` needs `tokenizer=...`.")
        criterion = StopStringCriteria(tokenizer, stop_strings)
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), criterion])

    def log_likelihoods(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        score_mask: torch.Tensor | None = None,
        think: str | Thinking | None = None,
        think_every: int | None = None,
        thinking_threshold: float | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        How likely given text is, thinking before its tokens as greedy generation would, at all positions at once.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`):
                The texts.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 on text; padding on either side.
            score_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 on the tokens to score, a run in each row; what stands before the run is the prompt. Defaults to all
                tokens but the first.
            think, think_every, thinking_threshold:
                As in [`~modeling.QuietStarMixin.generate`]; with `"never"`, as the base model.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                For models whose thoughts may end early. Defaults to the one beside the model.

        Returns:
            `tuple`: log-probabilities in nats, and whether each token is the most likely one; both of shape `(B, T - 1)`,
            for all tokens but the first, and 0 and False where nothing is scored.

        Raises:
            `ValueError`: if a value is outside its limits.
        """
        thinking = Thinking.of(self.quietstar_settings, think, think_every, thinking_threshold)
        with eval_mode(self):
            return log_likelihoods(self, input_ids, attention_mask, score_mask, thinking, tokenizer)

    def initialize_thought_embeddings(
        self, tokenizer: PreTrainedTokenizerBase, start: str = "—", end: str = "—", only_fresh: bool = False
    ) -> None:
        """
        Sets the start and end embeddings to the mean input embedding of a string's tokens (Quiet-STaR, appendix A:
        an em dash, which writers use for a pause).

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                The model's tokenizer.
            start, end (`str`):
                The strings.
            only_fresh (`bool`, *optional*, defaults to `False`):
                Whether to keep an embedding that was read from a file or set before, by hand too.

        Raises:
            `ValueError`: if a string has no tokens, or one that the model does not know.
        """
        table = self.get_input_embeddings()
        targets = ((start, self.quietstar.start_embedding), (end, self.quietstar.end_embedding))
        for string, embedding in targets:
            if only_fresh and not self._is_fresh(embedding):
                continue
            ids = tokenizer(string, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ValueError(f"The tokenizer gives no tokens for {string!r}; choose another start or end string.")
            if max(ids) >= self.config.get_text_config().vocab_size:
                raise ValueError(
                    f"The tokenizer gives the id {max(ids)} for {string!r}, and the model's vocabulary has "
                    f"{self.config.get_text_config().vocab_size}; take the model's own tokenizer, or resize its embeddings."
                )
            with torch.no_grad():
                embedding.copy_(table(torch.tensor(ids, device=table.weight.device)).mean(0))
        self._fresh_embedding = None

    @property
    def fresh_thought_embeddings(self) -> bool:
        """Whether a start or end embedding is still to be set: by a tokenizer, a file, or hand."""
        return any(self._is_fresh(x) for x in (self.quietstar.start_embedding, self.quietstar.end_embedding))

    def _is_fresh(self, embedding: torch.Tensor) -> bool:
        """Whether a thought embedding is as [`attach_heads`] left it, but for a change of its dtype."""
        fresh, now = self._fresh_embedding, embedding.detach().cpu().double()
        return fresh is not None and torch.allclose(now, fresh, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)

    def adopt_settings(self, settings: QuietStarSettings) -> None:
        """
        Takes over lengths and prediction for what follows.

        Args:
            settings ([`QuietStarSettings`]):
                The new settings.

        Raises:
            `ValueError`: if they ask for another value head than the model has.
        """
        for name in ("value_head_type", "value_head_hidden_size"):
            own, wanted = getattr(self.quietstar_settings, name), getattr(settings, name)
            if own != wanted:
                raise ValueError(f"The model's heads have `{name}` {own!r}, not {wanted!r}; set `{name}={own!r}`.")
        self.config.quietstar = settings.to_dict()

    def save_heads(self, save_directory: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes `quietstar.safetensors`; of the heads in the state of the whole model, where there are any (parameters may be
        sharded), or of the model's own."""
        given = state_dict or {}
        state = {n.split("quietstar.")[1]: tensor for n, tensor in given.items() if "quietstar." in n}
        state = state or self.quietstar.state_dict()
        missing = sorted(set(self.quietstar.state_dict()) - set(state))
        if missing:
            raise ValueError(
                f"`state_dict` holds some of the heads, but not {', '.join(missing)}; give all of them, or none to save the "
                "model's own."
            )
        tensors = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
        save_file(tensors, Path(save_directory) / HEADS_NAME, metadata={"format": "pt"})

    def read_heads(self, path: str) -> dict[str, torch.Tensor]:
        """
        What a `quietstar.safetensors` holds, known to fit.

        Args:
            path (`str`):
                The file, or the directory that holds it.

        Returns:
            `dict`: the state of the heads.

        Raises:
            `FileNotFoundError`: if there is no such file.
            `ValueError`: if it is damaged, or the heads were saved for another model or with other head settings.
        """
        path = Path(path)
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
        shapes, saved = ({k: tuple(v.shape) for k, v in x.items()} for x in (self.quietstar.state_dict(), tensors))
        wrong = sorted(name for name in shapes | saved if shapes.get(name) != saved.get(name))
        if wrong:
            raise ValueError(
                f"The heads in {str(path)!r} do not fit this model: {', '.join(wrong)} differ in name or shape. Load "
                "them into the model they were trained with, with the same `value_head_type` and "
                "`value_head_hidden_size`."
            )
        return tensors

    def load_heads(self, path: str) -> None:
        """
        Reads the heads from a `quietstar.safetensors`.

        Args:
            path (`str`):
                The file, or the directory that holds it.

        Raises:
            As [`read_heads`].
        """
        load_full(self.quietstar, self.read_heads(path))
        self._fresh_embedding = None

    def save_pretrained(
        self,
        save_directory: str,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Saves the base model in its family's own format, and the heads and what generates with them beside it."""
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        set_unsaved_keys(self, [name for name in self.state_dict() if name.startswith("quietstar.")])
        own = None if state_dict is None else dict(state_dict)  # Transformers takes out what is not to be saved
        super().save_pretrained(save_directory, is_main_process, own, **kwargs)
        if is_main_process:
            save_config(self, save_directory)
            save_index(save_directory)
            self.save_heads(save_directory, state_dict)
            save_custom_generate(save_directory)
        if push_to_hub:  # not by Transformers, which would upload before the heads are there
            known = inspect.signature(PreTrainedModel.push_to_hub).parameters
            self.push_to_hub(repo_id, **{name: value for name, value in kwargs.items() if name in known})


def check_options(options: dict[str, Any]) -> None:
    """Refuses what Transformers' `generate` would do in place of thinking, or keep from a custom loop without a word."""
    config = options.get("generation_config")
    for name in (*NOT_WITH_THOUGHTS, "cache_implementation"):
        value = options.get(name, getattr(config, name, None))
        if value if name in NOT_WITH_THOUGHTS else value in ("paged", "quantized"):
            shown = repr(value) if isinstance(value, (str, bool)) else f"a `{type(value).__name__}`"
            raise ValueError(f"`{name}` ({shown}) does not go with thoughts; leave it out, or use `think='never'`.")


def save_config(model: PreTrainedModel, save_directory: str) -> None:
    """Writes `config.json` with the plain class as architecture, so that plain loading finds it."""
    model.config.architectures = [model._plain_class.__name__]
    model.config.save_pretrained(save_directory)


def save_settings(model: PreTrainedModel, save_directory: str) -> None:
    """Writes `quietstar.json`, the settings beside an adapter."""
    (Path(save_directory) / CONFIG_NAME).unlink(missing_ok=True)  # of an older save
    (Path(save_directory) / SETTINGS_NAME).write_text(json.dumps(model.config.quietstar, indent=2) + "\n")


def save_index(save_directory: str) -> None:
    """Writes the index of a model that is one file, as Transformers does of one that is several: vLLM and others take all
    `*.safetensors` of a folder without one for the model's, the heads among them."""
    weights, index = (Path(save_directory) / name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
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
    target = Path(save_directory) / CUSTOM_GENERATE
    target.mkdir(exist_ok=True)
    for name in ("generate.py", "requirements.txt"):
        shutil.copyfile(Path(__file__).parent / CUSTOM_GENERATE / name, target / name)


@functools.cache
def quietstar_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The family's class with the mixin, made once for each family."""
    members = {"forward": _thinking_forward(base.forward), "_plain_class": base}
    return type(f"QuietStar{base.__name__}", (QuietStarMixin, base), members)


def _thinking_forward(plain: Callable) -> Callable:
    """A method that answers a request when there is one, such as a [`~thinking.scoring.ScoreRequest`], and is otherwise `plain`,
    with its signature (`generate` and `Trainer` read it). Inside it every engine's weights are there to be used."""

    @functools.wraps(plain)
    def forward(self, *args, quietstar_request: Callable[[PreTrainedModel], Any] | None = None, **kwargs):
        if quietstar_request is not None:
            return quietstar_request(self)
        return plain(self, *args, **kwargs)

    return forward


def attach_heads(model: PreTrainedModel, settings: QuietStarSettings) -> PreTrainedModel:
    """
    Turns a causal LM, in place, into its thinking class, with fresh heads.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A decoder with an LM head; inside a `PeftModel`, its base (so that no adapter lands on the heads).
        settings ([`QuietStarSettings`]):
            What the heads are.

    Returns:
        The same object.

    Raises:
        `ValueError`: if the model is an encoder-decoder or has no LM head.
    """
    check_causal_lm(model)
    if not isinstance(model, QuietStarMixin):
        model.__class__ = quietstar_class(type(model))
        own = vars(model).get("forward")
        if own is not None:  # set on the object by TRL's `SFTTrainer` or Accelerate's hooks, it would hide the class's
            plain = functools.wraps(own)(lambda self, *args, **kwargs: own(*args, **kwargs))
            model.forward = types.MethodType(_thinking_forward(plain), model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.inference_mode(False), torch.no_grad():  # heads made in inference could never be trained
        heads = QuietStarHeads(head.weight.shape[1], embeddings.weight.shape[1], settings)
        mean = embeddings.weight.mean(0)  # overwritten as soon as a tokenizer is at hand
        heads.start_embedding.copy_(mean)
        heads.end_embedding.copy_(mean)
        dtype = torch.float64 if embeddings.weight.dtype == torch.float64 else torch.float32
        model.quietstar = heads.to(device=head.weight.device, dtype=dtype)
        model._fresh_embedding = mean.detach().cpu().double()
    model.config.quietstar = settings.to_dict()
    return model


def attach_saved_heads(model: PreTrainedModel) -> PreTrainedModel:
    """
    Turns a plainly loaded causal LM, in place, into the thinking model it was saved from.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            As `AutoModelForCausalLM.from_pretrained` gave it.

    Returns:
        The same object.

    Raises:
        `FileNotFoundError`: if there are no heads where it was loaded from.
    """
    with LOCK:  # another thread may have asked for it too
        if isinstance(model, QuietStarMixin):
            return model
        source = model.config.name_or_path
        hub = {} if Path(source).is_dir() else {"revision": _commit_of(model)}
        settings, heads = _settings_in(model.config), _find(source, HEADS_NAME, hub)
        if settings is None or heads is None:
            raise FileNotFoundError(f"{source!r} has no {HEADS_NAME}: it was not saved by trl-quietstar.")
        attach_heads(model, settings)
        model.load_heads(heads)
        return model


def _commit_of(model: PreTrainedModel) -> str | None:
    """The commit of the Hub that a model was plainly loaded from: in the path of the code that came with it."""
    generate = getattr(vars(model).get("generate"), "func", None)
    parts = Path(generate.__code__.co_filename).parts if generate is not None else ()
    return next((part for part in parts if re.fullmatch("[0-9a-f]{40}", part)), noted_commit(model.config))


@contextmanager
def heads_aside(model: PreTrainedModel):
    """Takes the heads out while adapters are put in, so that none lands on them (`target_modules="all-linear"`)."""
    heads = model.quietstar
    del model.quietstar
    try:
        yield
    finally:
        model.quietstar = heads


def check_thinker(model: PreTrainedModel) -> None:
    """Refuses a model that has no heads to think with."""
    if not isinstance(base_of(model), QuietStarMixin):
        raise ValueError(
            f"The model is a {type(model).__name__}, without heads; load it with `QuietStarForCausalLM.from_pretrained`."
        )


def check_causal_lm(model: PreTrainedModel) -> None:
    """Refuses what cannot be a causal thinker, before anything is changed."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or is_compiled(model):
        raise ValueError(
            f"The model is a {name}, compiled or not a model of Transformers; pass it as `AutoModelForCausalLM` loads it. "
            "Its layers may be compiled one by one, with `layer.compile()`."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; thoughts need a causal (decoder-only) language model.")
    _check_reads_text(model.config, name)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no LM head; load the model with `AutoModelForCausalLM`.")
    if getattr(model, "hf_device_map", None) and any(
        x.weight.device.type == "meta" for x in (head, model.get_input_embeddings()) if hasattr(x, "weight")
    ):
        raise ValueError(
            f"The input embeddings or the LM head of the {name} are offloaded by its `device_map` ({model.hf_device_map}), and "
            "thoughts read both at every token; map them to a device."
        )
    if isinstance(head, nn.ModuleList):
        raise ValueError(
            f"{name} predicts {len(head)} codes at a time, as audio decoders do; thoughts need a language model with one "
            "vocabulary."
        )


class QuietStarForCausalLM:
    """
    Factory of thinking models, used like an Auto class of Transformers.

    Example:

    ```python
    >>> from trl_quietstar import QuietStarForCausalLM

    >>> model = QuietStarForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    >>> type(model).__name__
    'QuietStarLlamaForCausalLM'
    ```
    """

    def __init__(self):
        raise TypeError("Use `QuietStarForCausalLM.from_pretrained(...)` or `.from_config(...)`.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, settings: QuietStarSettings | None = None, **kwargs
    ) -> PreTrainedModel:
        """
        Loads a plain causal LM (fresh heads), a saved thinking model, or an adapter repository with its heads.

        Thinking models and adapters with heads are read from safetensors only. The weights of a plain model may also be in
        a `pytorch_model.bin`, which Transformers loads with `torch.load(weights_only=True)`; `use_safetensors=True` refuses
        it.

        Args:
            pretrained_model_name_or_path (`str`):
                Model id on the Hub or local directory.
            settings ([`QuietStarSettings`], *optional*):
                Defaults to the saved ones, or to the defaults for a plain model.
            kwargs:
                As for [`~transformers.AutoModelForCausalLM.from_pretrained`].

        Returns:
            [`~transformers.PreTrainedModel`] with `quietstar` heads, or a [`~peft.PeftModel`] around one; a `tuple` of it and
            what Transformers says of the base model's weights with `output_loading_info=True`.

        Raises:
            `TypeError`: for `custom_generate`, which is an argument of `generate`.
            `ValueError`: if it is not a causal LM, its settings cannot be read, saved heads do not fit, or heads of the published
                Quiet-STaR code are among its weights.
        """
        source = str(pretrained_model_name_or_path)
        if "custom_generate" in kwargs:
            raise TypeError(
                "`custom_generate` is an argument of `generate`, not of `from_pretrained`; leave it out here."
            )
        kwargs.setdefault("trust_remote_code", False)  # unset, Transformers would ask on a terminal
        hub = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        adapter = _find(source, ADAPTER_CONFIG_NAME, hub)
        if adapter is not None:
            return _load_adapter(source, _read_json(adapter), settings, hub, kwargs)
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):  # Transformers reads it again, with what the arguments change
            names = ("trust_remote_code", "gguf_file", "code_revision")
            options = {name: kwargs[name] for name in names if name in kwargs}
            config = AutoConfig.from_pretrained(config or source, **options, **hub)
        _check_config(config, source)
        heads = _find(source, HEADS_NAME, hub)
        if heads is not None:
            if kwargs.get("use_safetensors") is False:
                raise ValueError(
                    "`use_safetensors=False`: thinking models are read from safetensors only; leave it out."
                )
            kwargs["use_safetensors"] = True
        saved = _settings_in(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **{**kwargs, "output_loading_info": True})
        model, info = loaded
        _check_published(info["unexpected_keys"], source)
        attach_heads(model, settings or saved or QuietStarSettings())
        model._loaded_by = hub
        if heads is not None:
            model.load_heads(heads)
        else:
            if saved is not None:
                warn_of_lost_heads(source)
            _load_trl_value_head(model, _find(source, SAFE_WEIGHTS_NAME, hub))
        return (model, info) if kwargs.get("output_loading_info") else model

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, settings: QuietStarSettings | None = None, **kwargs
    ) -> PreTrainedModel:
        """
        Builds a model with random weights.

        Args:
            config ([`~transformers.PreTrainedConfig`]):
                Of a causal LM.
            settings ([`QuietStarSettings`], *optional*):
                Defaults to those in the config, or to the defaults.
            kwargs:
                As for [`~transformers.AutoModelForCausalLM.from_config`].
        """
        _check_config(config, type(config).__name__)
        kwargs.setdefault("trust_remote_code", False)
        model = AutoModelForCausalLM.from_config(config, **kwargs)
        return attach_heads(model, settings or _settings_in(config) or QuietStarSettings())


def saved_settings(source: str, **hub) -> QuietStarSettings | None:
    """
    The settings of a saved thinking model or adapter repository; None where there are none.

    Args:
        source (`str`):
            Model id on the Hub or local directory.
        hub:
            `revision` and the like, as for `from_pretrained`.
    """
    config_file, settings_file = (_find(source, name, hub) for name in (CONFIG_NAME, SETTINGS_NAME))
    saved = None if config_file is None else _read_json(config_file).get("quietstar")
    if settings_file is not None:
        saved = _read_json(settings_file)
    return None if saved is None else QuietStarSettings.from_dict(saved, source)


def _settings_in(config: PreTrainedConfig) -> QuietStarSettings | None:
    saved = getattr(config, "quietstar", None)
    return None if saved is None else QuietStarSettings.from_dict(saved, config.name_or_path)


def warn_of_lost_heads(source: str) -> None:
    """Says that a model that learned to think begins anew."""
    logger.warning(
        "%r was saved by trl-quietstar, but %s is not there: its heads are new ones. Copy the whole folder.",
        source,
        HEADS_NAME,
    )


def _read_json(file: str) -> dict:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file!r} is damaged: it is no valid JSON ({error}). Copy it again.") from error


def _check_published(unexpected_keys: Iterable[str], source: str) -> None:
    """Refuses a checkpoint of the published Quiet-STaR code, whose heads Transformers drops."""
    found = [key for key in unexpected_keys if key.startswith(PUBLISHED_HEADS)]
    if found:
        raise ValueError(
            f"{source!r} is a checkpoint of the published Quiet-STaR code: its heads ({', '.join(sorted(found)[:3])}, …) are "
            "another kind than those of trl-quietstar and cannot be read, and without them it would think with untrained ones. "
            "To train new heads on its base weights, save these alone first: "
            f"`AutoModelForCausalLM.from_pretrained({source!r}).save_pretrained(folder)`."
        )


def _check_config(config: PreTrainedConfig, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder model (model_type {config.model_type!r}); thoughts need a causal "
            "(decoder-only) language model."
        )
    _check_reads_text(config, name)


def _check_reads_text(config: PreTrainedConfig, name: str) -> None:
    """Refuses a model that reads images or sounds too, unless Transformers knows it as a causal LM, which takes text alone."""
    is_text = config.get_text_config() is config or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_text and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(
            f"{name} (model_type {config.model_type!r}) reads more than text, and `AutoModelForCausalLM` does not load it. Thoughts "
            "need a causal language model: take a text model, such as the one inside it."
        )


def check_source(source: str) -> None:
    """Refuses a path of no folder, which would be looked for on the Hub."""
    if not Path(source).is_dir() and (source[:1] in "./~" or source.count("/") > 1):
        raise FileNotFoundError(f"There is no model folder {source!r}; give a local folder or a Hub id.")


def _find(source: str, filename: str, hub: dict) -> str | None:
    """Local path of a file of a local directory or Hub repository; None where there is no such file."""
    check_source(source)
    return find_file(source, filename, **hub)


def has_file(source: str, filename: str, hub: dict) -> bool:
    """Whether a local directory or Hub repository has a file; `hub` has `revision` and the like."""
    return _find(source, filename, hub) is not None


def _load_adapter(source, adapter_config, settings, hub, kwargs):
    heads = _find(source, HEADS_NAME, hub)
    if heads is None:
        raise FileNotFoundError(f"The adapter {source!r} has no {HEADS_NAME}: it was not saved by trl-quietstar.")
    _check_adapter(source, hub)
    settings = settings or saved_settings(source, **hub) or QuietStarSettings()
    if kwargs.pop("output_loading_info", False):
        raise ValueError(
            f"`output_loading_info=True` is for whole models, and {source!r} is an adapter; leave it out."
        )
    base_kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KWARGS}
    base_hub = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    if adapter_config.get("revision") is not None:
        base_hub["revision"] = adapter_config["revision"]
    base = QuietStarForCausalLM.from_pretrained(
        adapter_config["base_model_name_or_path"], settings=settings, **base_kwargs, **base_hub
    )
    return put_adapter(base, source, settings, **hub)


def _check_adapter(source: str, hub: dict) -> str:
    """Refuses an adapter that cannot be read; returns the file of its weights."""
    from peft import PeftConfig

    weights = _find(source, ADAPTER_SAFE_WEIGHTS_NAME, hub)
    if weights is None:
        raise FileNotFoundError(
            f"The adapter {source!r} has no {ADAPTER_SAFE_WEIGHTS_NAME}, the only form in which trl-quietstar saves one and "
            "reads it."
        )
    check_method(PeftConfig.from_pretrained(source, **hub))
    return weights


def put_adapter(model: PreTrainedModel, source: str, settings: QuietStarSettings | None = None, **hub):
    """
    Puts a saved adapter on a thinking model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Its base, with heads.
        source (`str`):
            Of the adapter: Hub id or local folder. Heads and settings that are saved there become the model's.
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

    weights, heads = _check_adapter(source, hub), _find(source, HEADS_NAME, hub)
    settings = settings or saved_settings(source, **hub)
    if heads is not None and settings is not None:
        attach_heads(model, settings)
    with heads_aside(model):
        _resize_as(model, weights)
        adapted = PeftModel.from_pretrained(model, source, is_trainable=True, **hub)  # as any model is that was loaded
    if heads is not None:
        model.load_heads(heads)
    return adapted


def _resize_as(base: PreTrainedModel, weights: str) -> None:
    """Gives a base the vocabulary that it had when an adapter was saved, with which PEFT saves its embeddings if that was not
    the base's own."""
    with safe_open(weights, framework="pt") as file:
        for table in (base.get_input_embeddings(), base.get_output_embeddings()):
            name = next(name for name, module in base.named_modules() if module is table)
            saved = [key for key in file.keys() if key.endswith((f".{name}.weight", f".{name}.base_layer.weight"))]
            rows = file.get_slice(saved[0]).get_shape()[0] if saved else len(table.weight)
            if rows != len(table.weight):
                base.resize_token_embeddings(rows, mean_resizing=False)
                return


def _load_trl_value_head(model: PreTrainedModel, weights: str | None) -> None:
    """A linear value head also starts from a checkpoint of TRL's former `AutoModelForCausalLMWithValueHead`."""
    if weights is None or model.quietstar_settings.value_head_type != "linear":
        return
    with safe_open(weights, framework="pt") as file:
        if "v_head.summary.weight" in file.keys():
            state = {name: file.get_tensor(f"v_head.summary.{name}") for name in ("weight", "bias")}
            model.quietstar.value_head.summary.load_state_dict(state)
