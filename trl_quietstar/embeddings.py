"""Input embeddings: of tokens, and of the learned vectors that are no tokens.

Gemma 3n and 4 look up a second embedding of every token, which each layer reads beside the hidden states, and which the
first one does not tell. Here it rides behind the first in one vector, so that nothing else needs to know.
"""

import torch
from torch import nn
from transformers import PreTrainedModel


def embed_tokens(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """
    What a path runs through the model for tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
        token_ids (`torch.Tensor` of shape `(...)`):
            Token ids.

    Returns:
        `torch.Tensor` of shape `(..., E)`: E is the embedding size, and more where the family embeds by layer.
    """
    embeds = model.get_input_embeddings()(token_ids)
    if _layer_size(model) == 0:
        return embeds
    by_layer = model.get_decoder().get_per_layer_inputs(token_ids.flatten()[None]).flatten(2)
    return torch.cat([embeds, by_layer.view(*token_ids.shape, by_layer.shape[2]).to(embeds.dtype)], dim=-1)


def embed_vector(model: PreTrainedModel, vector: torch.Tensor) -> torch.Tensor:
    """The same for a learned vector of the embedding size, which has nothing for single layers: shape `(E,)`."""
    layers = model.config.get_text_config().num_hidden_layers
    return nn.functional.pad(vector.to(model.dtype), (0, layers * _layer_size(model)))


def embedding_inputs(model: PreTrainedModel, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward for embeddings of shape `(B, T, E)`."""
    size = _layer_size(model)
    if size == 0:
        return {"inputs_embeds": embeds}
    width = model.get_input_embeddings().weight.shape[1]
    return {"inputs_embeds": embeds[..., :width], "per_layer_inputs": embeds[..., width:].unflatten(-1, (-1, size))}


def _layer_size(model: PreTrainedModel) -> int:
    """Width of what each layer reads of a token; 0 for most families."""
    return getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None) or 0
