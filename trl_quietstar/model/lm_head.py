"""From hidden states to token statistics, without ever holding `(tokens, V)` logits.

The LM head is applied to what the backbone returns after its final norm. Families that scale or soft-cap their logits
do so here, after mixing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..text.transfer import to_device
from .family import cap_, cap_slope, logit_transform, times_
from .tiles import (
    Head,
    HeadGradients,
    OnlineSoftmax,
    RowGradient,
    Targets,
    Tiles,
    raw_logits,
    suppress_,
    tile_elements,
)


@dataclass(frozen=True)
class Prediction:
    """Of one target each: `logps` in nats, and `correct` (bool: the target is the most likely token)."""

    logps: torch.Tensor
    correct: torch.Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Of one target each: `logps` and `entropies` in nats, and `correct` (bool: the target is the most likely
    token)."""

    logps: torch.Tensor
    entropies: torch.Tensor
    correct: torch.Tensor

    @property
    def prediction(self) -> Prediction:
        """Without the entropies."""
        return Prediction(self.logps, self.correct)


@dataclass(frozen=True)
class Drawn:
    """Tokens, and of each its log-probability, the entropy it was drawn at, and the logarithm of the sum of exponentials
    of all logits, in nats."""

    token_ids: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor
    log_z: torch.Tensor


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of shape `(rows, V)` for hidden states of shape `(rows, H)`, in at least float32."""
    scale, softcap = logit_transform(model.config)
    logits = model.get_output_embeddings()(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logits_by_rows(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """
    Logits of hidden states, without gradient, as many rows at a time as may be held.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Whose LM head is used.
        hidden (`torch.Tensor` of shape `(rows, H)`):
            Hidden states after the final norm.

    Yields:
        `tuple`: a slice of the rows, and their logits, which may be written to and which the next ones overwrite.
    """
    head, dtype = _head(model), _compute_dtype(hidden)
    V = len(head.weight)
    size = max(tile_elements(hidden.device) // V, 1)
    # tokens are drawn one after another, and each would cast the weight anew: autocast keeps its copy
    casts = torch.is_autocast_enabled(hidden.device.type) and dtype != head.weight.dtype
    tiles = None if casts else Tiles(head, dtype, min(size, len(hidden)))
    hidden = hidden.to(dtype)
    for start in range(0, max(len(hidden), 1), size):
        rows = slice(start, min(start + size, len(hidden)))
        if tiles is None:
            product = nn.functional.linear(hidden[rows], head.weight)
            logits = raw_logits(product, head.bias, head.scale, "logits")
        else:
            logits = tiles.raw(hidden[rows], slice(0, V), "logits")
        yield rows, cap_(logits, head.softcap)


def token_statistics(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    temperature: float = 1.0,
    known: Drawn | None = None,
    suppressed: tuple[int, ...] = (),
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
            Elsewhere the statistics are 0. Best in the host's memory.
        temperature (`float`):
            Divides the logits.
        known ([`Drawn`], *optional*):
            The statistics, of shape `(...)`, where the targets were drawn from these very hidden states.
        suppressed (`tuple[int, ...]`):
            Ids of tokens that have no probability.

    Returns:
        [`TokenStatistics`] with tensors of shape `(...)`. Gradients flow through `logps` and `entropies`.
    """
    places = _places(mask, hidden.device)
    chosen = None if known is None else Drawn(*(getattr(known, field.name)[places] for field in fields(Drawn)))
    found = _Statistics.apply(hidden[places], targets[places], *_head(model), temperature, chosen, suppressed)
    return TokenStatistics(*(_spread(x, places, mask.shape) for x in found))


