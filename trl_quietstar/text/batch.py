"""Where thoughts hang off a text: positions, branches, attention and position ids.

Everything here is integer bookkeeping on a padded batch of texts; nothing runs a model. Letters, everywhere in this
package: B sequences, T text tokens, J thought positions, G thoughts a position, N = J·G branches, L thought tokens,
M talk tokens, S = L + M + 1 branch slots, H hidden, V vocabulary.

A branch is `start, thought (L), end, first M - 1 talk tokens`; the slot `s` predicts what slot `s + 1` holds, except
that the last thought token predicts nothing and the end slot predicts the first talk token.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from .transfer import Placed


@dataclass(frozen=True)
class Text(Placed):
    """
    A padded batch of texts, each row holding one document or several packed ones.

    Parameters:
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids; anything at padded places.
        attention_mask (`torch.Tensor` of shape `(B, T)`, bool):
            True on text, False on padding (left or right).
        labels (`torch.Tensor` of shape `(B, T)`):
            Token ids, or -100 where a token is not to be predicted (a prompt, say).
        position_ids (`torch.Tensor` of shape `(B, T)`):
            Index of each token within its own document; 0 starts a document.
        document_ids (`torch.Tensor` of shape `(B, T)`):
            Which document of the row a token belongs to, counted from 1; 0 on padding.
        thought_mask (`torch.Tensor` of shape `(B, T)`, bool):
            Whether a thought may follow a token, as far as the data say.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    thought_mask: torch.Tensor

    @classmethod
    def from_batch(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        thought_mask: torch.Tensor | None = None,
    ) -> "Text":
        """
        Builds the text from what a collator gives; without `position_ids`, each row is one document.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`):
                Token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 on text. Defaults to all text.
            labels (`torch.Tensor` of shape `(B, T)`, *optional*):
                Defaults to `input_ids`. Padding is masked here in any case.
            position_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                Positions that restart at 0 with each packed document.
            thought_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 where a thought may follow. Defaults to everywhere.
        """
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        labels = input_ids if labels is None else labels
        if position_ids is None:
            position_ids = mask.long().cumsum(1) - 1
        position_ids = position_ids.masked_fill(~mask, 0)
        document_ids = ((position_ids == 0) & mask).long().cumsum(1).masked_fill(~mask, 0)
        thought_mask = mask if thought_mask is None else thought_mask.bool()
        return cls(input_ids, mask, labels.masked_fill(~mask, -100), position_ids, document_ids, thought_mask)

    @property
    def is_plain(self) -> bool:
        """Whether each row is one document, padded on the right if at all: a causal mask is all it needs."""
        mask, documents = self.host.attention_mask, self.host.document_ids
        return bool((documents <= 1).all() and mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all())

    def rows(self, index: torch.Tensor) -> "Text":
        """The texts at an index `(rows,)` in the host's memory."""
        chosen = (getattr(self.host, field.name)[index] for field in fields(self))
        return Text(*chosen).to(self.input_ids.device)

    def predicted(self) -> torch.Tensor:
        """Mask of shape `(B, T - 1)`: the token after this one belongs to the same document and is a label."""
        same_document = self.document_ids[:, :-1] == self.document_ids[:, 1:]
        return self.attention_mask[:, :-1] & same_document & (self.labels[:, 1:] != -100)


@dataclass(frozen=True)
class Positions(Placed):
    """Thought positions: `index` of shape `(B, J)` into the text, and `mask` of the same shape (rows are ragged)."""

    index: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Thoughts:
    """
    Thoughts at positions.

    Parameters:
        positions ([`Positions`]):
            Where they are.
        token_ids, mask (`torch.Tensor` of shape `(B, J, G, L)`):
            Their tokens, and which exist (False after an early end).
        filler (`bool`):
            Whether the start embedding stands in place of every token: compute without content, for controls.
    """

    positions: Positions
    token_ids: torch.Tensor
    mask: torch.Tensor
    filler: bool = False

    @functools.cached_property
    def host_mask(self) -> torch.Tensor:
        """The mask in the host's memory; a copy, once, only where it did not come from there."""
        return self.mask.cpu()

    @property
    def anchors(self) -> torch.Tensor:
        """The text index that each branch hangs off, `(B, J·G)`, in the host's memory."""
        return self.positions.host.index.repeat_interleave(self.mask.shape[2], dim=1)


