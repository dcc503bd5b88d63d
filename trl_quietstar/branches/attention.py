"""Attention of branches to the text they hang off, without a dense mask.

A branch sees a run of text indices, `first` to `last`, and its own earlier slots. So two small products with one softmax
over both replace a `(T + N·S)²` mask: cost grows with what is seen, memory with what is kept. It enters any family that
dispatches its attention through Transformers' `AttentionInterface`, as an implementation that does what the family's own
did ([`enable`]) until a forward brings a [`TextReading`] or a [`BranchReading`].
"""

import functools
import logging
import sys
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .._compat import attention_of, can_set_attention, takes_sdpa
from ..model.family import cap_, cap_slope, times_


logger = logging.getLogger(__name__)

PREFIX = "quietstar_"  # of the implementation's name, before the one it stands in for
EAGER = "eager_attention_forward"  # which each family has of its own
OWN_MASKS = ("flash", "flex", "paged")  # implementations named so take their masks in forms of their own
CHUNK_ELEMENTS = 2**20  # attention scores held at once on a CPU, so that they stay in its cache
CHUNK_BRANCHES = 64  # branches of a chunk there: a shorter one skips more text that none of its branches sees
GPU_CHUNK_ELEMENTS = 2**26  # the same on any other device, which needs that much to be busy (256 MB in float32)
CHUNK_SLOTS = 256  # new slots of a branch that attend at once: memory grows with a thought and not with its square


@dataclass
class TextMemory:
    """
    Keys and values of a text, by attention layer, as one forward left them: `(B, heads, T, D)`.

    Parameters:
        layers (`dict`):
            By module.
        has_windows (`bool`):
            Whether any layer named its sliding window.
    """

    layers: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    has_windows: bool = False


@dataclass(frozen=True)
class TextReading:
    """A forward over the text itself, which fills `memory` on its way."""

    memory: TextMemory

    def attend(self, attention, module, query, key, value, attention_mask, **kwargs):
        # a checkpointed layer comes by again in the backward; the first keys are those of the graph
        if module not in self.memory.layers:
            # in one piece, or every product on another device than a CPU would copy them again
            kept = (x if x.device.type == "cpu" else x.contiguous() for x in (key, value))
            self.memory.layers[module] = tuple(kept)  # type: ignore[assignment]
        self.memory.has_windows |= kwargs.get("sliding_window") is not None
        return attention(module, query, key, value, attention_mask, **kwargs)


