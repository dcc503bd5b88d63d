"""`QuietStarForCausalLM`: any causal LM of Transformers, with heads for thinking.

The model is the family's own class with a mixin (`QuietStarLlamaForCausalLM`, …), never a wrapper: base weights keep
their names, so plain loading, adapters, merging and serving keep working. What it is on disk stands in `model/saved.py`.
"""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_NAME

from ._compat import keep_attention_cap, set_unsaved_keys
from .config import CHOICES, LIMITS
from .model.adapters import base_of, check_heads, check_saved_adapter, put_adapter
from .model.concurrency import LOCK, eval_mode
from .model.embeddings import mean_embedding
from .model.heads import check_suppressed, give_heads
from .model.published import check_published
from .model.saved import (
    HEADS_NAME,
    HUB_KWARGS,
    as_path,
    check_apart,
    commit_of,
    file_of,
    hub_of_base,
    load_trl_value_head,
    read_config,
    read_heads,
    read_json,
    save_beside_weights,
    saved_settings,
    settings_in,
    warn_of_lost_heads,
    write_heads,
)
from .model.sharding import load_full
from .model.supported import check_causal_lm, check_config
from .rules import check_settings
from .settings import OF_HEADS, QuietStarSettings
from .thinking.arguments import check_ids, check_masks, check_options, check_tokenizer, take_stop_strings
from .thinking.generation import think_and_speak
from .thinking.known import Known
from .thinking.likelihood import log_likelihoods
from .thinking.when import Thinking


if TYPE_CHECKING:
    from peft import PeftModel

    from .model.heads import ThinkingModel as FamilyModel
else:
    FamilyModel = object  # at run time the mixin stands before each family's own class