@dataclass(frozen=True)
class Branches:
    """
    What a path runs through the model after each anchor.

    Parameters:
        anchors (`torch.Tensor` of shape `(B, N)`):
            The text index each branch hangs off, in the host's memory.
        embeds (`torch.Tensor` of shape `(B, N, S, E)`):
            Input embeddings of the slots, as [`~model.embeddings.embed_tokens`] gives them.
        mask (`torch.Tensor` of shape `(B, N, S)`, bool):
            False on slots that hold nothing; later slots then move up.
    """

    anchors: torch.Tensor
    embeds: torch.Tensor
    mask: torch.Tensor

    def split(self, size: int | None) -> list["Branches"]:
        """Groups of `size` branches of each row; None: one group."""
        if size is None:
            return [self]
        parts = (x.split(size, dim=1) for x in (self.anchors, self.embeds, self.mask))
        return [Branches(*part) for part in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Talk(Placed):
    """The true tokens after each position: `token_ids`, `input_mask` (exists) and `target_mask` (exists and is a
    label), each of shape `(B, J, M)`."""

    token_ids: torch.Tensor
    input_mask: torch.Tensor
    target_mask: torch.Tensor


def talk_after(text: Text, positions: Positions, talk_length: int) -> Talk:
    """
    The next `talk_length` true tokens after each position, within the same document.

    Args:
        text ([`Text`]):
            The batch.
        positions ([`Positions`]):
            Thought positions.
        talk_length (`int`):
            M.
    """
    device, text, positions = text.input_ids.device, text.host, positions.host
    index = positions.index[..., None] + torch.arange(1, talk_length + 1)
    inside = index < text.input_ids.shape[1]
    index = index.clamp(max=text.input_ids.shape[1] - 1)
    token_ids, labels, documents = (_gather(x, index) for x in (text.input_ids, text.labels, text.document_ids))
    own = _gather(text.document_ids, positions.index)[..., None]
    input_mask = inside & (documents == own) & positions.mask[..., None]
    return Talk(token_ids, input_mask, input_mask & (labels != -100)).to(device)


def usable_positions(text: Text, thought_positions: int | float | str = "all") -> torch.Tensor:
    """
    Mask of shape `(B, T - 1)`: text tokens that a thought may follow.

    Args:
        text ([`Text`]):
            The batch.
        thought_positions (`int`, `float` or `str`):
            As in [`choose_positions`]; `"prompt_end"` leaves the last token before each run of labels, `"none"` none.
    """
    usable = text.predicted() & text.thought_mask[:, :-1]
    if thought_positions == "none":
        return torch.zeros_like(usable)
    return usable & (text.labels[:, :-1] == -100) if thought_positions == "prompt_end" else usable


def talk_span(text: Text, talk_length: int | str, thought_positions: int | float | str) -> int:
    """
    M for a batch: `talk_length` itself, or with `"completion"` as many tokens as lie between any usable position and the
    last label of its document.

    Args:
        text ([`Text`]):
            The batch.
        talk_length (`int` or `str`):
            M, or `"completion"`.
        thought_positions (`int`, `float` or `str`):
            Which positions are usable, as in [`usable_positions`].
    """
    if talk_length != "completion":
        return int(talk_length)
    text = text.host
    index = torch.arange(text.labels.shape[1])
    ends = torch.where(text.labels != -100, index, 0)
    last = torch.zeros_like(ends).scatter_reduce(1, text.document_ids, ends, "amax")  # by document
    spans = (_gather(last, text.document_ids) - index)[:, :-1]
    return max(int((spans * usable_positions(text, thought_positions)).max()), 1)


def seeded_generators(seed: int, step: int, indices: list[int]) -> list[torch.Generator]:
    """
    One random generator for each sequence, so that a sequence's draws depend on nothing but its own key: not on the
    batch it came in, its padding, the process, nor on whether training was resumed.

    Args:
        seed (`int`):
            The run's seed.
        step (`int`):
            Optimizer step (0 throughout evaluation, which makes it deterministic).
        indices (`list[int]`):
            Index of each sequence within the step's global batch, or within the evaluation set.
    """
    states = (np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0] for index in indices)
    return [torch.Generator().manual_seed(int(state >> np.uint64(1))) for state in states]