@dataclass(frozen=True)
class BranchReading:
    """
    A forward over Q new slots of every branch, `(B, N·Q)` tokens.

    Parameters:
        memory ([`TextMemory`]):
            Of the text.
        own (`dict`):
            Keys and values of the branches' earlier slots, by module, `(B, heads, N, s or more, D)`; grows where `keep`.
        first, last (`torch.Tensor` of shape `(B, N)`):
            Text indices that a branch sees.
        spans (`list[tuple[int, int]]`):
            Least `first` and greatest `last`, over the batch, of each chunk of branches.
        chunk (`int`):
            Branches of a chunk.
        slots (`torch.Tensor` of shape `(B, N, Q, s + Q)`, bool):
            Which of its own slots, new ones included, a new slot sees.
        positions (`torch.Tensor` of shape `(B, N, s + Q)`):
            Position ids of all of them; for sliding windows.
        ahead (`torch.Tensor` of shape `(B, N, Q)`):
            How many positions a new slot is ahead of text index 0; for the same.
        keep (`bool`):
            Whether more slots will follow.
        layouts (`dict`):
            A [`_Layout`] for each sliding window and first new slot, which layers share.
    """

    memory: TextMemory
    own: dict[torch.nn.Module, tuple[torch.Tensor, ...]]
    first: torch.Tensor
    last: torch.Tensor
    spans: list[tuple[int, int]]
    chunk: int
    slots: torch.Tensor
    positions: torch.Tensor
    ahead: torch.Tensor
    keep: bool
    layouts: dict[tuple[int | None, int], "_Layout"] = field(default_factory=dict)

    def attend(self, attention, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        if dropout:
            raise ValueError(f"Attention dropout of {dropout} is not applied to branches; set `disable_dropout=True`.")
        if kwargs.get("position_bias") is not None:
            raise ValueError("An attention with a learned position bias cannot branch.")
        B, N, Q, _ = self.slots.shape
        text_key, text_value = self.memory.layers[module]
        key, value = (x.to(query.dtype).unflatten(2, (N, Q)) for x in (key, value))
        if module in self.own or self.keep:
            key, value = self._joined(module, (key, value))
        window = kwargs.get("sliding_window")
        query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        query = query.unflatten(2, (N, Q)).unflatten(1, (key.shape[1], -1))  # (B, heads, groups, N, Q, D)
        parts = []
        for start in range(0, Q, CHUNK_SLOTS):
            layout = self._layout(window, start)
            new = slice(start, start + layout.slots.shape[2])
            own = slice(layout.slots.shape[3])
            out = _Attend.apply(
                query[..., new, :].transpose(2, 3).flatten(3, 4).contiguous(),
                text_key.to(query.dtype),
                text_value.to(query.dtype),
                key[:, :, :, own],
                value[:, :, :, own],
                kwargs.get("s_aux"),
                layout,
                kwargs.get("softcap"),
            )
            parts.append(out.unflatten(3, (query.shape[2], -1)))
        out = torch.cat(parts, dim=4).permute(0, 2, 4, 1, 3, 5)
        return out.reshape(B, N * Q, query.shape[1] * query.shape[2], -1), None

    def _layout(self, window: int | None, start: int) -> "_Layout":
        """Of the new slots from `start` on, as many as attend at once, under a sliding window or none."""
        if (window, start) not in self.layouts:
            Q, slots = self.slots.shape[2:]
            new = slice(start, min(start + CHUNK_SLOTS, Q))
            own = slice(slots - Q + new.stop)  # no slot sees later ones
            seen, first = self.slots[:, :, new, own], self.first[..., None]
            if window is not None:
                positions = self.positions[..., own]
                ahead = positions[..., new.start - new.stop :, None] - positions[:, :, None]
                seen, first = seen & (ahead < window), torch.maximum(first, self.ahead[..., new] - window + 1)
            self.layouts[window, start] = _Layout(first, self.last, seen, self.spans, self.chunk)
        return self.layouts[window, start]

    def _joined(self, module: torch.nn.Module, new: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Keys and values of all slots. Without a graph, room for twice as many is made when it runs out, so that long
        thoughts are not copied at every token."""
        Q, length = new[0].shape[3], self.slots.shape[3]
        kept = self.own.get(module) or tuple(x[:, :, :, :0] for x in new)
        if torch.is_grad_enabled() or not self.keep:
            joined = tuple(torch.cat([old[:, :, :, : length - Q], x], dim=3) for old, x in zip(kept, new, strict=True))
            if self.keep:
                self.own[module] = joined
            return joined
        if kept[0].shape[3] < length:
            room = tuple(x.new_empty(*x.shape[:3], max(length, 2 * kept[0].shape[3]), x.shape[4]) for x in new)
            for buffer, old in zip(room, kept, strict=True):
                buffer[:, :, :, : length - Q] = old[:, :, :, : length - Q]
            self.own[module] = kept = room
        for buffer, x in zip(kept, new, strict=True):
            buffer[:, :, :, length - Q : length] = x
        return tuple(buffer[:, :, :, :length] for buffer in kept)


class _Layout:
    """
    The chunks of branches, and what each does not see; made once for all layers.

    Args:
        first (`torch.Tensor` of shape `(B, N, Q or 1)`), last (of shape `(B, N)`), slots (of shape `(B, N, Q, s)`, bool), spans,
        chunk:
            As in [`BranchReading`]; `first` by new slot under a sliding window.
    """

    def __init__(self, first, last, slots, spans: list[tuple[int, int]], chunk: int):
        self.first, self.last, self.slots, self.chunk = first, last, slots, chunk
        self.chunks = [
            (slice(i * chunk, (i + 1) * chunk), slice(least, greatest + 1))
            for i, (least, greatest) in enumerate(spans)
        ]

    @functools.cached_property
    def unseen(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Masks of each chunk: over the text, `(B, 1, n, 1, Q or 1, K)`, and over own slots, `(B, 1, n, 1, Q, s)`."""
        index = torch.arange(max(span.stop for _, span in self.chunks), device=self.last.device)
        first, last, own = self.first[:, None, :, None, :, None], self.last[:, None, :, None, None, None], ~self.slots
        return [
            ((index[span] < first[:, :, at]) | (index[span] > last[:, :, at]), own[:, None, at, None])
            for at, span in self.chunks
        ]


class _Attend(torch.autograd.Function):
    """
    Softmax attention of every branch over its text and its own slots, chunk by chunk of branches; the backward computes
    the scores again.

    Queries, already scaled, are `(B, heads, N, R, D)` with R = groups·Q rows of a branch that share keys; text keys `(B,
    heads, T, D)`, own keys `(B, heads, N, s, D)`, sinks (one more logit in the softmax) of one number for each query head.
    """

    @staticmethod
    def forward(ctx, query, text_key, text_value, own_key, own_value, sinks, layout, softcap):
        chunks = _Chunks(query, text_key, own_key, sinks, layout, softcap)
        outs, log_zs = [], []
        for at, span, unseen in chunks:
            scores, own_scores = chunks.scores(at, span, unseen)
            top = torch.maximum(scores.amax(-1), own_scores.amax(-1))
            if sinks is not None:
                top = torch.maximum(top, chunks.sinks.expand_as(top))
            weights, own_weights = (x.sub_(top[..., None]).exp_() for x in (scores, own_scores))
            total = weights.sum(-1).add_(own_weights.sum(-1))
            if sinks is not None:
                total += (chunks.sinks - top).exp()
            own = _product(own_weights.to(query.dtype), own_value[:, :, at])
            seen = _product(weights.to(query.dtype).flatten(2, 3), text_value[:, :, span]).view_as(own)
            outs.append((seen.add_(own) / total[..., None]).to(query.dtype))
            log_zs.append(total.log().add_(top))
        out, log_z = _joined(outs), _joined(log_zs)
        ctx.save_for_backward(query, text_key, text_value, own_key, own_value, sinks, out, log_z)
        ctx.layout, ctx.softcap = layout, softcap
        return out

    @staticmethod
    def backward(ctx, grad):
        query, text_key, text_value, own_key, own_value, sinks, out, log_z = ctx.saved_tensors
        chunks = _Chunks(query, text_key, own_key, sinks, ctx.layout, ctx.softcap)
        grad = grad.contiguous()
        shared = (grad * out).sum(-1, dtype=chunks.dtype)[..., None]
        d_query, d_own_key, d_own_value = [], [], []
        d_text_key, d_text_value = (torch.zeros_like(x, dtype=chunks.dtype) for x in (text_key, text_value))
        for at, span, unseen in chunks:
            q, g = query[:, :, at].flatten(2, 3), grad[:, :, at].flatten(2, 3)
            scores, own_scores = chunks.scores(at, span, unseen)
            slopes = [cap_slope(x, chunks.softcap) for x in (scores, own_scores)]
            weights, own_weights = (x.sub_(log_z[:, :, at, :, None]).exp_() for x in (scores, own_scores))
            d_scores = _product(g, text_value[:, :, span].mT).view_as(weights).to(chunks.dtype)
            d_own_scores = _product(grad[:, :, at], own_value[:, :, at].mT).to(chunks.dtype)
            pairs = zip((d_scores, d_own_scores), (weights, own_weights), slopes, strict=True)
            d_scores, d_own_scores = (
                times_(d.sub_(shared[:, :, at]).mul_(w), factor).to(query.dtype) for d, w, factor in pairs
            )
            flat = d_scores.flatten(2, 3)
            d_text_key[:, :, span] += _product(flat.mT, q)
            d_text_value[:, :, span] += _product(weights.to(query.dtype).flatten(2, 3).mT, g)
            d_own_key.append(_product(d_own_scores.mT, query[:, :, at]))
            d_own_value.append(_product(own_weights.to(query.dtype).mT, grad[:, :, at]))
            by_text = _product(flat, text_key[:, :, span]).view_as(query[:, :, at])
            d_query.append(by_text.add_(_product(d_own_scores, own_key[:, :, at])))
        d_sinks = None
        if sinks is not None:
            share = (chunks.sinks - log_z).exp() * -shared[..., 0]  # (B, heads, N, R)
            d_sinks = share.unflatten(3, (-1, chunks.Q)).sum((0, 2, 4)).view_as(sinks).to(sinks.dtype)
        d_text = (x.to(text_key.dtype) for x in (d_text_key, d_text_value))
        return _joined(d_query), *d_text, _joined(d_own_key), _joined(d_own_value), d_sinks, None, None


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for the same leading dimensions, without the further operations that `@` dispatches to broadcast them."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """What the chunks gave, `(B, heads, n, ...)`, as one tensor of all branches."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _Chunks:
    """The chunks of branches, each as a slice of N, the slice of T that it sees, and masks; and their masked scores."""

    def __init__(self, query, text_key, own_key, sinks, layout: _Layout, softcap: float | None):
        self.query, self.text_key, self.own_key = query, text_key, own_key
        self.layout, self.softcap, self.Q = layout, softcap, layout.slots.shape[2]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        if sinks is not None:  # of query heads: (1, heads, 1, R)
            rows = sinks.to(self.dtype).view(query.shape[1], -1, 1).expand(-1, -1, self.Q)
            self.sinks = rows.flatten(1, 2)[None, :, None]

    def __iter__(self):
        return ((at, span, unseen) for (at, span), unseen in zip(self.layout.chunks, self.layout.unseen, strict=True))

    def scores(
        self, at: slice, span: slice, unseen: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores over the text, `(B, heads, n, R, K)`, and over a branch's own slots, `(B, heads, n, R, s)`."""
        q = self.query[:, :, at]
        over_text = _product(q.flatten(2, 3), self.text_key[:, :, span].mT).view(*q.shape[:-1], -1)
        over_own = _product(q, self.own_key[:, :, at].mT)
        return self._masked(over_text, unseen[0]), self._masked(over_own, unseen[1])

    def _masked(self, scores: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
        """Scores `(B, heads, n, R, K)`, soft-capped, and -inf where `unseen` says so."""
        scores = cap_(scores.to(self.dtype), self.softcap)
        scores.unflatten(3, (-1, self.Q)).masked_fill_(unseen, -torch.inf)
        return scores


def chunk_size(rows: int, keys: int, device: torch.device) -> int:
    """Branches of a chunk, for `rows` rows of scores a branch over so many keys, of the text and its own."""
    if device.type != "cpu":
        return max(GPU_CHUNK_ELEMENTS // (rows * keys), 1)
    return max(min(CHUNK_ELEMENTS // (rows * keys), CHUNK_BRANCHES), 1)


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


def _attention_in_place_of(name: str):
    """An attention function that attends as `name` does, unless a reading says otherwise."""

    def attention(module, query, key, value, attention_mask, quietstar_reading=None, **kwargs):
        files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
        eager = next((vars(file)[EAGER] for file in files if EAGER in vars(file)), None)
        own = AttentionInterface().get_interface(name, eager)
        if quietstar_reading is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        return quietstar_reading(own, module, query, key, value, attention_mask, **kwargs)

    return attention