def prediction_statistics(
    model: PreTrainedModel,
    text_hidden: torch.Tensor,
    text_targets: torch.Tensor,
    text_mask: torch.Tensor,
    read: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[Prediction, Prediction, torch.Tensor]:
    """
    What a text's own hidden states predict, and what they predict mixed with others, from one set of logits: mixing
    hidden states before the LM head equals mixing its logits.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Whose LM head is used.
        text_hidden (`torch.Tensor` of shape `(B, T, H)`), text_targets, text_mask (of shape `(B, T)`):
            Hidden states, the token that each predicts, and which do.
        read (`torch.Tensor` of shape `(B, ..., H)`), index, weights, targets, mask (of shape `(B, ...)`):
            Other hidden states; for each the text index that it is mixed with, where `text_mask` is True, its weight, the
            token to predict, and whether it counts. Masks and index are best in the host's memory.

    Returns:
        `tuple`: [`Prediction`] of the text; [`Prediction`] of the mixed; log-probabilities of the other hidden states alone.
    """
    # only text rows that predict have logits; the row of each text index among these:
    text_mask, index, mask = text_mask.cpu(), index.cpu(), mask.cpu()
    compact = (text_mask.flatten().cumsum(0) - 1).view(text_mask.shape)
    rows = torch.arange(len(index)).view(-1, *[1] * (index.dim() - 1)).expand_as(index)[mask]
    text_places, places = (_places(x, read.device) for x in (text_mask, mask))
    found = _MixedStatistics.apply(
        text_hidden[text_places],
        read[places],
        weights[places],
        to_device(compact[rows, index[mask]], read.device),
        text_targets[text_places],
        targets[places],
        *_head(model),
    )
    text_logps, text_correct, logps, correct, own_logps = found
    text = Prediction(*(_spread(x, text_places, text_mask.shape) for x in (text_logps, text_correct)))
    mixed = Prediction(*(_spread(x, places, mask.shape) for x in (logps, correct)))
    return text, mixed, _spread(own_logps, places, mask.shape)


def _places(mask: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Indices, one tensor for each dimension, of the places in a mask, which had better be in the host's memory: a device
    would have to be asked how many they are."""
    return to_device(mask.nonzero().T.contiguous(), device).unbind()


def _spread(values: torch.Tensor, places: tuple[torch.Tensor, ...], shape: torch.Size) -> torch.Tensor:
    """Values at their places, and 0 elsewhere."""
    return values.new_zeros(shape).index_put(places, values)


def normalized_entropy(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """
    How uncertain the next token is: the entropy of its distribution divided by the greatest there is, log V. Without gradient.

    Where the logits are at hand, [`uncertainty`] says the same of them; here they are never held, which takes two thirds of
    the time.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Whose LM head is used.
        hidden (`torch.Tensor` of shape `(..., H)`):
            Hidden states after the final norm.

    Returns:
        `torch.Tensor` of shape `(...)`, between 0 and 1.
    """
    everywhere = torch.ones(hidden.shape[:-1], dtype=torch.bool)
    no_targets = hidden.new_zeros(hidden.shape[:-1], dtype=torch.long)
    with torch.no_grad():
        entropies = token_statistics(model, hidden, no_targets, everywhere).entropies
    return _normalized(entropies, len(_head(model).weight))


def uncertainty(logits: torch.Tensor) -> torch.Tensor:
    """The normalised entropy, of shape `(...)`, of the distributions that logits of shape `(..., V)` give."""
    log_probs = logits.log_softmax(-1)
    return _normalized(-(log_probs.exp() * log_probs).sum(-1), logits.shape[-1])


def _normalized(entropies: torch.Tensor, V: int) -> torch.Tensor:
    return entropies / math.log(V)


def _head(model: PreTrainedModel) -> Head:
    module = model.get_output_embeddings()
    return Head(module.weight, getattr(module, "bias", None), *logit_transform(model.config))


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _Statistics(torch.autograd.Function):
    """
    Statistics of rows of hidden states; the backward computes their logits again. See [`token_statistics`].

    Of a row with logits `l` (scaled, capped, divided by the temperature) and target `t`:

        log p_v = l_v − log Z,  Z = Σ_v exp(l_v)            H = −Σ_v p_v log p_v = log Z − Σ_v p_v l_v
        ∂ log p_t / ∂ l_v = [v = t] − p_v                   ∂ H / ∂ l_v = −p_v (log p_v + H)

    So with the gradients `a` of `log p_t` and `e` of `H` that come in, the gradient of `l_v` is

        a [v = t] − p_v (e log p_v + a + e H)
    """

    @staticmethod
    def forward(ctx, hidden, targets, weight, bias, scale, softcap, temperature, known, suppressed):
        ctx.dtype, ctx.logit_form, ctx.temperature = _compute_dtype(hidden), (scale, softcap), temperature
        ctx.suppressed = suppressed
        if known is None:
            tiles, states = Tiles(Head(weight, bias, scale, softcap), ctx.dtype, len(hidden)), hidden.to(ctx.dtype)
            softmax, means = OnlineSoftmax(targets, tiles), []
            for at in tiles.slices:
                logits = cap_(tiles.raw(states, at, "logits"), softcap).div_(temperature)
                logits = suppress_(logits, at, suppressed)
                exponentials = tiles.scratch("weights", logits)
                total = softmax.fold(logits, exponentials)
                means.append(exponentials.mul_(logits).sum(-1) / total)  # of the logits, by the tile's probabilities
            logps, log_z, correct = softmax.logps, softmax.log_z, softmax.correct
            entropies = log_z - ((softmax.parts - log_z).exp() * torch.stack(means)).sum(0)
        else:
            # drawn from these very states: the forward has nothing left to compute
            logps, entropies, log_z = known.logps, known.entropies, known.log_z
            correct = torch.zeros_like(targets, dtype=torch.bool)
        # log Z is kept and not the logits, which would be the largest tensor of a step
        ctx.save_for_backward(hidden, targets, weight, bias, log_z, entropies)
        ctx.mark_non_differentiable(correct)
        return logps.clone(), entropies.clone(), correct

    @staticmethod
    def backward(ctx, d_logps, d_entropies, _):
        hidden, targets, weight, bias, log_z, entropies = ctx.saved_tensors
        head = Head(weight, bias, *ctx.logit_form)
        tiles, heads = Tiles(head, ctx.dtype, len(hidden)), HeadGradients(head, ctx.needs_input_grad[2:4])
        d_hidden, states = torch.zeros_like(hidden, dtype=tiles.exact), hidden.to(tiles.dtype)
        places, constant = Targets(targets, tiles), (d_logps + d_entropies * entropies)[:, None]  # a + e H
        own, minus_e, log_z = d_logps[:, None] * places.inside, -d_entropies[:, None], log_z[:, None]
        for i, at in enumerate(tiles.slices):
            capped = cap_(tiles.raw(states, at, "logits"), tiles.softcap)
            slope = cap_slope(capped, tiles.softcap)
            log_p = suppress_(capped.div_(ctx.temperature), at, ctx.suppressed).sub_(log_z)
            grad = torch.exp(log_p, out=tiles.scratch("weights", log_p))
            grad.mul_(log_p.mul_(minus_e).sub_(constant))  # p (−e log p − (a + e H))
            grad = places.add_(i, grad, own).div_(ctx.temperature)
            tiles.back(heads, at, RowGradient(times_(grad, slope), states, d_hidden))
        return d_hidden.to(hidden.dtype), None, heads.weight, heads.bias, *[None] * 5


class _Prediction(NamedTuple):
    """
    What the gradient of the logits of one prediction is made of: `a [v = t] − a p_v`, for the gradient `a` that comes in.

    Parameters:
        targets ([`~model.tiles.Targets`]):
            Where the targets `t` stand.
        log_z (`torch.Tensor` of shape `(rows, 1)`):
            Of its logits.
        minus_a (`torch.Tensor` of shape `(rows, 1)`), own (of shape `(tiles, rows, 1)`):
            `−a`, and `a` in the tile of the target.
    """

    targets: Targets
    log_z: torch.Tensor
    minus_a: torch.Tensor
    own: torch.Tensor

    @classmethod
    def of(cls, targets: Targets, log_z: torch.Tensor, a: torch.Tensor) -> "_Prediction":
        """From vectors of shape `(rows,)`."""
        return cls(targets, log_z[:, None], -a[:, None], a[:, None] * targets.inside)

    def slope_(self, tile: int, logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
        """The gradient of a tile of raw logits `(rows, width)`, in place of them."""
        capped = cap_(logits, softcap)
        slope = cap_slope(capped, softcap)
        grad = capped.sub_(self.log_z).exp_().mul_(self.minus_a)
        return times_(self.targets.add_(tile, grad, self.own), slope)


class _MixedStatistics(torch.autograd.Function):
    """
    Statistics of m rows of a text and of n other rows, each mixed with one of the text's. See [`prediction_statistics`].

    A head is affine, so the logits of mixed hidden states are mixed logits. With `x` the raw logits (scaled, not yet capped)
    of the text, `y` those of the other rows, `j(i)` the text row and `w_i` the weight of row i, and `c` the cap:

        z_i = w_i y_i + (1 − w_i) x_j(i)        predictions: softmax of c(x), c(z) and c(y)

    Each prediction's log-probability of its target has its own gradient `g` of raw logits, `a ([v = t] − p_v) c'`. Together:

        gradient of y_i = g^y_i + w_i g^z_i
        gradient of x_j = g^x_j + Σ_{i: j(i) = j} (1 − w_i) g^z_i
        gradient of w_i = Σ_v g^z_iv (y_iv − x_j(i)v)
    """

    @staticmethod
    def forward(ctx, text, read, weights, index, text_targets, targets, weight, bias, scale, softcap):
        ctx.dtype, ctx.logit_form = _compute_dtype(text), (scale, softcap)
        tiles = Tiles(Head(weight, bias, scale, softcap), ctx.dtype, 2 * len(read) + len(text))
        of_text, mixed, own = (OnlineSoftmax(x, tiles) for x in (text_targets, targets, targets))
        share, text_states, states = weights[:, None].to(tiles.exact), text.to(tiles.dtype), read.to(tiles.dtype)
        for at in tiles.slices:
            x, y = tiles.raw(text_states, at, "text"), tiles.raw(states, at, "logits")
            z = torch.index_select(x, 0, index, out=tiles.scratch("weights", y)).lerp_(y, share)
            # each fold overwrites its logits, so that z is made before
            for softmax, logits in ((mixed, z), (of_text, x), (own, y)):
                softmax.fold(cap_(logits, softcap))
        ctx.save_for_backward(
            *(text, read, weights, index, text_targets, targets, weight, bias),
            *(of_text.log_z, mixed.log_z, own.log_z),
        )
        text_correct, correct = of_text.correct, mixed.correct
        ctx.mark_non_differentiable(text_correct, correct)
        return of_text.logps, text_correct, mixed.logps, correct, own.logps

    @staticmethod
    def backward(ctx, a_text, _, a_mixed, __, a_own):
        text, read, weights, index, text_targets, targets, weight, bias, *log_z = ctx.saved_tensors
        head = Head(weight, bias, *ctx.logit_form)
        tiles = Tiles(head, ctx.dtype, 2 * len(read) + len(text))
        heads, softcap = HeadGradients(head, ctx.needs_input_grad[6:8]), tiles.softcap
        d_text, d_read = (torch.zeros_like(x, dtype=tiles.exact) for x in (text, read))
        d_weights = torch.zeros_like(weights, dtype=tiles.exact)
        text_places, places = Targets(text_targets, tiles), Targets(targets, tiles)
        of_text, mixed, own = map(_Prediction.of, (text_places, places, places), log_z, (a_text, a_mixed, a_own))
        share, text_states, states = weights[:, None].to(tiles.exact), text.to(tiles.dtype), read.to(tiles.dtype)
        less, rest = share - 1, 1 - share
        for i, at in enumerate(tiles.slices):
            x, y = tiles.raw(text_states, at, "text"), tiles.raw(states, at, "logits")
            # the gap is wanted twice: z = y − (1 − w)(y − x), and the gradient of w
            gap = torch.index_select(x, 0, index, out=tiles.scratch("gap", y))
            gap = torch.sub(y, gap, out=gap)
            z = torch.addcmul(y, gap, less, out=tiles.scratch("weights", y))
            g_x, g_z, g_y = (
                prediction.slope_(i, logits, softcap) for prediction, logits in ((of_text, x), (mixed, z), (own, y))
            )
            d_weights += gap.mul_(g_z).sum(-1)
            g_y.addcmul_(g_z, share)
            g_x.index_add_(0, index, g_z.mul_(rest))
            tiles.back(heads, at, RowGradient(g_x, text_states, d_text), RowGradient(g_y, states, d_read))
        d_hidden = (d_text.to(text.dtype), d_read.to(read.dtype), d_weights.to(weights.dtype))
        return *d_hidden, None, None, None, heads.weight, heads.bias, None, None
