"""From hidden states to token statistics, without ever holding `(tokens, V)` logits.

The LM head is applied to what the backbone returns after its final norm. Families that scale or soft-cap their logits
do so here, after mixing.
"""

import math
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from ._compat import ChunkedLogProbFunction


VOCAB_CHUNK = 16_384  # columns of a tile of the fused kernel
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # what families call it
ROW_CHUNK_ELEMENTS = 2**24  # logits held at once where rows are cut instead (64 MB in float32)


@dataclass(frozen=True)
class TokenStatistics:
    """Of one target each: `logps` and `entropies` in nats, and `correct` (bool: the target is the most likely
    token)."""

    logps: torch.Tensor
    entropies: torch.Tensor
    correct: torch.Tensor


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Factor on the logits and soft-cap after it (or None), as the family's own forward applies them."""
    config = config.get_text_config()
    softcaps = (getattr(config, name, None) for name in SOFTCAPS)
    softcap = next((value for value in softcaps if value is not None), None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), softcap
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None and config.model_type != "minicpm3":  # which divides what the head reads instead
        return (divisor if config.model_type == "hyperclovax" else 1 / divisor), softcap
    return 1.0, softcap


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of shape `(rows, V)` for hidden states of shape `(rows, H)`, in at least float32."""
    scale, softcap = logit_transform(model.config)
    logits = model.get_output_embeddings()(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def row_chunk(model: PreTrainedModel) -> int:
    """How many rows of full-vocabulary logits may be held at once."""
    return max(ROW_CHUNK_ELEMENTS // model.get_output_embeddings().weight.shape[0], 1)


def token_statistics(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    temperature: float = 1.0,
) -> TokenStatistics:
    """
    Log-probability, entropy and correctness of `targets` given `hidden`; only places in `mask` are computed.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Whose LM head is used.
        hidden (`torch.Tensor` of shape `(..., H)`):
            Hidden states after the final norm.
        targets (`torch.Tensor` of shape `(...)`):
            Token ids.
        mask (`torch.Tensor` of shape `(...)`, bool):
            Elsewhere the statistics are 0.
        temperature (`float`):
            Divides the logits.

    Returns:
        [`TokenStatistics`] with tensors of shape `(...)`. Gradients flow through `logps` and `entropies`.
    """
    rows, row_targets = hidden[mask], targets[mask]
    if hidden.dtype == torch.float64:
        compact = _dense_statistics(model, rows, row_targets, temperature)
    else:
        compact = _fused_statistics(model, rows, row_targets, temperature)
    return TokenStatistics(
        *(torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in compact)
    )


def _fused_statistics(model, rows, targets, temperature):
    """TRL's kernel: tiles over the vocabulary, float32 statistics, forward and backward."""
    head = model.get_output_embeddings()
    scale, softcap = logit_transform(model.config)
    logps, entropies, _, _, correct = ChunkedLogProbFunction.apply(
        rows,
        head.weight,
        getattr(head, "bias", None),
        targets,
        temperature,
        min(VOCAB_CHUNK, head.weight.shape[0]),
        softcap,
        scale,
        ("entropy", "is_top1"),
    )
    return logps, entropies, correct


def _dense_statistics(model, rows, targets, temperature):
    """The same in float64, which the kernel does not keep: chunks of rows, recomputed in the backward."""

    def chunk(rows, targets):
        log_probs = torch.log_softmax(logits_of(model, rows) / temperature, dim=-1)
        logps = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        return logps, -(log_probs.exp() * log_probs).sum(-1), log_probs.argmax(-1) == targets

    size = row_chunk(model)
    parts = [
        checkpoint(chunk, r, t, use_reentrant=False)
        for r, t in zip(rows.split(size), targets.split(size), strict=True)
    ]
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def normalized_entropy(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """
    Entropy of the next-token distribution divided by log V, between 0 and 1.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Whose LM head is used.
        hidden (`torch.Tensor` of shape `(..., H)`):
            Hidden states after the final norm.
    """
    mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    with torch.no_grad():
        entropies = token_statistics(model, hidden, mask.long(), mask).entropies
    V = model.get_output_embeddings().weight.shape[0]
    return entropies / torch.log(torch.tensor(float(V), device=hidden.device))


def uncertainty(logits: torch.Tensor) -> torch.Tensor:
    """The same from logits of shape `(..., V)`."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1) / math.log(logits.shape[-1])
