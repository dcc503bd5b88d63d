"""Checkpoints of the published Quiet-STaR code (https://github.com/ezelikman/quiet-star), taken apart into base and heads.

That code is a patch of Transformers' Mistral. In a checkpoint its heads stand beside the base's weights, in the same files:

- `start_embedding`, `end_embedding`, of shape `(2, H)`: a hundredth of the embedding, and the logarithm of a deviation, which has
  no effect;
- `talk_head.0`: the mixing head.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, MistralConfig, MistralForCausalLM

from .heads import PublishedMixingHead
from .saved import check_source


HEADS = ("talk_head.", "start_embedding", "end_embedding")  # how the names of the heads' weights begin
EMBEDDING_SCALE = 100  # `embedding_scale`
THOUGHT_TOKENS = ("<|startthought|>", "<|endthought|>")  # whose embeddings are not read
FORWARDS_ASIDE = (
    3  # of the `n_ahead` forwards: those of the text, of the start and of the last token draw no thought token
)
# what its configuration adds to Mistral's
OPTIONS = (
    *("max_thoughts", "merged_talk_heads", "merged_lm_and_talk_heads", "merged_lm_and_think_heads"),
    *("use_concat_talk_head", "use_shallow_think", "use_shallow_talk", "use_complex_think_head"),
    *("use_complex_talk_head", "use_weighted_talk_head"),
)


def check_published(unexpected_keys: Iterable[str], source: str) -> None:
    """
    Refuses a checkpoint of the published code, whose heads Transformers drops.

    Raises:
        `ValueError`: if its heads are among the weights that the plain model has no place for.
    """
    found = sorted(key for key in unexpected_keys if key.startswith(HEADS))
    if found:
        raise ValueError(
            f"{source!r} is a checkpoint of the published Quiet-STaR code: its heads ({', '.join(found[:3])}, …) are not where "
            "trl-quietstar keeps its own, and without them it would think with untrained ones. Convert it first: "
            f"`trl-quietstar convert {source} OUTPUT --n_ahead 8`, or whatever its `n_ahead` was. To train new heads on its base "
            f"weights, save these alone: `AutoModelForCausalLM.from_pretrained({source!r}).save_pretrained(folder)`."
        )


def published_config(source: str, **hub: Any) -> MistralConfig:
    """
    The configuration of a checkpoint.

    Args:
        source (`str`):
            Local directory or id on the Hub.
        hub:
            `revision` and the like, as for `from_pretrained`.

    Raises:
        `FileNotFoundError`: if there is no such folder.
        `ValueError`: if it is of another family than the code patches.
    """
    check_source(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
    if not isinstance(config, MistralConfig):
        raise ValueError(
            f"{source!r} is a {config.model_type!r} model, and the published Quiet-STaR code is a patch of Mistral: there is "
            "nothing to convert."
        )
    return config


class PublishedModel(MistralForCausalLM):
    """The weights of a checkpoint, under their names in it."""

    def __init__(self, config: MistralConfig):
        super().__init__(config)
        self.start_embedding = nn.Parameter(torch.zeros(2, config.hidden_size))
        self.end_embedding = nn.Parameter(torch.zeros(2, config.hidden_size))
        self.talk_head = nn.ModuleList([PublishedMixingHead(config.hidden_size)])

    @classmethod
    def load(cls, source: str, **hub: Any) -> "PublishedModel":
        """
        Reads a checkpoint, in the dtype that it was saved in.

        Args:
            source, hub:
                As for [`published_config`].

        Raises:
            `ValueError`: if it has no such heads, or heads of another kind.
        """
        loaded: Any = cls.from_pretrained(
            source, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **hub
        )
        model, info = loaded
        mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
        unread = {key for key in info["unexpected_keys"] if key.startswith(HEADS)}
        wrong = sorted({*info["missing_keys"], *mismatched, *unread})
        if wrong:
            raise ValueError(
                f"{source!r} is no checkpoint that the published Quiet-STaR code trains by its own script: {', '.join(wrong[:4])} "
                "are missing, of another shape or too many. Only its `use_complex_talk_head`, `use_weighted_talk_head` and "
                "`use_concat_talk_head` together can be converted."
            )
        return model

    def take_apart(self) -> tuple[MistralForCausalLM, dict[str, torch.Tensor]]:
        """Becomes the plain model, in place. Returns it, and the start and end embeddings, of shape `(H,)` each, and the mixing
        head's weights, under trl-quietstar's names for them."""
        heads = {
            "start_embedding": EMBEDDING_SCALE * _exact(self.start_embedding[0]),
            "end_embedding": EMBEDDING_SCALE * _exact(self.end_embedding[0]),
            **{f"mixing_head.{name}": _exact(value) for name, value in self.talk_head[0].state_dict().items()},
        }
        del self.start_embedding, self.end_embedding, self.talk_head
        for name in OPTIONS:
            vars(self.config).pop(name, None)
        self.__class__ = MistralForCausalLM  # type: ignore[assignment]  # the family's own class again
        return self, heads


def _exact(weight: torch.Tensor) -> torch.Tensor:
    """A weight in at least float32, which heads are kept in."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
