"""From hidden states to token statistics, without ever holding `(tokens, V)` logits.

The LM head is applied to what the backbone returns after its final norm. Families that scale or soft-cap their logits
do so here, after mixing.
"""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .softcap import cap_, slope, times_


TILE_ELEMENTS = 2**21  # logits held at once (8 MB in float32)
LEAST_WIDTH = 256  # of a tile, however many rows it has
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # what families call it


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


def logits_in_scratch(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The same, without gradient, where the next such call writes its own."""
    weight, bias = _weights(model)
    tiles = _Tiles(weight, bias, logit_transform(model.config), _compute_dtype(hidden), len(hidden))
    return cap_(tiles.raw(hidden, slice(0, len(weight)), "logits"), tiles.softcap)


def row_chunk(model: PreTrainedModel) -> int:
    """How many rows of full-vocabulary logits may be held at once."""
    return max(TILE_ELEMENTS // model.get_output_embeddings().weight.shape[0], 1)


def token_statistics(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    temperature: float = 1.0,
    known: "Drawn | None" = None,
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
        known ([`Drawn`], *optional*):
            The statistics, of shape `(...)`, where the targets were drawn from these very hidden states.

    Returns:
        [`TokenStatistics`] with tensors of shape `(...)`. Gradients flow through `logps` and `entropies`.
    """
    chosen = None if known is None else tuple(x[mask] for x in (known.logps, known.entropies, known.log_z))
    found = _Statistics.apply(
        hidden[mask], *_weights(model), targets[mask], temperature, logit_transform(model.config), chosen
    )
    return TokenStatistics(*(_spread(x, mask) for x in found))


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
            token to predict, and whether it counts.

    Returns:
        `tuple`: [`Prediction`] of the text; [`Prediction`] of the mixed; log-probabilities of the other hidden states alone.
    """
    # row of each text index among those that predict
    compact = (text_mask.flatten().cumsum(0) - 1).view(text_mask.shape)
    rows = torch.arange(len(index), device=index.device).view(-1, *[1] * (index.dim() - 1)).expand_as(index)[mask]
    found = _MixedStatistics.apply(
        text_hidden[text_mask],
        read[mask],
        weights[mask],
        *_weights(model),
        text_targets[text_mask],
        compact[rows, index[mask]],
        targets[mask],
        logit_transform(model.config),
    )
    text_logps, text_correct, logps, correct, own_logps = found
    text = Prediction(_spread(text_logps, text_mask), _spread(text_correct, text_mask))
    return text, Prediction(_spread(logps, mask), _spread(correct, mask)), _spread(own_logps, mask)


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of the places in `mask`, and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _weights(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


_scratch: dict[tuple, torch.Tensor] = {}


def scratch(name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """
    A tile to write into, `(rows, width)`, whose content lasts until the next one of the same name.

    Memory that is fresh from the operating system costs more than what is computed in it: of a step's time a quarter went
    into the first touch of temporary logits.
    """
    key = (name, dtype, device)
    if key not in _scratch or _scratch[key].numel() < rows * width:
        _scratch[key] = torch.empty(rows * width, dtype=dtype, device=device)
    return _scratch[key][: rows * width].view(rows, width)


class _Tiles:
    """
    Logits of rows of hidden states, a slice of the vocabulary at a time, and the way back from their gradients.

    Args:
        weight (`torch.Tensor` of shape `(V, H)`), bias (of shape `(V,)`, *optional*):
            The LM head.
        transform (`tuple`):
            As [`logit_transform`] gives it.
        dtype (`torch.dtype`):
            Of the products.
        rows (`int`):
            Rows of logits held at once.
    """

    def __init__(self, weight, bias, transform, dtype, rows: int):
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self.exact = torch.promote_types(dtype, torch.float32)  # of what is done with logits
        self.scale, self.softcap = transform
        V = weight.shape[0]
        width = min(max(TILE_ELEMENTS // max(rows, 1), LEAST_WIDTH), V)
        self.slices = [slice(start, min(start + width, V)) for start in range(0, V, width)]

    def scratch(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return scratch(name, like.shape[0], like.shape[1], self.exact, like.device)

    def raw(self, hidden: torch.Tensor, at: slice, name: str) -> torch.Tensor:
        """Scaled logits before the soft-cap, in at least float32, in the scratch of a name."""
        head = self.weight[at].to(self.dtype)
        logits = scratch(name, len(hidden), len(head), self.dtype, hidden.device)
        torch.mm(hidden.to(self.dtype), head.T, out=logits)
        if self.bias is not None:
            logits += self.bias[at].to(self.dtype)
        logits = logits.to(self.exact)
        return logits if self.scale == 1 else logits.mul_(self.scale)

    def back(
        self, heads: "_HeadGradients", at: slice, *parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> None:
        """From gradients of scaled logits to the gradients of their hidden states, each given with the hidden states and
        where their gradient is summed up; that of the head goes to `heads`."""
        weight = self.weight[at].to(self.dtype)
        pairs = []
        for grad, hidden, total in parts:
            grad = (grad if self.scale == 1 else grad.mul_(self.scale)).to(self.dtype)
            if total.dtype == self.dtype:
                total.addmm_(grad, weight)
            else:
                total += grad @ weight
            pairs.append((grad, hidden.to(self.dtype)))
        heads.put(at, *pairs)


class _HeadGradients:
    """Gradients of weight and bias, where they are wanted; filled a slice of the vocabulary at a time."""

    def __init__(self, weight, bias, wanted: tuple[bool, bool]):
        self.weight = torch.empty_like(weight) if wanted[0] else None
        self.bias = torch.empty_like(bias) if wanted[1] else None

    def put(self, at: slice, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Those of a slice, from gradients of its logits, `(rows, width)`, and the hidden states they came from."""
        if self.weight is not None:
            (grad, hidden), *others = pairs
            if grad.dtype == self.weight.dtype:
                torch.mm(grad.T, hidden, out=self.weight[at])
            else:
                self.weight[at] = grad.T @ hidden
            for grad, hidden in others:
                self.weight[at] += grad.T @ hidden
        if self.bias is not None:
            self.bias[at] = sum(grad.sum(0) for grad, _ in pairs)


class _Best:
    """Logarithm of the sum of exponentials of rows of logits, their greatest, and a target's, tile after tile."""

    def __init__(self, targets: torch.Tensor):
        self.targets = targets
        self.parts: list[torch.Tensor] = []  # the logarithm of each tile
        self.top, self.index = torch.full_like(targets, -torch.inf, dtype=torch.float64), torch.zeros_like(targets)
        self.target = self.top

    def fold(self, logits: torch.Tensor, at: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """Takes a tile in, whose exponentials, over their greatest, are written to `out` or in place of it; returns their
        sum."""
        local = self.targets - at.start
        inside = (local >= 0) & (local < logits.shape[1])
        target = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target = torch.where(inside, target, self.target.to(target.dtype))
        top, index = logits.max(-1)
        better = top > self.top  # the first of equals is the likeliest, as `argmax` has it
        self.top, self.index = torch.where(better, top, self.top), torch.where(better, index + at.start, self.index)
        shifted = torch.sub(logits, top[:, None], out=logits if out is None else out)
        total = shifted.exp_().sum(-1)
        self.parts.append(top + total.log())
        return total

    @property
    def log_z(self) -> torch.Tensor:
        return torch.stack(self.parts).logsumexp(0)

    @property
    def logps(self) -> torch.Tensor:
        return self.target - self.log_z

    @property
    def correct(self) -> torch.Tensor:
        return torch.eq(self.index, self.targets)


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _nll_slope(logits: torch.Tensor, log_z: torch.Tensor, grad: torch.Tensor, targets: torch.Tensor, at: slice):
    """Gradient of log-probabilities of targets with respect to a tile of logits, in place of it."""
    return _add_at_targets(logits.sub_(log_z[:, None]).exp_().mul_(-grad[:, None]), grad, targets, at)


def _add_at_targets(slope: torch.Tensor, grad: torch.Tensor, targets: torch.Tensor, at: slice) -> torch.Tensor:
    local = targets - at.start
    inside = (local >= 0) & (local < slope.shape[1])
    return slope.scatter_add_(1, local.clamp(0, slope.shape[1] - 1)[:, None], (grad * inside)[:, None])


class _Statistics(torch.autograd.Function):
    """Statistics of rows of hidden states; the backward computes their logits again. See [`token_statistics`]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, transform, known):
        tiles = _Tiles(weight, bias, transform, _compute_dtype(hidden), len(hidden))
        if known is None:
            best, means = _Best(targets), []
            for at in tiles.slices:
                logits = cap_(tiles.raw(hidden, at, "logits"), tiles.softcap).div_(temperature)
                weights = tiles.scratch("weights", logits)
                total = best.fold(logits, at, weights)
                means.append(weights.mul_(logits).sum(-1) / total)
            log_z = best.log_z
            shares = (torch.stack(best.parts) - log_z).exp()
            logps, entropies, correct = best.logps, log_z - (shares * torch.stack(means)).sum(0), best.correct
        else:
            logps, entropies, log_z = known
            correct = torch.zeros_like(targets, dtype=torch.bool)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropies)
        ctx.tiles, ctx.temperature = tiles, temperature
        ctx.mark_non_differentiable(correct)
        return logps.clone(), entropies.clone(), correct

    @staticmethod
    def backward(ctx, d_logps, d_entropies, _):
        hidden, weight, bias, targets, log_z, entropies = ctx.saved_tensors
        tiles, heads = ctx.tiles, _HeadGradients(weight, bias, (ctx.needs_input_grad[1], ctx.needs_input_grad[2]))
        d_hidden = torch.zeros_like(hidden, dtype=tiles.exact)
        constant = (d_logps + d_entropies * entropies)[:, None]
        for at in tiles.slices:
            capped = cap_(tiles.raw(hidden, at, "logits"), tiles.softcap)
            factor = slope(capped, tiles.softcap)
            log_p = capped.div_(ctx.temperature).sub_(log_z[:, None])
            grad = torch.exp(log_p, out=tiles.scratch("weights", log_p))
            # -p·(d_logp + d_entropy·(log p + entropy)), and d_logp at the target
            grad.mul_(log_p.mul_(-d_entropies[:, None]).sub_(constant))
            grad = _add_at_targets(grad, d_logps, targets, at).div_(ctx.temperature)
            tiles.back(heads, at, (times_(grad, factor), hidden, d_hidden))
        return d_hidden.to(hidden.dtype), heads.weight, heads.bias, None, None, None, None


class _MixedStatistics(torch.autograd.Function):
    """See [`prediction_statistics`]: n rows of other hidden states, each mixed with one of m text rows."""

    @staticmethod
    def forward(ctx, text, read, weights, weight, bias, text_targets, index, targets, transform):
        tiles = _Tiles(weight, bias, transform, _compute_dtype(text), 2 * len(read) + len(text))
        of_text, mixed, own = _Best(text_targets), _Best(targets), _Best(targets)
        share = weights[:, None].to(tiles.exact)
        for at in tiles.slices:
            text_raw, raw = tiles.raw(text, at, "text"), tiles.raw(read, at, "logits")
            both = torch.index_select(text_raw, 0, index, out=tiles.scratch("weights", raw))
            for best, logits in ((mixed, both.lerp_(raw, share)), (of_text, text_raw), (own, raw)):
                best.fold(cap_(logits, tiles.softcap), at)
        ctx.save_for_backward(
            *(text, read, weights, weight, bias, text_targets, index, targets),
            *(of_text.log_z, mixed.log_z, own.log_z),
        )
        ctx.tiles = tiles
        text_correct, correct = of_text.correct, mixed.correct
        ctx.mark_non_differentiable(text_correct, correct)
        return of_text.logps, text_correct, mixed.logps, correct, own.logps

    @staticmethod
    def backward(ctx, d_text, _, d_mixed, __, d_own):
        text, read, weights, weight, bias, text_targets, index, targets, *log_zs = ctx.saved_tensors
        tiles, heads = ctx.tiles, _HeadGradients(weight, bias, ctx.needs_input_grad[3:5])
        share = weights[:, None].to(tiles.exact)
        d_text_hidden, d_read = (torch.zeros_like(x, dtype=tiles.exact) for x in (text, read))
        d_weights = torch.zeros_like(weights, dtype=tiles.exact)
        goals = ((d_text, text_targets), (d_mixed, targets), (d_own, targets))
        for at in tiles.slices:
            text_raw, raw = tiles.raw(text, at, "text"), tiles.raw(read, at, "logits")
            gap = torch.index_select(text_raw, 0, index, out=tiles.scratch("gap", raw))
            gap = torch.sub(raw, gap, out=gap)
            both = torch.addcmul(raw, gap, share - 1, out=tiles.scratch("weights", raw))
            capped = [cap_(x, tiles.softcap) for x in (text_raw, both, raw)]
            factors = [slope(x, tiles.softcap) for x in capped]
            text_grad, mixed_grad, own_grad = (
                times_(_nll_slope(x, log_z, grad, goal, at), factor)
                for x, log_z, (grad, goal), factor in zip(capped, log_zs, goals, factors, strict=True)
            )
            d_weights += gap.mul_(mixed_grad).sum(-1)
            own_grad.addcmul_(mixed_grad, share)
            text_grad.index_add_(0, index, mixed_grad.mul_(1 - share))
            tiles.back(heads, at, (text_grad, text, d_text_hidden), (own_grad, read, d_read))
        d_hidden = (d_text_hidden.to(text.dtype), d_read.to(read.dtype), d_weights.to(weights.dtype))
        return *d_hidden, heads.weight, heads.bias, None, None, None, None


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
