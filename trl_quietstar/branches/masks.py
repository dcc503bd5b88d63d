"""Attention masks: who may see whom, and the form that a family's own forward takes it in."""

import torch
from transformers import PreTrainedConfig

from ..text.batch import Text, gather


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
    queries, keys = query_positions[:, :, None], key_positions[:, None, :]  # against each other: (B, Q, K)
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
    # families of one layer type take its mask alone; those of several take a mask for each, by name
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
    # the least finite number, not -inf: a row that sees nothing (padding) would become NaN
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def text_attention(text: Text) -> torch.Tensor:
    """Bool mask of shape `(B, T, T)`: causal, within the document. Padding sees itself, so no row is empty."""
    T = text.input_ids.shape[1]
    same = text.document_ids[:, :, None] == text.document_ids[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=same.device).tril()
    allowed = same & causal & text.attention_mask[:, None, :]
    return allowed | torch.eye(T, dtype=torch.bool, device=same.device)


def prefix_attention(text: Text, anchors: torch.Tensor) -> torch.Tensor:
    """Bool mask of shape `(B, N, T)`: a branch sees its own document up to its anchor."""
    index = torch.arange(text.input_ids.shape[1], device=anchors.device)
    own = gather(text.document_ids, anchors)[..., None]
    return (index <= anchors[..., None]) & (text.document_ids[:, None] == own) & text.attention_mask[:, None]


def packed_attention(text: Text, anchors: torch.Tensor, slot_mask: torch.Tensor) -> torch.Tensor:
    """
    Bool mask of shape `(B, T + N·S, T + N·S)` for `[text | branches]` in one pass: text sees text, a branch sees the
    text up to its anchor and its own earlier slots, nothing else.
    """
    B, N, S = slot_mask.shape
    T = text.input_ids.shape[1]
    allowed = torch.zeros(B, T + N * S, T + N * S, dtype=torch.bool, device=slot_mask.device)
    allowed[:, :T, :T] = text_attention(text)
    allowed[:, T:, :T] = prefix_attention(text, anchors).repeat_interleave(S, dim=1)
    causal = torch.ones(S, S, dtype=torch.bool, device=slot_mask.device).tril()
    own = causal & slot_mask[:, :, None, :] | torch.eye(S, dtype=torch.bool, device=slot_mask.device)
    blocks = allowed[:, T:, T:].unflatten(2, (N, S)).unflatten(1, (N, S))
    blocks.diagonal(dim1=1, dim2=3).copy_(own.permute(0, 2, 3, 1))
    return allowed
