"""Attention masks in the form that a family's own forward takes."""

import torch
from transformers import PreTrainedConfig


LOCAL = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}  # names of their sizes


def additive_masks(
    config: PreTrainedConfig,
    allowed: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    The mask in the form the family's forward takes: one float tensor of shape `(B, 1, Q, K)`, or one for each layer
    type. Sliding windows and chunks are cut by true position, since a branch's slots lie far from the text they continue.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's configuration.
        allowed (`torch.Tensor` of shape `(B, Q, K)`, bool):
            Who sees whom, windows aside.
        query_positions, key_positions (`torch.Tensor` of shape `(B, Q)` and `(B, K)`):
            Position ids.
        dtype (`torch.dtype`):
            Of the embeddings; a bool mask would be silently misread by eager attention.
    """
    config = config.get_text_config()
    queries, keys = query_positions[:, :, None], key_positions[:, None, :]
    local = {}
    if (window := getattr(config, "sliding_window", None)) is not None:
        local["sliding_attention"] = queries - keys < window
    if (chunk := getattr(config, "attention_chunk_size", None)) is not None:
        local["chunked_attention"] = queries // chunk == keys // chunk
    masks = {kind: _additive(allowed & seen, dtype) for kind, seen in local.items()}
    return in_mask_form(config, _additive(allowed, dtype), masks)


def in_mask_form(
    config: PreTrainedConfig, full: torch.Tensor, local: dict[str, torch.Tensor]
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    Masks as the family's forward takes them.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's configuration.
        full (`torch.Tensor` of shape `(B, 1, Q, K)`):
            The mask of layers that see all.
        local (`dict`):
            By layer type, the masks of layers with a window or with chunks, each of shape `(B, 1, Q, K)`.
    """
    layer_types = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if not layer_types and "sliding_attention" in local:
        return local["sliding_attention"]
    masks = {kind: mask for kind, mask in local.items() if kind in layer_types}
    return {"full_attention": full} | masks if masks else full


def local_layer_types(config: PreTrainedConfig) -> list[str]:
    """Which of the model's layer types do not see all of a text."""
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    return [kind for kind, size in LOCAL.items() if kind in layer_types and getattr(config, size, None) is not None]


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
