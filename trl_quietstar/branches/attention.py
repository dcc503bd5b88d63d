"""Attention of branches to the text they hang off, without a dense mask.

A branch sees a run of text indices, `first` to `last`, and its own earlier slots. So two small products with one softmax
over both replace a `(T + N·S)²` mask: the cost grows with what is seen, the memory with what is kept.

A forward that brings a [`TextReading`] or a [`BranchReading`] attends so, in a model that [`interface`] has prepared.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..model.family import cap_, cap_slope, times_


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
            # in one piece, or every product on another device than a CPU would copy them again
            kept = KeysValues(key, value)
            self.memory.layers[module] = kept if key.device.type == "cpu" else kept.map(torch.Tensor.contiguous)
        self.memory.has_windows |= kwargs.get("sliding_window") is not None
        return attention(module, query, key, value, attention_mask, **kwargs)


@dataclass(frozen=True)
class SeenText:
    """
    What branches see of the text.

    Parameters:
        first, last (`torch.Tensor` of shape `(B, N)`):
            Text indices that a branch sees.
        spans (`list[tuple[int, int]]`):
            For each chunk of branches the least `first` and the greatest `last` over the batch.
        chunk (`int`):
            Branches of a chunk.
    """

    first: torch.Tensor
    last: torch.Tensor
    spans: list[tuple[int, int]]
    chunk: int


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
        text ([`SeenText`]):
            What branches see of it.
        slots (`torch.Tensor` of shape `(B, N, Q, s + Q)`, bool):
            Which slots of its branch a new slot sees, new ones included.
        positions (`torch.Tensor` of shape `(B, N, s + Q)`), now (of shape `(B, N, Q)`):
            Position ids of a branch's slots, and of the new ones.
        keep (`bool`):
            Whether more slots will follow.
        slot (`torch.Tensor` of shape `(1,)`, *optional*):
            Where the one new slot is written. Then `own` has room for all slots, `slots` says which of them are there, and s + Q is their
            number. Defaults to behind the earlier ones.
        layouts (`dict`):
            A [`_Layout`] for each sliding window and first new slot; layers share them.
    """

    memory: TextMemory
    own: dict[torch.nn.Module, KeysValues]
    text: SeenText
    slots: torch.Tensor
    positions: torch.Tensor
    now: torch.Tensor
    keep: bool
    slot: torch.Tensor | None = None
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
        text = self.memory.layers[module]
        own = KeysValues(*(x.to(query.dtype).unflatten(2, (N, Q)) for x in (key, value)))
        if module in self.own or self.keep:
            own = self._with_earlier(module, own)
        window = kwargs.get("sliding_window")
        query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        query = query.unflatten(2, (N, Q)).unflatten(1, (own.keys.shape[1], -1))  # (B, heads, groups, N, Q, D)
        parts = []
        for start in range(0, Q, CHUNK_SLOTS):
            layout = self._layout(window, start)
            new = slice(start, start + layout.slots.shape[2])
            earlier = slice(layout.slots.shape[3])
            out = _Attend.apply(
                query[..., new, :].transpose(2, 3).flatten(3, 4).contiguous(),
                *text.map(lambda x: x.to(query.dtype)),
                *own.map(lambda x: x[:, :, :, earlier]),  # noqa: B023  # called at once
                kwargs.get("s_aux"),
                layout,
                kwargs.get("softcap"),
            )
            parts.append(out.unflatten(3, (query.shape[2], -1)))
        out = torch.cat(parts, dim=4).permute(0, 2, 4, 1, 3, 5)
        return out.reshape(B, N * Q, query.shape[1] * query.shape[2], -1), None

    def _layout(self, window: int | None, start: int) -> "_Layout":
        """The layout of the new slots from `start` on, as many as attend at once, under a sliding window or none."""
        if (window, start) not in self.layouts:
            Q, slots = self.slots.shape[2:]
            new = slice(start, min(start + CHUNK_SLOTS, Q))
            own = slice(slots - Q + new.stop)  # no slot sees later ones
            seen, first = self.slots[:, :, new, own], self.text.first[..., None]
            if window is not None:
                now = self.now[..., new]
                ahead = now[..., None] - self.positions[:, :, None, own]
                # a document's positions begin at 0, where its first token stands
                seen, first = seen & (ahead < window), torch.maximum(first, first + now - window + 1)
            self.layouts[window, start] = _Layout(first, seen, self.text)
        return self.layouts[window, start]

    def _with_earlier(self, module: torch.nn.Module, new: KeysValues) -> KeysValues:
        """Keys and values of all slots: those that were kept, then the new ones."""
        Q, length = new.keys.shape[3], self.slots.shape[3]
        if self.slot is not None:
            return KeysValues(
                *(buffer.index_copy_(3, self.slot, x) for buffer, x in zip(self.own[module], new, strict=True))
            )
        kept = self.own.get(module) or new.map(lambda x: x[:, :, :, :0])
        if torch.is_grad_enabled() or not self.keep:
            earlier = kept.map(lambda x: x[:, :, :, : length - Q])
            joined = KeysValues(*(torch.cat(pair, dim=3) for pair in zip(earlier, new, strict=True)))
            if self.keep:
                self.own[module] = joined
            return joined
        # without a graph they are written into a buffer, which doubles when it is full: nothing is copied at every token
        if kept.keys.shape[3] < length:
            size = max(length, 2 * kept.keys.shape[3])
            room = new.map(lambda x: x.new_empty(*x.shape[:3], size, x.shape[4]))
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
        text_unseen (`torch.Tensor` of shape `(B, 1, n, 1, Q or 1, K)`), own_unseen (of shape `(B, 1, n, 1, Q, s)`):
            What a new slot does not see of that part of the text, and of its branch's slots.
    """

    branches: slice
    text: slice
    text_unseen: torch.Tensor
    own_unseen: torch.Tensor


class _Layout:
    """
    The chunks of branches, and what each does not see; made once for all layers.

    Args:
        first (`torch.Tensor` of shape `(B, N, Q or 1)`):
            As in [`SeenText`]; by new slot under a sliding window.
        slots (`torch.Tensor` of shape `(B, N, Q, s)`, bool), text ([`SeenText`]):
            As in [`BranchReading`].
    """

    def __init__(self, first: torch.Tensor, slots: torch.Tensor, text: SeenText):
        self.first, self.slots, self.text = first, slots, text

    @functools.cached_property
    def chunks(self) -> list[_Chunk]:
        """The chunks, in order."""
        spans, chunk, last = self.text.spans, self.text.chunk, self.text.last
        index = torch.arange(max(greatest for _, greatest in spans) + 1, device=last.device)
        first, last = self.first[:, None, :, None, :, None], last[:, None, :, None, None, None]
        own_unseen, chunks = ~self.slots, []
        for i, (least, greatest) in enumerate(spans):
            at, text = slice(i * chunk, (i + 1) * chunk), slice(least, greatest + 1)
            unseen = (index[text] < first[:, :, at]) | (index[text] > last[:, :, at])
            chunks.append(_Chunk(at, text, unseen, own_unseen[:, None, at, None]))
        return chunks


class _Attend(torch.autograd.Function):
    """
    Softmax attention of every branch over its text and its own slots, chunk by chunk of branches; the backward computes
    the scores again.

    Queries, already scaled, are `(B, heads, N, R, D)` with R = groups·Q rows of a branch that share keys; text keys `(B,
    heads, T, D)`, own keys `(B, heads, N, s, D)`, sinks (one more logit in the softmax) of one number for each query head.

    Of a row with query `q`, with keys `k_j` and values `v_j` of text and own slots together, the soft-cap `c` and the sink `σ`:

        s_j = c(q·k_j)        Z = Σ_j exp(s_j) + exp(σ)        p_j = exp(s_j − log Z)        o = Σ_j p_j v_j

    With the gradient `g` of `o` that comes in, `∂p_j/∂s_i = p_j ([i = j] − p_i)` gives, over what the row sees,

        δ = Σ_j p_j (g·v_j) = g·o               gradient of s_j = p_j (g·v_j − δ)
        d_j = p_j (g·v_j − δ) c'(q·k_j)         gradient of q = Σ_j d_j k_j
        gradient of k_j = Σ_rows d_j q          gradient of v_j = Σ_rows p_j g
        gradient of σ = −Σ_rows exp(σ − log Z) δ
    """

    @staticmethod
    def forward(ctx, query, text_key, text_value, own_key, own_value, sinks, layout, softcap):
        scoring = _Scores(query, text_key, own_key, sinks, layout, softcap)
        outs, log_zs = [], []
        for chunk in layout.chunks:
            scores, own_scores = scoring.of(chunk)
            # one softmax over both parts, less their common greatest score, so that no exponential overflows
            top = torch.maximum(scores.amax(-1), own_scores.amax(-1))
            if sinks is not None:
                top = torch.maximum(top, scoring.sinks.expand_as(top))
            weights, own_weights = (x.sub_(top[..., None]).exp_() for x in (scores, own_scores))
            total = weights.sum(-1).add_(own_weights.sum(-1))
            if sinks is not None:
                total += (scoring.sinks - top).exp()
            own = _product(own_weights.to(query.dtype), own_value[:, :, chunk.branches])
            seen = _product(weights.to(query.dtype).flatten(2, 3), text_value[:, :, chunk.text]).view_as(own)
            outs.append((seen.add_(own) / total[..., None]).to(query.dtype))
            log_zs.append(total.log().add_(top))
        out, log_z = _joined(outs), _joined(log_zs)
        ctx.save_for_backward(query, text_key, text_value, own_key, own_value, sinks, out, log_z)
        ctx.layout, ctx.softcap = layout, softcap
        return out

    @staticmethod
    def backward(ctx, grad):
        query, text_key, text_value, own_key, own_value, sinks, out, log_z = ctx.saved_tensors
        scoring = _Scores(query, text_key, own_key, sinks, ctx.layout, ctx.softcap)
        grad = grad.contiguous()
        delta = (grad * out).sum(-1, dtype=scoring.dtype)[..., None]
        d_query, d_own_key, d_own_value = [], [], []
        # the text's keys and values add up over all branches: in at least float32
        d_text_key, d_text_value = (torch.zeros_like(x, dtype=scoring.dtype) for x in (text_key, text_value))
        for chunk in ctx.layout.chunks:
            at, text = chunk.branches, chunk.text
            q, g = query[:, :, at].flatten(2, 3), grad[:, :, at].flatten(2, 3)
            scores, own_scores = scoring.of(chunk)
            # before the scores become weights in place
            slopes = [cap_slope(x, ctx.softcap) for x in (scores, own_scores)]
            weights, own_weights = (x.sub_(log_z[:, :, at, :, None]).exp_() for x in (scores, own_scores))
            d_scores = _product(g, text_value[:, :, text].mT).view_as(weights).to(scoring.dtype)
            d_own_scores = _product(grad[:, :, at], own_value[:, :, at].mT).to(scoring.dtype)
            pairs = zip((d_scores, d_own_scores), (weights, own_weights), slopes, strict=True)
            d_scores, d_own_scores = (
                times_(d.sub_(delta[:, :, at]).mul_(p), slope).to(query.dtype) for d, p, slope in pairs
            )
            flat = d_scores.flatten(2, 3)
            d_text_key[:, :, text] += _product(flat.mT, q)
            d_text_value[:, :, text] += _product(weights.to(query.dtype).flatten(2, 3).mT, g)
            d_own_key.append(_product(d_own_scores.mT, query[:, :, at]))
            d_own_value.append(_product(own_weights.to(query.dtype).mT, grad[:, :, at]))
            by_text = _product(flat, text_key[:, :, text]).view_as(query[:, :, at])
            d_query.append(by_text.add_(_product(d_own_scores, own_key[:, :, at])))
        d_sinks = None
        if sinks is not None:
            of_rows = (scoring.sinks - log_z).exp() * -delta[..., 0]  # (B, heads, N, R)
            d_sinks = of_rows.unflatten(3, (-1, scoring.Q)).sum((0, 2, 4)).view_as(sinks).to(sinks.dtype)
        d_text = (x.to(text_key.dtype) for x in (d_text_key, d_text_value))
        return _joined(d_query), *d_text, _joined(d_own_key), _joined(d_own_value), d_sinks, None, None


class _Scores:
    """
    Soft-capped, masked scores, in at least float32.

    Args:
        query (`torch.Tensor` of shape `(B, heads, N, R, D)`), text_key, own_key, sinks, layout, softcap:
            As in [`_Attend`].
    """

    def __init__(self, query, text_key, own_key, sinks: torch.Tensor | None, layout: _Layout, softcap: float | None):
        self.query, self.text_key, self.own_key = query, text_key, own_key
        self.softcap, self.Q = softcap, layout.slots.shape[2]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        if sinks is not None:  # of query heads, to (1, heads, 1, R)
            rows = sinks.to(self.dtype).view(query.shape[1], -1, 1).expand(-1, -1, self.Q)
            self.sinks = rows.flatten(1, 2)[None, :, None]

    def of(self, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores over the text, `(B, heads, n, R, K)`, and over a branch's own slots, `(B, heads, n, R, s)`."""
        q = self.query[:, :, chunk.branches]
        over_text = _product(q.flatten(2, 3), self.text_key[:, :, chunk.text].mT).view(*q.shape[:-1], -1)
        over_own = _product(q, self.own_key[:, :, chunk.branches].mT)
        return self._masked(over_text, chunk.text_unseen), self._masked(over_own, chunk.own_unseen)

    def _masked(self, scores: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
        """Scores `(B, heads, n, R, K)`, soft-capped, and -inf where `unseen` says so."""
        scores = cap_(scores.to(self.dtype), self.softcap)
        scores.unflatten(3, (-1, self.Q)).masked_fill_(unseen, -torch.inf)
        return scores


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for equal leading dimensions, without the further operations by which `@` broadcasts them."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """What the chunks gave, `(B, heads, n, ...)`, as one tensor of all branches."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def chunk_size(rows: int, keys: int, device: torch.device) -> int:
    """How many branches make a chunk, if each has `rows` rows of scores over `keys` keys of the text and its own."""
    if device.type != "cpu":
        return max(GPU_CHUNK_ELEMENTS // (rows * keys), 1)
    return max(min(CHUNK_ELEMENTS // (rows * keys), CHUNK_BRANCHES), 1)