def choose_positions(
    text: Text,
    thought_positions: int | float | str,
    generators: list[torch.Generator],
    entropy: Callable[[], torch.Tensor] | None = None,
    difficulty_threshold: float = 0.6,
    min_interval: int = 3,
) -> Positions:
    """
    Chooses the text tokens after which thoughts are written. Never on padding, where the next token is not a label,
    or where the next token belongs to another document.

    Args:
        text ([`Text`]):
            The batch.
        thought_positions (`int`, `float` or `str`):
            `"all"`, a number of positions a sequence, a fraction of the usable ones (0 to 1, at least one),
            `"prompt_end"`, `"none"`, or `"difficulty"`.
        generators (`list[torch.Generator]`):
            One for each sequence; used by the random choices only.
        entropy (`Callable`, *optional*):
            Gives the no-thought prediction's entropy divided by log V, of shape `(B, T - 1)`; called by
            `"difficulty"` only.
        difficulty_threshold (`float`):
            Least normalised entropy.
        min_interval (`int`):
            Least distance of two positions, in tokens, by difficulty.

    Returns:
        [`Positions`] in ascending order, J being the largest number in any row (at least 1).
    """
    usable = usable_positions(text.host, thought_positions)
    if thought_positions == "difficulty" and entropy is not None:
        chosen = _difficult(usable, entropy().cpu() > difficulty_threshold, min_interval)
    elif thought_positions in ("all", "prompt_end", "none"):
        chosen = usable
    elif isinstance(thought_positions, str):
        raise ValueError(
            f"`thought_positions` is {thought_positions!r}; give 'all', a number, a fraction, 'prompt_end', 'none', or "
            "'difficulty' together with `entropy`."
        )
    else:
        chosen = torch.stack([_draw(row, thought_positions, g) for row, g in zip(usable, generators, strict=True)])
    width = max(int(chosen.sum(1).max()), 1)
    order = torch.argsort((~chosen).int(), dim=1, stable=True)[:, :width]
    return Positions(order, chosen.gather(1, order)).to(text.input_ids.device)


def most_positions(text: Text, thought_positions: int | float | str, min_interval: int) -> int:
    """The most positions that [`choose_positions`] can choose in any row of a batch; at least 1."""
    usable = int(usable_positions(text.host, thought_positions).sum(1).max())
    if thought_positions == "difficulty":
        usable = -(-usable // min_interval)
    elif isinstance(thought_positions, int):
        usable = min(thought_positions, usable)
    elif isinstance(thought_positions, float):
        usable = round(thought_positions * usable)
    return max(usable, 1)


def _draw(usable: torch.Tensor, amount: int | float, generator: torch.Generator) -> torch.Tensor:
    """Mask of shape `(T - 1,)` with `amount` of the usable places, drawn without replacement."""
    places = usable.nonzero().flatten()
    count = amount if isinstance(amount, int) else max(round(amount * len(places)), 1)
    drawn = places[torch.rand(len(places), generator=generator).argsort()[:count]]
    return torch.zeros_like(usable).index_fill_(0, drawn, True)


def _difficult(usable: torch.Tensor, difficult: torch.Tensor, min_interval: int) -> torch.Tensor:
    """Greedily from the left, so that a later token never changes an earlier choice."""
    chosen = torch.zeros_like(usable)
    last = torch.full((len(usable),), -min_interval)
    for t in range(usable.shape[1]):
        chosen[:, t] = usable[:, t] & difficult[:, t] & (t - last >= min_interval)
        last[chosen[:, t]] = t
    return chosen


def branch_position_ids(text: Text, anchors: torch.Tensor, slot_mask: torch.Tensor) -> torch.Tensor:
    """Position ids of shape `(B, N, S)`: they continue from the anchor, and skip slots that hold nothing."""
    start = _gather(text.position_ids, anchors)[..., None]
    return start + slot_mask.long().cumsum(-1).clamp(min=1)


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
    own = _gather(text.document_ids, anchors)[..., None]
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


def _gather(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`values[b, index[b, ...]]` for `values` of shape `(B, T)` and `index` of shape `(B, ...)`."""
    return values.gather(1, index.flatten(1)).view(index.shape)


def gather_hidden(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`hidden[b, index[b, ...]]` for `hidden` of shape `(B, T, H)`: shape `(B, ..., H)`."""
    rows = torch.arange(hidden.shape[0], device=index.device).view(-1, *[1] * (index.dim() - 1))
    return hidden[rows, index]
