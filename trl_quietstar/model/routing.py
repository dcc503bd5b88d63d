"""Load balancing of mixtures of experts: the router loss over the tokens of a thinking step.

The family's own forward leaves out padding by a 2D mask, which a forward over branches does not have. So the router's logits are
taken from the backbone and given to Transformers' own loss, with a mask of the tokens that count.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


@dataclass(frozen=True)
class Routing:
    """
    Where a forward's tokens were sent.

    Parameters:
        logits (`tuple` of `torch.Tensor` of shape `(tokens, experts)`):
            The router's, of each layer that has one.
        mask (`torch.Tensor` of shape `(tokens,)`, bool):
            Tokens that count.
    """

    logits: tuple[torch.Tensor, ...]
    mask: torch.Tensor


def has_router_loss(config: PreTrainedConfig) -> bool:
    """Whether the model is a mixture of experts whose configuration asks for its router logits."""
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def use_router_loss(config: PreTrainedConfig, coefficient: float | None) -> float:
    """
    Switches the router loss on or off in the model's configuration, as TRL's trainers do.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's configuration, changed in place.
        coefficient (`float`, *optional*):
            Its weight. Defaults to the configuration's own.

    Returns:
        `float`: the weight; 0 for a model without router loss.

    Raises:
        `ValueError`: if a weight is given for a model that has no router loss.
    """
    config = config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if coefficient:
            raise ValueError(
                f"`router_aux_loss_coef` is {coefficient}, but {config.model_type!r} is no mixture of experts that "
                "returns its router logits; leave it out."
            )
        return 0.0
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
    config.output_router_logits = coefficient > 0
    config.router_aux_loss_coef = coefficient
    return coefficient


@contextmanager
def recorded_routing(model: PreTrainedModel) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """
    Records the router logits of this thread's forwards.

    Yields:
        `list`: for each forward in the block the logits of each layer, `(tokens, experts)`; empty without a router loss.
    """
    calls: list[tuple[torch.Tensor, ...]] = []
    if not has_router_loss(model.config):
        yield calls
        return

    thread = threading.get_ident()  # others may run the same model

    def ask(module, args, kwargs):
        return args, {**kwargs, "output_router_logits": True} if threading.get_ident() == thread else kwargs

    def take(module, args, output):
        # a family of experts may be configured without any
        if threading.get_ident() == thread and output.router_logits:
            calls.append(output.router_logits)

    handles = [
        model.base_model.register_forward_pre_hook(ask, with_kwargs=True),
        model.base_model.register_forward_hook(take),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def router_loss(config: PreTrainedConfig, routings: list[Routing]) -> torch.Tensor | None:
    """
    Load-balancing loss over the tokens of several forwards together (huggingface.co/papers/2101.03961, eq. 4 to 6).

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's configuration.
        routings (`list` of [`Routing`]):
            What [`recorded_routing`] gave of each forward; empty without a router loss.

    Returns:
        `torch.Tensor`: a scalar, or None without a router loss.
    """
    if not routings:
        return None
    logits = tuple(torch.cat(layer) for layer in zip(*(routing.logits for routing in routings), strict=True))
    mask = torch.cat([routing.mask for routing in routings])
    top_k = config.get_text_config().num_experts_per_tok
    return load_balancing_loss_func(logits, logits[0].shape[-1], top_k, mask)  # type: ignore[arg-type,return-value]  # typed for a tuple of tensors or None
