"""How branches come to a model's attention, by Transformers' `AttentionInterface`.

[`enable`] gives a model an attention that does what the family's own did, until a forward brings a reading
([`attention.TextReading`], [`attention.BranchReading`]). That works in every family that dispatches its attention through that interface.
"""

import logging
import sys
from collections.abc import Callable

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .._compat import attention_of, can_set_attention, takes_sdpa


logger = logging.getLogger(__name__)

PREFIX = "quietstar_"  # of the implementation's name, before the one it stands in for
EAGER = "eager_attention_forward"  # which each family has of its own
OWN_MASKS = ("flash", "flex", "paged")  # implementations named so take their masks in forms of their own


def enable(model: PreTrainedModel) -> bool:
    """
    Lets the model's attention take branches; a forward without any computes what it did.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM, changed in place.

    Returns:
        `bool`: whether its family can.
    """
    current = before = attention_of(model)
    if current is None:
        return False
    if current.startswith(PREFIX):
        return True
    if any(kind in current for kind in OWN_MASKS):
        current = "sdpa" if takes_sdpa(model) else "eager"
        logger.warning(
            "The model attends by `%s` instead of `%s`, which takes no masks that let thoughts share a text. On a GPU, "
            "`sdpa` has the same kernels for the text itself.",
            *(current, before),
        )
    name = PREFIX + current
    if name not in AttentionInterface():
        AttentionInterface.register(name, _attention_in_place_of(current))
        if current in AttentionMaskInterface():
            AttentionMaskInterface.register(name, AttentionMaskInterface()[current])
    if not can_set_attention(model):
        return False
    model.set_attn_implementation(name)
    vars(model)["attention_before_branches"] = before
    return attention_of(model) == name


def disable(model: PreTrainedModel) -> None:
    """Takes [`enable`] back."""
    current = attention_of(model)
    if current is not None and current.startswith(PREFIX):
        # a model made from another's config has that one's attention
        model.set_attn_implementation(vars(model).get("attention_before_branches", current.removeprefix(PREFIX)))


def _attention_in_place_of(name: str) -> Callable:
    """An attention function that attends as `name` does, unless a reading says otherwise."""

    def attention(module, query, key, value, attention_mask, quietstar_reading=None, **kwargs):
        files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
        eager = next((vars(file)[EAGER] for file in files if EAGER in vars(file)), None)
        own = AttentionInterface().get_interface(name, eager)
        if quietstar_reading is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        return quietstar_reading(own, module, query, key, value, attention_mask, **kwargs)

    return attention