class QuietStarMixin(Known, FamilyModel):
    """What a model class gains: the submodule `quietstar`, scoring in its forward, and a checkpoint that others read
    as the plain base model."""

    _loaded_by: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        settings = settings_in(config)
        if settings is not None:  # made by its class, as TRL's `BEMACallback` copies a model
            attach_heads(self, settings)

    def __reduce__(self):
        """Pickles name the family's class, since this one is made at run time."""
        return _empty, (self._plain_class,), vars(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args, **kwargs):  # type: ignore[override]  # typed by its parent for any of its arguments
        """As [`QuietStarForCausalLM.from_pretrained`]."""
        return QuietStarForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def quietstar_thinking(self) -> Thinking:
        """When the model thinks unless it is told otherwise: as it was trained."""
        return Thinking.of(self.quietstar_settings)

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
                Gets the tokens of each thought, before `streamer` gets the text that it served. It ends once, with the text.

        Returns:
            `torch.Tensor` of shape `(B, T + new)`, or an output class as with `return_dict_in_generate`.

        Raises:
            `TypeError`: if an argument is of another kind.
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
        check_options(self, options, thought_streamer)
        tokenizer = options.pop("tokenizer", None)
        take_stop_strings(options, self.generation_config, tokenizer)
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

    def init_continuous_batching(self, *args, **kwargs):
        """Transformers' continuous batching, of a model that never thinks; its loop would leave out all thoughts without a word."""
        if self.quietstar_thinking.mode != "never":
            raise ValueError(
                f"Continuous batching (`generate_batch`) writes without thoughts, and this model thinks {self.quietstar_thinking}; "
                "call `generate` with a padded batch, or load the plain model by `AutoModelForCausalLM.from_pretrained`."
            )
        return super().init_continuous_batching(*args, **kwargs)

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
            `TypeError`: if an argument is of another kind.
            `ValueError`: if a value is outside its limits, or a shape is another one.
        """
        check_tokenizer(tokenizer)
        check_ids(input_ids, self.config.get_text_config().vocab_size)
        check_masks(input_ids, attention_mask=attention_mask, score_mask=score_mask)
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
            `TypeError`: if the tokenizer is none.
            `ValueError`: if a string has no tokens, or one that the model does not know.
        """
        check_tokenizer(tokenizer, is_needed=True)
        for string, embedding in ((start, self.quietstar.start_embedding), (end, self.quietstar.end_embedding)):
            if not only_fresh or self.quietstar.is_fresh(embedding):
                with torch.no_grad():
                    embedding.copy_(mean_embedding(self, tokenizer, string))
        self.quietstar.fresh_embedding = None

    @property
    def fresh_thought_embeddings(self) -> bool:
        """Whether a start or end embedding is still to be set: by a tokenizer, a file, or hand."""
        return any(self.quietstar.is_fresh(x) for x in (self.quietstar.start_embedding, self.quietstar.end_embedding))

    def adopt_settings(self, settings: QuietStarSettings, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """
        Takes over lengths and prediction for what follows.

        Args:
            settings ([`QuietStarSettings`]):
                The new settings.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                Says which tokens the strings around a thought are. Defaults to the one beside the model, when it is needed.

        Raises:
            `TypeError`: if they are of another class, or the tokenizer is none.
            `ValueError`: if they ask for other heads than the model has, or suppress a token that it does not have.
        """
        check_settings(settings, LIMITS, CHOICES)
        check_tokenizer(tokenizer)
        for name in OF_HEADS:
            own, wanted = getattr(self.quietstar_settings, name), getattr(settings, name)
            if own != wanted:
                raise ValueError(f"The model's heads have `{name}` {own!r}, not {wanted!r}; set `{name}={own!r}`.")
        check_suppressed(self, settings)
        self.config.quietstar = settings.to_dict()
        vars(self).pop("_thought_marks", None)
        if tokenizer is not None:
            self.thought_tokenizer(tokenizer)

    def save_heads(self, save_directory: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes `quietstar.safetensors`, as [`~model.saved.write_heads`]."""
        write_heads(self.quietstar, save_directory, state_dict)

    def load_heads(self, path: str | Path) -> None:
        """Reads the heads from a `quietstar.safetensors`, as [`~model.saved.read_heads`]."""
        load_full(self.quietstar, read_heads(self.quietstar, path))
        self.quietstar.fresh_embedding = None

    def save_pretrained(  # type: ignore[override]  # other arguments pass through
        self,
        save_directory: str,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Saves the base model in its family's own format, and the heads and what generates with them beside it."""
        repo_id = kwargs.pop("repo_id", Path(as_path("save_directory", save_directory)).name)
        set_unsaved_keys(self, [name for name in self.state_dict() if name.startswith("quietstar.")])
        own = None if state_dict is None else dict(state_dict)  # Transformers takes out what is not to be saved
        super().save_pretrained(save_directory, is_main_process, own, **kwargs)
        if is_main_process:
            save_beside_weights(self, save_directory, state_dict)
        if push_to_hub:  # not by Transformers, which would upload before the heads are there
            known = inspect.signature(PreTrainedModel.push_to_hub).parameters
            self.push_to_hub(repo_id, **{name: value for name, value in kwargs.items() if name in known})


@functools.cache
def quietstar_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The family's class with the mixin, made once for each family."""
    members = {"forward": _thinking_forward(base.forward), "_plain_class": base}
    return type(f"QuietStar{base.__name__}", (QuietStarMixin, base), members)


def _empty(base: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of the family's thinking class, which a pickle or a copy fills."""
    kind = quietstar_class(base)  # type: ignore[arg-type]  # classes hash
    return kind.__new__(kind)


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
    keep_attention_cap(model)
    if not isinstance(model, QuietStarMixin):
        model.__class__ = quietstar_class(type(model))  # type: ignore[arg-type]  # classes hash
        own = vars(model).get("forward")
        if own is not None:  # set on the object by TRL's `SFTTrainer` or Accelerate's hooks, it would hide the class's
            plain = functools.wraps(own)(lambda self, *args, **kwargs: own(*args, **kwargs))
            model.forward = types.MethodType(_thinking_forward(plain), model)
    give_heads(model, settings)
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
        source = str(model.config.name_or_path)
        hub = {} if Path(source).is_dir() else {"revision": commit_of(model)}
        settings, heads = settings_in(model.config), file_of(source, HEADS_NAME, hub)
        if settings is None or heads is None:
            raise FileNotFoundError(f"{source!r} has no {HEADS_NAME}: it was not saved by trl-quietstar.")
        attach_heads(model, settings)
        model.load_heads(heads)  # type: ignore[operator]  # an attribute of a module
        return model


def check_thinker(model: PreTrainedModel) -> None:
    """Refuses a model that has no heads to think with."""
    if not isinstance(base_of(model), QuietStarMixin):
        raise ValueError(
            f"The model is a {type(model).__name__}, without heads; load it with `QuietStarForCausalLM.from_pretrained`."
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
            `TypeError`: for `custom_generate`, which is an argument of `generate`, and for settings of another class.
            `ValueError`: if it is not a causal LM, its settings cannot be read, saved heads do not fit, or heads of the published
                Quiet-STaR code are among its weights.
        """
        check_settings(settings, LIMITS, CHOICES)
        source = as_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        if "custom_generate" in kwargs:
            raise TypeError(
                "`custom_generate` is an argument of `generate`, not of `from_pretrained`; leave it out here."
            )
        kwargs.setdefault("trust_remote_code", False)  # unset, Transformers would ask on a terminal
        hub = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        adapter = file_of(source, ADAPTER_CONFIG_NAME, hub)
        if adapter is not None:
            return _load_adapter(source, read_json(adapter), settings, hub, kwargs)  # type: ignore[return-value]  # a thinking class is made at run time
        config = read_config(source, kwargs, hub)
        check_config(config, source)
        heads = file_of(source, HEADS_NAME, hub)
        if heads is not None:
            if kwargs.get("use_safetensors") is False:
                raise ValueError(
                    "`use_safetensors=False`: thinking models are read from safetensors only; leave it out."
                )
            kwargs["use_safetensors"] = True
        saved = settings_in(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **{**kwargs, "output_loading_info": True})
        model, info = loaded
        check_published(info["unexpected_keys"], source)
        attach_heads(model, settings or saved or QuietStarSettings())
        model._loaded_by = hub
        if heads is not None:
            model.load_heads(heads)
        else:
            if saved is not None:
                warn_of_lost_heads(source)
            load_trl_value_head(model.quietstar, file_of(source, SAFE_WEIGHTS_NAME, hub))
        # as an Auto class returns, whose hints do not say it either
        return (model, info) if kwargs.get("output_loading_info") else model  # type: ignore[return-value]  # a thinking class is made at run time

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

        Raises:
            `TypeError`: for a configuration or settings of another class.
        """
        check_settings(settings, LIMITS, CHOICES)
        check_config(config, type(config).__name__)
        kwargs.setdefault("trust_remote_code", False)
        model = AutoModelForCausalLM.from_config(config, **kwargs)
        return attach_heads(model, settings or settings_in(config) or QuietStarSettings())


def _load_adapter(
    source: str, config: dict, settings: QuietStarSettings | None, hub: dict, kwargs: dict
) -> "PeftModel":
    """The base of an adapter repository with its adapter, heads and settings. `config` is the adapter's, and `kwargs` are those of
    `from_pretrained`, `hub` among them."""
    base_hub = hub_of_base(config, hub)
    check_heads(source, config["base_model_name_or_path"], hub, base_hub)
    check_apart(source, config["base_model_name_or_path"])
    check_saved_adapter(source, hub)
    settings = settings or saved_settings(source, **hub) or QuietStarSettings()
    if kwargs.pop("output_loading_info", False):
        raise ValueError(
            f"`output_loading_info=True` is for whole models, and {source!r} is an adapter; leave it out."
        )
    base_kwargs = {name: value for name, value in kwargs.items() if name not in HUB_KWARGS}
    base = QuietStarForCausalLM.from_pretrained(
        config["base_model_name_or_path"], settings=settings, **base_kwargs, **base_hub
    )
    return put_adapter(base, source, settings, **hub)
