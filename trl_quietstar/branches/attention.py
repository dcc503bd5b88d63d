"""Attention of branches to the text they hang off, without a dense mask.

A branch sees a run of text indices, `first` to `last`, and its own earlier slots. So two small products with one softmax
over both replace a `(T + N·S)²` mask: the cost grows with what is seen, the memory with what is kept.

[`enable`] gives a model an attention that does what the family's own did, until a forward brings a [`TextReading`] or a
[`BranchReading`]. That works in every family that dispatches its attention through Transformers' `AttentionInterface`.
"""

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .._compat import attention_of, can_set_attention, takes_sdpa
from ..model.family import cap_, cap_slope, times_
from ..model.lm_head import compute_dtype


logger = logging.getLogger(__name__)

PREFIX = "quietstar_"  # of the implementation's name, before the one it stands in for
EAGER = "eager_attention_forward"  # which each family has of its own
OWN_MASKS = ("flash", "flex", "paged")  # implementations named so take their masks in forms of their own
CHUNK_ELEMENTS = 2**20  # attention scores held at once on a CPU, so that they stay in its cache
CHUNK_BRANCHES = 64  # branches of a chunk there: a shorter one skips more text that none of its branches sees
GPU_CHUNK_ELEMENTS = 2**26  # scores held at once on any other device, which needs that much to be busy (256 MB)
CHUNK_SLOTS = 256  # new slots of a branch that attend at once: memory grows with a thought and not with its square


class KeysValues(NamedTuple):
    """Keys and values of an attention layer: `(B, heads, T, D)` of a text, `(B, heads, N, s, D)` of slots; each with its D."""

    keys: torch.Tensor
    values: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "KeysValues":
        """Both after a function."""
        return KeysValues(function(self.keys), function(self.values))


@dataclass
class TextMemory:
    """
    What the attention layers keep of a text, as one forward left it.

    Parameters:
        layers (`dict`):
            The [`KeysValues`] of each attention module, of shape `(B, heads, T, D)`.
        has_windows (`bool`):
            Whether any layer named its sliding window.
    """

    layers: dict[torch.nn.Module, KeysValues] = field(default_factory=dict)
    has_windows: bool = False

    def rows(self, index: torch.Tensor) -> "TextMemory":
        """That of some texts, by an index of shape `(rows,)`."""
        layers = {module: kept.map(lambda x: x[index]) for module, kept in self.layers.items()}
        return TextMemory(layers, self.has_windows)


