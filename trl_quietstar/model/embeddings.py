"""Input embeddings: of tokens, and of the learned vectors that are no tokens.

Gemma 3n and 4 look up a second embedding of every token, which each layer reads beside the hidden states. The first embedding
does not determine the second. Here both stand in one vector, one behind the other, so that no other module needs to know.
"""

import functools
import inspect
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .sharding import module_is_sharded


def embed_tokens(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """
    Embeddings of tokens, as [`embedding_inputs`] takes them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
        token_ids (`torch.Tensor` of shape `(...)`):
            Token ids.

    Returns:
        `torch.Tensor` of shape `(..., E)`: E is the embedding size, or larger if the family embeds by layer.
    """
    embeds = model.get_input_embeddings()(token_ids)
    if _layer_size(model) == 0:
        return embeds
    look_up = model.get_decoder().get_per_layer_inputs
    by_layer = look_up(token_ids.flatten()[None], *[None] * _others(look_up.__func__)).flatten(2)
    return torch.cat([embeds, by_layer.view(*token_ids.shape, by_layer.shape[2]).to(embeds.dtype)], dim=-1)


@functools.cache
def _others(look_up: Callable) -> int:
    """How many arguments a look-up by layer has beside the tokens: Transformers 5.19 wants Gemma 4's embeddings, or None."""
    return len(inspect.signature(look_up).parameters) - 2


def mean_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, string: str) -> torch.Tensor:
    """
    Mean input embedding of a string's tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        string (`str`):
            The string.

    Returns:
        `torch.Tensor` of shape `(E,)`.

    Raises:
        `ValueError`: if the string has no tokens, or one that the model does not know.
    """
    ids = string_ids(tokenizer, string, model.config.get_text_config().vocab_size)
    table = model.get_input_embeddings()
    return table(torch.tensor(ids, device=next(table.parameters()).device)).mean(0)


def string_ids(tokenizer: PreTrainedTokenizerBase, string: str, vocab_size: int) -> list[int]:
    """
    Token ids of a string, without special tokens around it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        string (`str`):
            The string.
        vocab_size (`int`):
            V, to which all ids must belong.

    Raises:
        `ValueError`: if the string has no tokens, or one that the model does not know.
    """
    ids = tokenizer(string, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"The tokenizer gives no tokens for {string!r}; choose another start, end or prompt of thoughts."
        )
    if max(ids) >= vocab_size:
        raise ValueError(
            f"The tokenizer gives the id {max(ids)} for {string!r}, and the model's vocabulary has {vocab_size}; take the "
            "model's own tokenizer, or resize its embeddings."
        )
    return ids


def weight_of(table: nn.Module) -> torch.Tensor:
    """The weight of an embedding table or of an LM head, `(V, width)`."""
    return cast(torch.Tensor, table.weight)


class LookupTape:
    """
    Embeds tokens that become known one after another in one graph.

    The backward of a lookup makes a gradient of the table's size. Here the lookups of a graph note their gradients, and the first
    of them, whose backward comes last, makes the table's gradient once for all.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        table = model.get_input_embeddings()
        self.weights = [p for p in table.parameters() if p.requires_grad and not module_is_sharded(table)]
        self.first: torch.Tensor | None = None  # later lookups depend on it, so that its backward comes last
        self.noted: list[tuple[torch.Tensor, torch.Tensor]] = []  # ids, and the gradient of their embeddings

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of token ids, as [`embed_tokens`] gives them."""
        if not self.weights or not torch.is_grad_enabled() or _layer_size(self.model) > 0:
            return embed_tokens(self.model, token_ids)
        with torch.no_grad():
            embeds = embed_tokens(self.model, token_ids)
        # the graph knows embeddings and a tie between lookups, but not the table, except at the first
        if self.first is not None:
            return _LaterLookup.apply(self, token_ids, embeds, self.first)
        embeds, self.first = _FirstLookup.apply(self, token_ids, embeds, *self.weights)
        return embeds

    def gradients(self) -> tuple[torch.Tensor, ...]:
        """Gradients of the table's weights, from all that was noted."""
        ids, grads = zip(*((ids.flatten(), grad.flatten(0, -2)) for ids, grad in self.noted), strict=True)
        self.noted.clear()
        # one lookup of all ids, whose backward is the table's gradient
        with torch.enable_grad():
            embeds = embed_tokens(self.model, torch.cat(ids))
        return torch.autograd.grad(embeds, self.weights, torch.cat(grads))


class _FirstLookup(torch.autograd.Function):
    """Embeddings, and a zero that later lookups take as an input."""

    @staticmethod
    def forward(ctx, tape, token_ids, embeds, *weights):
        ctx.tape, ctx.token_ids = tape, token_ids
        return embeds.view_as(embeds), embeds.new_zeros(())

    @staticmethod
    def backward(ctx, grad, _):
        ctx.tape.noted.append((ctx.token_ids, grad))
        return None, None, None, *ctx.tape.gradients()


class _LaterLookup(torch.autograd.Function):
    """Embeddings; the backward only notes their gradient."""

    @staticmethod
    def forward(ctx, tape, token_ids, embeds, first):
        ctx.tape, ctx.token_ids = tape, token_ids
        return embeds.view_as(embeds)

    @staticmethod
    def backward(ctx, grad):
        ctx.tape.noted.append((ctx.token_ids, grad))
        return None, None, None, grad.new_zeros(())


def embed_vector(model: PreTrainedModel, vector: torch.Tensor) -> torch.Tensor:
    """A learned vector of the embedding size in the form of [`embed_tokens`], `(E,)`, with zeros for single layers."""
    layers = model.config.get_text_config().num_hidden_layers
    return nn.functional.pad(vector.to(model.dtype), (0, layers * _layer_size(model)))


def embedding_inputs(model: PreTrainedModel, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward for embeddings of shape `(B, T, E)`."""
    size = _layer_size(model)
    if size == 0:
        return {"inputs_embeds": embeds}
    width = weight_of(model.get_input_embeddings()).shape[1]
    return {"inputs_embeds": embeds[..., :width], "per_layer_inputs": embeds[..., width:].unflatten(-1, (-1, size))}


def _layer_size(model: PreTrainedModel) -> int:
    """Width of what each layer reads of a token; 0 for most families."""
    return getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None) or 0
