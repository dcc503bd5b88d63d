"""From hidden states to token statistics, without ever holding `(tokens, V)` logits.

The LM head is applied to what the backbone returns after its final norm. Families that scale or soft-cap their logits
do so here, after mixing.
"""

import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..text.transfer import to_device
from .family import cap_, cap_slope, logit_transform, times_


TILE_ELEMENTS = 2**21  # logits held at once on a CPU, so that they stay in its cache (8 MB in float32)
GPU_TILE_ELEMENTS = 2**26  # the same on any other device, which needs that much to be busy (256 MB)
LEAST_WIDTH = 256  # of a tile, however many rows it has


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
    The same without gradient, as many rows at a time as may be held.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Whose LM head is used.
        hidden (`torch.Tensor` of shape `(rows, H)`):
            Hidden states after the final norm.

    Yields:
        `tuple`: a slice of the rows, and their logits, which may be written to and which the next ones overwrite.
    """
    weight, bias = _weights(model)
    size = max(_tile_elements(hidden.device) // len(weight), 1)
    tiles = _Tiles(weight, bias, logit_transform(model.config), _compute_dtype(hidden), min(size, len(hidden)))
    hidden = hidden.to(tiles.dtype)
    for start in range(0, max(len(hidden), 1), size):
        rows = slice(start, min(start + size, len(hidden)))
        yield rows, cap_(tiles.raw(hidden[rows], slice(0, len(weight)), "logits"), tiles.softcap)


def _tile_elements(device: torch.device) -> int:
    return TILE_ELEMENTS if device.type == "cpu" else GPU_TILE_ELEMENTS


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
            Elsewhere the statistics are 0. Best in the host's memory.
        temperature (`float`):
            Divides the logits.
        known ([`Drawn`], *optional*):
            The statistics, of shape `(...)`, where the targets were drawn from these very hidden states.

    Returns:
        [`TokenStatistics`] with tensors of shape `(...)`. Gradients flow through `logps` and `entropies`.
    """
    places = _places(mask, hidden.device)
    chosen = None if known is None else tuple(x[places] for x in (known.logps, known.entropies, known.log_z))
    found = _Statistics.apply(
        hidden[places], *_weights(model), targets[places], temperature, logit_transform(model.config), chosen
    )
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
    # row of each text index among those that predict
    text_mask, index, mask = text_mask.cpu(), index.cpu(), mask.cpu()
    compact = (text_mask.flatten().cumsum(0) - 1).view(text_mask.shape)
    rows = torch.arange(len(index)).view(-1, *[1] * (index.dim() - 1)).expand_as(index)[mask]
    text_places, places = (_places(x, read.device) for x in (text_mask, mask))
    found = _MixedStatistics.apply(
        text_hidden[text_places],
        read[places],
        weights[places],
        *_weights(model),
        text_targets[text_places],
        to_device(compact[rows, index[mask]], read.device),
        targets[places],
        logit_transform(model.config),
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


def _weights(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


class _Kept(threading.local):
    """Tiles by name and type; each thread has its own, and writes into no other's."""

    def __init__(self):
        self.tiles: dict[tuple, torch.Tensor] = {}


_kept = _Kept()


def scratch(name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """
    A tile to write into, `(rows, width)`, whose content lasts until the next one of the same name in the same thread.

    Memory that is fresh from the operating system costs more than what is computed in it: of a step's time on a CPU a quarter
    went into the first touch of temporary logits. Other devices keep freed memory themselves.
    """
    if device.type != "cpu":
        return torch.empty(rows, width, dtype=dtype, device=device)
    key, tiles = (name, dtype), _kept.tiles
    if key not in tiles or tiles[key].numel() < rows * width:
        with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside of it
            tiles[key] = torch.empty(rows * width, dtype=dtype, device=device)
    return tiles[key][: rows * width].view(rows, width)


class _Tiles:
    """
    Logits of rows of hidden states, a slice of the vocabulary at a time, and the way back from their gradients.

    Args:
        weight (`torch.Tensor` of shape `(V, H)`), bias (of shape `(V,)`, *optional*):
            The LM head.
        transform (`tuple`):
            As [`logit_transform`] gives it.
        dtype (`torch.dtype`):
            Of the products. The LM head is cast to it once, here, and the copy lasts as long as this object does.
        rows (`int`):
            Rows of logits held at once.
    """

    def __init__(self, weight, bias, transform, dtype, rows: int):
        self.weight, self.bias, self.dtype = weight.to(dtype), None if bias is None else bias.to(dtype), dtype
        self.exact = torch.promote_types(dtype, torch.float32)  # of what is done with logits
        self.scale, self.softcap = transform
        V = weight.shape[0]
        self.width = width = min(max(_tile_elements(weight.device) // max(rows, 1), LEAST_WIDTH), V)
        self.slices = [slice(start, min(start + width, V)) for start in range(0, V, width)]

    def scratch(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return scratch(name, like.shape[0], like.shape[1], self.exact, like.device)

    def raw(self, hidden: torch.Tensor, at: slice, name: str) -> torch.Tensor:
        """Scaled logits before the soft-cap, in at least float32, in the scratch of a name, of hidden states in `dtype`."""
        head = self.weight[at]
        logits = scratch(name, len(hidden), len(head), self.dtype, hidden.device)
        torch.mm(hidden, head.T, out=logits)
        if self.bias is not None:
            logits += self.bias[at]
        logits = logits.to(self.exact)
        return logits if self.scale == 1 else logits.mul_(self.scale)

    def back(
        self, heads: "_HeadGradients", at: slice, *parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> None:
        """From gradients of scaled logits to the gradients of their hidden states, each given with the hidden states, in
        `dtype`, and where their gradient is summed up; that of the head goes to `heads`."""
        weight, pairs = self.weight[at], []
        for grad, hidden, total in parts:
            grad = (grad if self.scale == 1 else grad.mul_(self.scale)).to(self.dtype)
            if total.dtype == self.dtype:
                total.addmm_(grad, weight)
            else:
                total += grad @ weight
            pairs.append((grad, hidden))
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


class _Targets:
    """
    Where the target of each row stands in the tiles.

    Args:
        targets (`torch.Tensor` of shape `(rows,)`):
            Token ids.
        tiles ([`_Tiles`]):
            The tiles.
    """

    def __init__(self, targets: torch.Tensor, tiles: "_Tiles"):
        self.ids, self.width = targets, tiles.width
        starts = torch.arange(0, len(tiles.weight), tiles.width, device=targets.device)[:, None, None]
        last = (len(tiles.weight) - 1 - starts).clamp(max=tiles.width - 1)
        local = targets[:, None] - starts
        self.inside = (local >= 0) & (local <= last)  # (tiles, rows, 1)
        self.index = torch.minimum(local.clamp(min=0), last)  # the same; within the tile also where the target is not

    def add_(self, tile: int, slope: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Adds to the gradients of a tile of logits, in place, those of the targets' own: values of shape `(tiles, rows, 1)`, 0
        where they are not inside."""
        return slope.scatter_add_(1, self.index[tile], values[tile])


class _Best:
    """Logarithm of the sum of exponentials of rows of logits, their greatest, and a target's, tile after tile."""

    def __init__(self, targets: torch.Tensor, tiles: "_Tiles"):
        self.targets = _Targets(targets, tiles)
        self.tops: list[torch.Tensor] = []  # of each tile: the greatest logit of a row,
        self.places: list[torch.Tensor] = []  # where it is,
        self.totals: list[torch.Tensor] = []  # the sum of exponentials over it,
        self.found: list[torch.Tensor] = []  # and the logit of the target, if it is there

    def fold(self, logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Takes the next tile in, whose exponentials, over their greatest, are written to `out` or in place of it; returns
        their sum."""
        self.found.append(logits.gather(1, self.targets.index[len(self.found)]))
        top, place = logits.max(-1)
        shifted = torch.sub(logits, top[:, None], out=logits if out is None else out)
        self.tops.append(top)
        self.places.append(place)
        self.totals.append(shifted.exp_().sum(-1))
        return self.totals[-1]

    @functools.cached_property
    def parts(self) -> torch.Tensor:
        """Logarithm of the sum of exponentials of each tile, `(tiles, rows)`."""
        return torch.stack(self.tops) + torch.stack(self.totals).log()

    @functools.cached_property
    def log_z(self) -> torch.Tensor:
        return self.parts.logsumexp(0)

    @property
    def logps(self) -> torch.Tensor:
        tile = self.targets.ids // self.targets.width
        return torch.cat(self.found, dim=1).gather(1, tile[:, None])[:, 0] - self.log_z

    @property
    def correct(self) -> torch.Tensor:
        tile = torch.stack(self.tops).argmax(0, keepdim=True)  # the first of equals is the likeliest
        place = torch.stack(self.places).gather(0, tile) + tile * self.targets.width
        return torch.eq(place[0], self.targets.ids)


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _nll_slope(
    tile: int, logits: torch.Tensor, log_z: torch.Tensor, grad: torch.Tensor, own: torch.Tensor, targets: _Targets
) -> torch.Tensor:
    """Gradient of log-probabilities of targets with respect to a tile of logits, in place of it. `log_z` and `grad`, the latter
    negative, are of shape `(rows, 1)`; `own` is `grad` as [`_Targets.add_`] takes it."""
    return targets.add_(tile, logits.sub_(log_z).exp_().mul_(grad), own)


class _Statistics(torch.autograd.Function):
    """Statistics of rows of hidden states; the backward computes their logits again. See [`token_statistics`]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, transform, known):
        form = transform, _compute_dtype(hidden), len(hidden)
        if known is None:
            tiles, states = _Tiles(weight, bias, *form), hidden.to(form[1])
            best, means = _Best(targets, tiles), []
            for at in tiles.slices:
                logits = cap_(tiles.raw(states, at, "logits"), tiles.softcap).div_(temperature)
                weights = tiles.scratch("weights", logits)
                total = best.fold(logits, weights)
                means.append(weights.mul_(logits).sum(-1) / total)
            log_z = best.log_z
            shares = (best.parts - log_z).exp()
            logps, entropies, correct = best.logps, log_z - (shares * torch.stack(means)).sum(0), best.correct
        else:
            logps, entropies, log_z = known
            correct = torch.zeros_like(targets, dtype=torch.bool)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropies)
        ctx.form, ctx.temperature = form, temperature
        ctx.mark_non_differentiable(correct)
        return logps.clone(), entropies.clone(), correct

    @staticmethod
    def backward(ctx, d_logps, d_entropies, _):
        hidden, weight, bias, targets, log_z, entropies = ctx.saved_tensors
        tiles, heads = _Tiles(weight, bias, *ctx.form), _HeadGradients(weight, bias, ctx.needs_input_grad[1:3])
        d_hidden, states = torch.zeros_like(hidden, dtype=tiles.exact), hidden.to(tiles.dtype)
        places, constant = _Targets(targets, tiles), (d_logps + d_entropies * entropies)[:, None]
        own, minus, log_z = d_logps[:, None] * places.inside, -d_entropies[:, None], log_z[:, None]
        for i, at in enumerate(tiles.slices):
            capped = cap_(tiles.raw(states, at, "logits"), tiles.softcap)
            factor = cap_slope(capped, tiles.softcap)
            log_p = capped.div_(ctx.temperature).sub_(log_z)
            grad = torch.exp(log_p, out=tiles.scratch("weights", log_p))
            # -p·(d_logp + d_entropy·(log p + entropy)), and d_logp at the target
            grad.mul_(log_p.mul_(minus).sub_(constant))
            grad = places.add_(i, grad, own).div_(ctx.temperature)
            tiles.back(heads, at, (times_(grad, factor), states, d_hidden))
        return d_hidden.to(hidden.dtype), heads.weight, heads.bias, None, None, None, None


class _MixedStatistics(torch.autograd.Function):
    """See [`prediction_statistics`]: n rows of other hidden states, each mixed with one of m text rows."""

    @staticmethod
    def forward(ctx, text, read, weights, weight, bias, text_targets, index, targets, transform):
        form = transform, _compute_dtype(text), 2 * len(read) + len(text)
        tiles = _Tiles(weight, bias, *form)
        of_text, mixed, own = (_Best(x, tiles) for x in (text_targets, targets, targets))
        share, states = weights[:, None].to(tiles.exact), (text.to(tiles.dtype), read.to(tiles.dtype))
        for at in tiles.slices:
            text_raw, raw = tiles.raw(states[0], at, "text"), tiles.raw(states[1], at, "logits")
            both = torch.index_select(text_raw, 0, index, out=tiles.scratch("weights", raw))
            for best, logits in ((mixed, both.lerp_(raw, share)), (of_text, text_raw), (own, raw)):
                best.fold(cap_(logits, tiles.softcap))
        ctx.save_for_backward(
            *(text, read, weights, weight, bias, text_targets, index, targets),
            *(of_text.log_z, mixed.log_z, own.log_z),
        )
        ctx.form = form
        text_correct, correct = of_text.correct, mixed.correct
        ctx.mark_non_differentiable(text_correct, correct)
        return of_text.logps, text_correct, mixed.logps, correct, own.logps

    @staticmethod
    def backward(ctx, d_text, _, d_mixed, __, d_own):
        text, read, weights, weight, bias, text_targets, index, targets, *log_zs = ctx.saved_tensors
        tiles, heads = _Tiles(weight, bias, *ctx.form), _HeadGradients(weight, bias, ctx.needs_input_grad[3:5])
        share = weights[:, None].to(tiles.exact)
        d_text_hidden, d_read = (torch.zeros_like(x, dtype=tiles.exact) for x in (text, read))
        d_weights = torch.zeros_like(weights, dtype=tiles.exact)
        of_text, others = _Targets(text_targets, tiles), _Targets(targets, tiles)
        goals = [
            (log_z[:, None], -grad[:, None], grad[:, None] * places.inside, places)
            for log_z, grad, places in zip(log_zs, (d_text, d_mixed, d_own), (of_text, others, others), strict=True)
        ]
        less, rest, states = share - 1, 1 - share, (text.to(tiles.dtype), read.to(tiles.dtype))
        for i, at in enumerate(tiles.slices):
            text_raw, raw = tiles.raw(states[0], at, "text"), tiles.raw(states[1], at, "logits")
            gap = torch.index_select(text_raw, 0, index, out=tiles.scratch("gap", raw))
            gap = torch.sub(raw, gap, out=gap)
            both = torch.addcmul(raw, gap, less, out=tiles.scratch("weights", raw))
            capped = [cap_(x, tiles.softcap) for x in (text_raw, both, raw)]
            factors = [cap_slope(x, tiles.softcap) for x in capped]
            text_grad, mixed_grad, own_grad = (
                times_(_nll_slope(i, x, *goal), factor) for x, goal, factor in zip(capped, goals, factors, strict=True)
            )
            d_weights += gap.mul_(mixed_grad).sum(-1)
            own_grad.addcmul_(mixed_grad, share)
            text_grad.index_add_(0, index, mixed_grad.mul_(rest))
            tiles.back(heads, at, (text_grad, states[0], d_text_hidden), (own_grad, states[1], d_read))
        d_hidden = (d_text_hidden.to(text.dtype), d_read.to(read.dtype), d_weights.to(weights.dtype))
        return *d_hidden, heads.weight, heads.bias, None, None, None, None


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
    return entropies / math.log(len(model.get_output_embeddings().weight))


def uncertainty(logits: torch.Tensor) -> torch.Tensor:
    """The normalised entropy, of shape `(...)`, of the distributions that logits of shape `(..., V)` give."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1) / math.log(logits.shape[-1])