@dataclass(frozen=True)
class TextReading:
    """A forward over the text itself; each layer leaves its keys and values in `memory`."""

    memory: TextMemory

    def attend(self, attention: Callable, module: torch.nn.Module, query, key, value, attention_mask, **kwargs):
        """Attends as the family does; arguments after the first are those of Transformers' attention functions."""
        # a checkpointed layer comes by again in the backward; the first keys are those of the graph
        if module not in self.memory.layers:
            # as products take them, or each would convert and copy them again
            dtype = compute_dtype(query)
            self.memory.layers[module] = KeysValues(key, value).map(lambda x: x.to(dtype).contiguous())
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
            The [`KeysValues`] of the branches' earlier slots, by attention module, of shape `(B, heads, N, s or more, D)`. The
            forward adds the new slots where `keep` is set.
        first, last (`torch.Tensor` of shape `(B, N)`):
            Text indices that a branch sees.
        spans (`list[tuple[int, int]]`):
            For each chunk of branches the least `first` and the greatest `last` over the batch.
        chunk (`int`):
            Branches of a chunk.
        slots (`torch.Tensor` of shape `(B, N, Q, s + Q)`, bool):
            Which slots of its branch a new slot sees, new ones included.
        positions (`torch.Tensor` of shape `(B, N, s + Q)`):
            Position ids of a branch's slots; sliding windows need them.
        ahead (`torch.Tensor` of shape `(B, N, Q)`):
            How many positions a new slot is ahead of text index 0; sliding windows need it.
        keep (`bool`):
            Whether more slots will follow.
        sees_all (`bool`):
            Whether each new slot sees all slots of its branch, as far as the host knows.
        layouts (`dict`):
            A [`_Layout`] for each sliding window and first new slot; layers share them.
    """

    memory: TextMemory
    own: dict[torch.nn.Module, KeysValues]
    first: torch.Tensor
    last: torch.Tensor
    spans: list[tuple[int, int]]
    chunk: int
    slots: torch.Tensor
    positions: torch.Tensor
    ahead: torch.Tensor
    keep: bool
    sees_all: bool
    layouts: dict[tuple[int | None, int], "_Layout"] = field(default_factory=dict)

    def attend(
        self,
        attention: Callable,
        module: torch.nn.Module,
        query,
        key,
        value,
        attention_mask,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """
        Attends to the text and to the branches' slots in place of `attention`; arguments after it are those of
        Transformers' attention functions.

        Raises:
            `ValueError`: if attention weights are dropped, or the layer adds a learned position bias.
        """
        if dropout:
            raise ValueError(f"Attention dropout of {dropout} is not applied to branches; set `disable_dropout=True`.")
        if kwargs.get("position_bias") is not None:
            raise ValueError("An attention with a learned position bias cannot branch.")
        B, N, Q, _ = self.slots.shape
        dtype = compute_dtype(query)
        text = self.memory.layers[module].map(lambda x: x.to(dtype))
        own = KeysValues(key, value).map(lambda x: x.view(*x.shape[:2], N, Q, x.shape[3]))
        own = self._with_earlier(module, own, dtype)
        heads = text.keys.shape[1]
        query = query.view(B, heads, query.shape[1] // heads, N, Q, query.shape[3])
        scaling = query.shape[5] ** -0.5 if scaling is None else scaling
        attend = _Attend.apply if torch.is_grad_enabled() else functools.partial(_Attend.forward, None)
        parts = []
        for start in range(0, Q, CHUNK_SLOTS):
            layout = self._layout(kwargs.get("sliding_window"), start)
            new, earlier = slice(start, start + layout.Q), slice(layout.length)
            earlier_own = own.map(lambda x: x[:, :, :, earlier].to(dtype))  # noqa: B023  # called at once
            given = (kwargs.get("s_aux"), layout, scaling, kwargs.get("softcap"))
            parts.append(attend(query[..., new, :], *text, *earlier_own, *given))
        return _joined(parts, 2).view(B, N * Q, heads * query.shape[2], -1), None

    def _layout(self, window: int | None, start: int) -> "_Layout":
        """The layout of the new slots from `start` on, as many as attend at once, under a sliding window or none."""
        if (window, start) not in self.layouts:
            Q, slots = self.slots.shape[2:]
            new = slice(start, min(start + CHUNK_SLOTS, Q))
            own = slice(slots - Q + new.stop)  # no slot sees later ones
            seen, first = self.slots[:, :, new, own], self.first[..., None]
            if window is not None:
                positions = self.positions[..., own]
                ahead = positions[..., new.start - new.stop :, None] - positions[:, :, None]
                seen, first = seen & (ahead < window), torch.maximum(first, self.ahead[..., new] - window + 1)
            sees_all = self.sees_all and (window is None or slots <= window)
            self.layouts[window, start] = _Layout(first, self.last, seen, self.spans, self.chunk, sees_all)
        return self.layouts[window, start]

    def _with_earlier(self, module: torch.nn.Module, new: KeysValues, dtype: torch.dtype) -> KeysValues:
        """Keys and values of all slots: those that were kept, then the new ones."""
        Q, length = new.keys.shape[3], self.slots.shape[3]
        if not self.keep and module not in self.own:
            return new.map(lambda x: x.to(dtype))
        kept = self.own.get(module) or new.map(lambda x: x[:, :, :, :0].to(dtype))
        if torch.is_grad_enabled() or not self.keep:
            pairs = zip(kept, new, strict=True)
            joined = KeysValues(*(torch.cat([x[:, :, :, : length - Q], y.to(dtype)], dim=3) for x, y in pairs))
            if self.keep:
                self.own[module] = joined
            return joined
        # without a graph they are written into a buffer, which doubles when it is full: nothing is copied at every token
        if kept.keys.shape[3] < length:
            size = max(length, 2 * kept.keys.shape[3])
            room = kept.map(lambda x: x.new_empty(*x.shape[:3], size, x.shape[4]))
            for buffer, old in zip(room, kept, strict=True):
                buffer[:, :, :, : length - Q] = old[:, :, :, : length - Q]
            self.own[module] = kept = room
        for buffer, x in zip(kept, new, strict=True):
            buffer[:, :, :, length - Q : length] = x
        return kept.map(lambda x: x[:, :, :, :length])


class _Chunk(NamedTuple):
    """
    A run of n branches that attend together, and what they see.

    Parameters:
        branches, text (`slice`):
            Of N, and of T: the K text indices that any of them sees.
        text_unseen (`torch.Tensor` of shape `(B, 1, n, 1, Q or 1, K)`), own_unseen (of shape `(B, 1, n, 1, Q, s)`, *optional*):
            What a new slot does not see of that part of the text, and of its branch's slots. None: it sees all of those.
    """

    branches: slice
    text: slice
    text_unseen: torch.Tensor
    own_unseen: torch.Tensor | None


class _Layout:
    """
    The chunks of branches, and what each does not see; made once for all layers.

    Args:
        first (`torch.Tensor` of shape `(B, N, Q or 1)`), last (of shape `(B, N)`), slots (of shape `(B, N, Q, s)`, bool), spans,
        chunk, sees_all:
            As in [`BranchReading`]; `first` by new slot under a sliding window.
    """

    def __init__(
        self,
        first: torch.Tensor,
        last: torch.Tensor,
        slots: torch.Tensor,
        spans: list[tuple[int, int]],
        chunk: int,
        sees_all: bool = False,
    ):
        self.first, self.last, self.slots, self.spans = first, last, slots, spans
        self.chunk, self.sees_all = chunk, sees_all
        self.Q, self.length = slots.shape[2:]

    @functools.cached_property
    def chunks(self) -> list[_Chunk]:
        """The chunks, in order."""
        index = torch.arange(max(greatest for _, greatest in self.spans) + 1, device=self.last.device)
        first, last = self.first[:, None, :, None, :, None], self.last[:, None, :, None, None, None]
        own_unseen, chunks = None if self.sees_all else ~self.slots[:, None, :, None], []
        for i, (least, greatest) in enumerate(self.spans):
            at, text = slice(i * self.chunk, (i + 1) * self.chunk), slice(least, greatest + 1)
            unseen = (index[text] < first[:, :, at]) | (index[text] > last[:, :, at])
            chunks.append(_Chunk(at, text, unseen, None if own_unseen is None else own_unseen[:, :, at]))
        return chunks


class _Attend(torch.autograd.Function):
    """
    Softmax attention of every branch over its text and its own slots, chunk by chunk of branches; the backward computes
    the scores again. `forward` is also called by itself, without a context, where there is no graph.

    Queries are `(B, heads, groups, N, Q, D)`, where heads are those of keys, each shared by a group; text keys `(B, heads, T, D)`,
    own keys `(B, heads, N, s, D)`, sinks (one more logit in the softmax) of one number for each query head. What it gives is `(B,
    N, Q, heads, groups, D)`.

    Of a row with query `q`, already scaled, with keys `k_j` and values `v_j` of text and own slots together, the soft-cap `c` and
    the sink `σ`:

        s_j = c(q·k_j)        Z = Σ_j exp(s_j) + exp(σ)        p_j = exp(s_j − log Z)        o = Σ_j p_j v_j

    With the gradient `g` of `o` that comes in, `∂p_j/∂s_i = p_j ([i = j] − p_i)` gives, over what the row sees,

        δ = Σ_j p_j (g·v_j) = g·o               gradient of s_j = p_j (g·v_j − δ)
        d_j = p_j (g·v_j − δ) c'(q·k_j)         gradient of q = Σ_j d_j k_j
        gradient of k_j = Σ_rows d_j q          gradient of v_j = Σ_rows p_j g
        gradient of σ = −Σ_rows exp(σ − log Z) δ
    """

    @staticmethod
    def forward(ctx, query, text_key, text_value, own_key, own_value, sinks, layout, scaling, softcap):
        query = query.transpose(2, 3)  # (B, heads, N, groups, Q, D)
        rows = torch.empty(query.shape, dtype=text_key.dtype, device=query.device)
        # scaled, converted and in one piece by one kernel; R = groups·Q rows of a branch share keys
        rows = torch.mul(query, scaling, out=rows).flatten(3, 4)
        outs = []
        for chunk in layout.chunks:
            at = chunk.branches
            scores, _, keys = _scores(rows[:, :, at], text_key, own_key, sinks, chunk, layout.Q, softcap)
            scores = scores.softmax(-1, dtype=scores.dtype)[..., :keys].to(rows.dtype)
            out = _weighted(scores, text_value[:, :, chunk.text], own_value[:, :, at])
            del scores  # before those of the next chunk are made
            outs.append(out.view(*out.shape[:3], -1, layout.Q, out.shape[4]).permute(0, 2, 4, 1, 3, 5))
        out = _joined(outs, 1).contiguous()
        if ctx is not None:
            ctx.save_for_backward(rows, text_key, text_value, own_key, own_value, sinks, out)
            ctx.layout, ctx.scaling, ctx.softcap = layout, scaling, softcap
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, text_key, text_value, own_key, own_value, sinks, out = ctx.saved_tensors
        dtype, Q = torch.promote_types(rows.dtype, torch.float32), ctx.layout.Q
        delta = (grad * out).sum(-1, dtype=dtype).permute(0, 3, 1, 4, 2).flatten(3)[..., None]
        grad = grad.permute(0, 3, 1, 4, 2, 5).contiguous().flatten(3, 4)  # (B, heads, N, R, D), as the rows
        d_query, d_own_key, d_own_value = [], [], []
        # the text's keys and values add up over all branches: in at least float32
        d_text_key, d_text_value = (torch.zeros_like(x, dtype=dtype) for x in (text_key, text_value))
        d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=dtype)
        for chunk in ctx.layout.chunks:
            at, text = chunk.branches, chunk.text
            q, g = rows[:, :, at], grad[:, :, at]
            weights, K, keys = _scores(q, text_key, own_key, sinks, chunk, Q, ctx.softcap)
            slope = cap_slope(weights[..., :keys], ctx.softcap)
            weights = weights.to(dtype).softmax(-1)
            d_scores = _over_both(g, text_value[:, :, text], own_value[:, :, at]).to(dtype).sub_(delta[:, :, at])
            d_scores = times_(d_scores.mul_(weights[..., :keys]), slope).to(q.dtype)
            if sinks is not None:
                of_rows = (weights[..., -1:] * delta[:, :, at]).view(*q.shape[:3], -1, Q)
                d_sinks -= of_rows.sum((0, 2, 4)).view_as(d_sinks)
            weights = weights.to(q.dtype)
            d_text_key[:, :, text].add_(_product(d_scores[..., :K].flatten(2, 3).mT, q.flatten(2, 3)))
            d_text_value[:, :, text].add_(_product(weights[..., :K].flatten(2, 3).mT, g.flatten(2, 3)))
            d_own_key.append(_product(d_scores[..., K:].mT, q))
            d_own_value.append(_product(weights[..., K:keys].mT, g))
            d_query.append(_weighted(d_scores, text_key[:, :, text], own_key[:, :, at]))
            del weights, d_scores, slope
        of_query = _joined(d_query, 2).view(*rows.shape[:3], -1, Q, rows.shape[4]).transpose(2, 3) * ctx.scaling
        d_text = (x.to(text_key.dtype) for x in (d_text_key, d_text_value))
        return of_query, *d_text, _joined(d_own_key, 2), _joined(d_own_value, 2), d_sinks, None, None, None


def _scores(
    rows, text_key, own_key, sinks, chunk: _Chunk, Q: int, softcap: float | None
) -> tuple[torch.Tensor, int, int]:
    """Soft-capped, masked scores of a chunk's rows over K text indices and s own slots, and the sink after them: `(B, heads, n, R, K +
    s or more)`. Also returns K and K + s."""
    scores = _over_both(rows, text_key[:, :, chunk.text], own_key[:, :, chunk.branches])
    K, keys = chunk.text_unseen.shape[-1], scores.shape[-1]
    if softcap is not None:
        scores = cap_(scores.to(torch.promote_types(scores.dtype, torch.float32)), softcap)
    by_slot = scores.view(*scores.shape[:3], -1, Q, keys)
    by_slot[..., :K].masked_fill_(chunk.text_unseen, -torch.inf)
    if chunk.own_unseen is not None:
        by_slot[..., K:].masked_fill_(chunk.own_unseen, -torch.inf)
    if sinks is not None:
        column = sinks.view(rows.shape[1], 1, -1, 1, 1).expand(*by_slot.shape[:-1], 1)
        scores = torch.cat([scores, column.flatten(3, 4)], dim=-1)
    return scores, K, keys


def _over_both(rows: torch.Tensor, text: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Products of rows `(B, heads, n, R, D)` with those of text, `(B, heads, K, D)`, and of own slots, `(B, heads, n, s, D)`:
    `(B, heads, n, R, K + s)`."""
    over_text = _product(rows.flatten(2, 3), text.mT).view(*rows.shape[:-1], -1)
    return torch.cat([over_text, _product(rows, own.mT)], dim=-1)


def _weighted(weights: torch.Tensor, text: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Sums over text, `(B, heads, K, D)`, and own slots, `(B, heads, n, s, D)`, by weights `(B, heads, n, R, K + s)`: `(B, heads, n,
    R, D)`."""
    K = text.shape[2]
    out = _product(weights[..., :K].flatten(2, 3), text).view(*weights.shape[:-1], -1)
    out.flatten(0, 2).baddbmm_(weights[..., K:].flatten(0, 2), own.flatten(0, 2))
    return out


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for equal leading dimensions, without the further operations by which `@` broadcasts them."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """What chunks or parts gave, as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def chunk_size(rows: int, keys: int, device: torch.device) -> int:
    """How many branches make a chunk, if each has `rows` rows of scores over `keys` keys of the text and its own."""
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


def _attention_in_place_of(name: str) -> Callable:
    """An attention function that attends as `name` does, unless a reading says otherwise."""

    def attention(module, query, key, value, attention_mask, quietstar_reading=None, **kwargs):
        files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
        eager = next((vars(file)[EAGER] for file in files if EAGER in vars(file)), None)
        own = AttentionInterface().get_interface(name, eager)
        if quietstar_reading is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        return quietstar_reading(own, module, query, key, value, attention_mask, **kwargs)

    return attention
