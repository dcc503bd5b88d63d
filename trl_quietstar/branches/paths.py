"""Ways to get a branch's hidden states, behind one interface; they must agree.

- `SharedPrefix` (fast): the text is processed once, and every branch attends to it and to itself ([`attention`]).
- `MaskedPrefix`: the same by a 4D attention mask, for families whose attention is not Transformers' interface.
- `Replay` (universal, and the oracle): every branch is run as an ordinary sequence `text[: j + 1] + branch`.

A path only answers "what are the hidden states?"; sampling and scoring are the same code on either
(`sampling.py`, `scoring.py`).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..model.concurrency import without_head
from ..model.embeddings import embed_tokens, embedding_inputs
from ..model.family import cache_name, forward_arguments, position_offset
from ..model.routing import Routing, has_router_loss, recorded_routing
from ..text.batch import (
    Branches,
    Text,
    branch_position_ids,
    gather_hidden,
    packed_attention,
    prefix_attention,
    text_attention,
)
from ..text.transfer import to_device
from . import attention
from .attention import BranchReading, TextMemory, TextReading


class BranchCache(Protocol):
    """A text that was read, and branches that grow token by token after it."""

    @property
    def text_hidden(self) -> torch.Tensor:
        """Hidden states of the text, `(B, T, H)`."""
        ...

    def extend(self, anchors: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """
        Adds one slot to every branch.

        Args:
            anchors (`torch.Tensor` of shape `(B, N)`):
                The text index each branch hangs off, in the host's memory; the same at every call.
            embeds (`torch.Tensor` of shape `(B, N, E)`):
                Input embeddings of the new slots.

        Returns:
            Their hidden states, of shape `(B, N, H)`.
        """
        ...

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "BranchCache":
        """
        Some of the branches as they are, to go on with alone; this cache keeps all.

        Args:
            rows (`torch.Tensor` of shape `(R,)`):
                Which texts, in the host's memory.
            columns (`torch.Tensor` of shape `(R, W)`):
                Which of each text's branches, in the host's memory.
        """
        ...


@dataclass(frozen=True)
class Encoded:
    """
    What the model made of a text and its branches.

    Parameters:
        text (`torch.Tensor` of shape `(B, T, H)`), branches (`torch.Tensor` of shape `(B, N, S, H)`):
            Hidden states; anything at masked slots.
        routings (`list` of [`~model.routing.Routing`]):
            Where a mixture of experts sent each token, once; empty without a router loss.
    """

    text: torch.Tensor
    branches: torch.Tensor
    routings: list[Routing]


class BranchPath(Protocol):
    """A way to run texts and branches through a model's backbone."""

    def read(self, model: PreTrainedModel, text: Text) -> BranchCache:
        """Reads a text to sample from."""
        ...

    def encode(
        self,
        model: PreTrainedModel,
        text: Text,
        branches: Branches,
        batch_size: int | None = None,
        cache: BranchCache | None = None,
    ) -> Encoded:
        """
        Runs the text and its branches, with gradient.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The causal LM.
            text ([`Text`]), branches ([`Branches`]):
                What to run.
            batch_size (`int`, *optional*):
                How many branches of each row at once; their activations are computed again in the backward, so that
                memory holds those of one group only. Defaults to all, whose activations are kept.
            cache ([`BranchCache`], *optional*):
                The text as it was read before, so that it need not be read again where the path can do without; routings are
                then of the branches alone.
        """
        ...


def backbone(model: PreTrainedModel, embeds: torch.Tensor, **inputs) -> torch.Tensor:
    """
    The model's own forward without its LM head: what the head reads, `(B, T, H)`, for embeddings as
    [`~model.embeddings.embed_tokens`] gives them.

    Taken at the head and not from `base_model`, since some families (BERT's) transform the hidden states in between.
    """
    return backbone_output(model, embeds, **inputs)[0]


def backbone_output(model: PreTrainedModel, embeds: torch.Tensor, **inputs) -> tuple[torch.Tensor, ModelOutput]:
    """The same, and what the forward returned: a cache, say."""
    if has_router_loss(model.config):  # not by the family's forward, which misreads a 4D mask
        inputs["output_router_logits"] = False
    with without_head(model.get_output_embeddings()) as taken:
        output = type(model).forward(model, **embedding_inputs(model, embeds), **inputs)
    return taken[0], output


def read_again(
    path: BranchPath, model: PreTrainedModel, text: Text, cache: BranchCache, rows: torch.Tensor | None = None
) -> BranchCache:
    """A cache without branches of the text that another one has read, or of some rows of it."""
    if isinstance(cache, SharedPrefixCache):
        return cache.again(rows)
    return path.read(model, text if rows is None else text.rows(rows))


class SharedPrefix:
    """The text once, and all branches attending to it."""

    def read(self, model: PreTrainedModel, text: Text) -> "BranchCache":
        return SharedPrefixCache(model, text)

    def encode(
        self,
        model: PreTrainedModel,
        text: Text,
        branches: Branches,
        batch_size: int | None = None,
        cache: BranchCache | None = None,
    ) -> Encoded:
        with recorded_routing(model) as calls:
            cache = cache.again() if isinstance(cache, SharedPrefixCache) else SharedPrefixCache(model, text)
        routings = [Routing(logits, text.attention_mask.flatten()) for logits in calls]

        def run(group: Branches):
            with recorded_routing(model) as calls:
                hidden = cache.grow(group.anchors, group.embeds, group.mask)
            return hidden, calls

        hidden = []
        for group in branches.split(batch_size):
            branch_hidden, calls = _run(run, group, batch_size is not None)
            hidden.append(branch_hidden)
            routings += [Routing(logits, group.mask.flatten()) for logits in calls]
        return Encoded(cache.text_hidden, _AfterText.apply(torch.cat(hidden, dim=1), cache.text_hidden), routings)


class _AfterText(torch.autograd.Function):
    """
    The branches' hidden states, whose backward reaches the text's too, with zeros.

    Sharded layers gather their weights when a gradient comes to their output. Where no loss is on the text itself, its last
    layer would get gradients through keys and values alone, and find its weights away.
    """

    @staticmethod
    def forward(ctx, hidden, text_hidden):
        ctx.text_shape = text_hidden.shape
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.new_zeros(ctx.text_shape)


class SharedPrefixCache:
    """
    Keeps the text's keys and values, and those of the branches' slots, step after step.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
        text ([`Text`]):
            The batch.
        embed (`Callable`, *optional*):
            From token ids to embeddings. Defaults to [`~model.embeddings.embed_tokens`].
    """

    def __init__(self, model: PreTrainedModel, text: Text, embed: Callable | None = None):
        if not attention.enable(model):
            raise ValueError("The attention of this family cannot branch.")
        self.model, self.text, self.memory = model, text, TextMemory()
        self.own: dict = {}
        self.length = 0  # slots that were kept
        mask, position_ids = None, torch.arange(text.input_ids.shape[1], device=text.input_ids.device)[None]
        embeds = embed_tokens(model, text.input_ids) if embed is None else embed(text.input_ids)
        if not text.is_plain:
            position_ids = text.position_ids
            mask = additive_masks(model.config, text_attention(text), position_ids, position_ids, embeds.dtype)
        self.text_hidden = self._forward(embeds, TextReading(self.memory), mask, position_ids.expand(len(embeds), -1))
        _check_windows(model.config, self.memory)

    def again(self, rows: torch.Tensor | None = None) -> "SharedPrefixCache":
        """The same text as it was read, or some rows of it by an index of shape `(rows,)` in the host's memory, without
        branches."""
        fresh = copy.copy(self)
        fresh.own, fresh.length = {}, 0
        if rows is not None:
            index = to_device(rows, self.text_hidden.device)
            layers = {module: (key[index], value[index]) for module, (key, value) in self.memory.layers.items()}
            fresh.memory = TextMemory(layers, self.memory.has_windows)
            fresh.text, fresh.text_hidden = self.text.rows(rows), self.text_hidden[index]
        return fresh

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "SharedPrefixCache":
        fresh, places = copy.copy(self), _places(rows, columns, self.text_hidden.device)
        if len(rows) < len(self.text.input_ids):
            kept = {module: tuple(x[places[0][:, 0]] for x in pair) for module, pair in self.memory.layers.items()}
            fresh.text, fresh.memory = self.text.rows(rows), TextMemory(kept, self.memory.has_windows)  # type: ignore[arg-type]
        used = slice(self.length)
        fresh.own = {
            module: tuple(x[:, :, :, used].transpose(1, 2)[places].transpose(1, 2) for x in pair)
            for module, pair in self.own.items()
        }
        return fresh

    def take_back(self, grown: "SharedPrefixCache", places: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Adds the slots that a selection of the branches, at their rows and columns, has grown since; others have zeros."""
        for module, pair in self.own.items():
            joined = []
            for old, new in zip(pair, grown.own[module], strict=True):
                added = new[:, :, :, self.length : grown.length].transpose(1, 2)
                room = added.new_zeros(*old.transpose(1, 2).shape[:3], *added.shape[3:])
                room = room.index_put(places, added).transpose(1, 2)
                joined.append(torch.cat([old[:, :, :, : self.length], room], dim=3))
            self.own[module] = tuple(joined)
        self.length = grown.length

    def extend(self, anchors: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(*anchors.shape, self.length + 1, dtype=torch.bool, device=embeds.device)
        return self.grow(anchors, embeds[:, :, None], mask, keep=True)[:, :, 0]

    def grow(
        self, anchors: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor, keep: bool = False
    ) -> torch.Tensor:
        """
        Adds slots to every branch.

        Args:
            anchors (`torch.Tensor` of shape `(B, N)`):
                The text index each branch hangs off, in the host's memory.
            embeds (`torch.Tensor` of shape `(B, N, Q, E)`):
                Input embeddings of the new slots.
            mask (`torch.Tensor` of shape `(B, N, s + Q)`, bool):
                Which of the slots that were kept, and of the new ones, hold something.
            keep (`bool`):
                Whether later slots will see the new ones.

        Returns:
            Hidden states of the new slots, of shape `(B, N, Q, H)`.
        """
        if embeds[..., 0].numel() == 0:
            return self.text_hidden.new_zeros(*embeds.shape[:3], self.text_hidden.shape[-1])
        positions = branch_position_ids(self.text, to_device(anchors, mask.device), mask)
        reading = self._branch_reading(anchors, mask, positions, keep)
        # four dimensions, which families hand through; the mask of a forward that looks packed would be built otherwise
        nothing = embeds.new_zeros(len(embeds), 1, 1, 1)
        masks = in_mask_form(self.model.config, nothing, dict.fromkeys(_near_kinds(self.model.config), nothing))
        hidden = self._forward(embeds.flatten(1, 2), reading, masks, positions[:, :, self.length :].flatten(1))
        self.length += embeds.shape[2] if keep else 0
        return hidden.unflatten(1, embeds.shape[1:3])

    def _branch_reading(
        self, anchors: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, keep: bool
    ) -> BranchReading:
        """Of the slots that are not kept yet; mask and position ids, `(B, N, s + Q)`, are those of all."""
        slots, new = mask.shape[2], positions[:, :, self.length :]
        Q = new.shape[2]
        causal = torch.ones(Q, slots, dtype=torch.bool, device=mask.device).tril(slots - Q)
        itself = torch.arange(slots - Q, slots, device=mask.device)[:, None] == torch.arange(slots, device=mask.device)
        heads = self.model.config.get_text_config().num_attention_heads
        rows = len(anchors) * heads * min(Q, attention.CHUNK_SLOTS)
        chunk = attention.chunk_size(rows, self.text.input_ids.shape[1] + slots, mask.device)
        anchors, host = anchors.cpu(), self.text.host
        first = anchors - host.position_ids.gather(1, anchors)  # where the anchor's document begins
        spans = _spans(first, anchors, chunk)
        first, anchors = (to_device(x, mask.device) for x in (first, anchors))
        return BranchReading(
            memory=self.memory,
            own=self.own,
            first=first,
            last=anchors,
            spans=spans,
            chunk=chunk,
            slots=(causal & mask[:, :, None]) | itself,
            positions=positions,
            ahead=new + first[..., None],
            keep=keep,
        )

    def _forward(self, embeds: torch.Tensor, reading, mask, position_ids: torch.Tensor) -> torch.Tensor:
        return backbone(
            self.model,
            embeds,
            attention_mask=mask,
            position_ids=position_ids + position_offset(self.model.config),
            use_cache=False,
            quietstar_reading=reading.attend,  # a function, since FSDP2 copies any dataclass on its way to a layer
        )


def _places(rows: torch.Tensor, columns: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the branches at columns `(R, W)` of rows `(R,)` into tensors of shape `(B, N, ...)`."""
    return to_device(rows[:, None], device), to_device(columns, device)


def _spans(first: torch.Tensor, last: torch.Tensor, chunk: int) -> list[tuple[int, int]]:
    """Least `first` and greatest `last`, `(B, N)`, of each chunk of branches."""
    least, greatest = first.amin(0), torch.maximum(first, last).amax(0)
    pairs = [torch.stack([a.amin(), b.amax()]) for a, b in zip(least.split(chunk), greatest.split(chunk), strict=True)]
    return [tuple(pair) for pair in torch.stack(pairs).tolist()]


def _near_kinds(config: PreTrainedConfig) -> list[str]:
    """Which of the model's layer types do not see all of a text."""
    config = config.get_text_config()
    limits = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    return [kind for kind, name in limits.items() if kind in layer_types and getattr(config, name, None) is not None]


def _check_windows(config: PreTrainedConfig, memory: TextMemory) -> None:
    """A window that the layers do not name would be seen past, and only in texts longer than it."""
    kinds = _near_kinds(config)
    if "chunked_attention" in kinds or (kinds and not memory.has_windows):
        raise ValueError("The attention layers of this family do not name the window that they see.")


def _check_slots(config: PreTrainedConfig, slots: int) -> None:
    """
    Llama 4 scales its queries by where they stand in a forward, and not by their position, once that is far enough.

    Raises:
        `ValueError`: if it is.
    """
    config = config.get_text_config()
    limit = config.floor_scale if getattr(config, "attn_temperature_tuning", False) else None
    if limit is not None and slots > limit:
        raise ValueError(
            f"A forward of {slots:,} tokens exceeds the {limit:,} up to which this family tells tokens apart by position; "
            "lower `branch_batch_size` or `max_length`, or set `thought_path='replay'`."
        )


def _run(function: Callable, group: Branches, again: bool):
    """A group's forward, whose activations are computed `again` in the backward or kept."""
    if not (again and torch.is_grad_enabled()):
        return function(group)

    def run(*tensors: torch.Tensor):
        return function(Branches(*tensors))

    # by its tensors `checkpoint` tells which device's random numbers, those of dropout, have to come again
    return checkpoint(run, *(getattr(group, field.name) for field in fields(group)), use_reentrant=False)


class MaskedPrefix(SharedPrefix):
    """The text and all branches in one forward, told apart by a 4D mask."""

    def read(self, model: PreTrainedModel, text: Text) -> "BranchCache":
        return MaskedPrefixCache(model, text)

    def encode(
        self,
        model: PreTrainedModel,
        text: Text,
        branches: Branches,
        batch_size: int | None = None,
        cache: BranchCache | None = None,
    ) -> Encoded:
        def run(group: Branches):
            with recorded_routing(model) as calls:
                hidden = self._packed(model, text, group)
            return hidden, calls

        T, hidden, routings = text.input_ids.shape[1], [], []
        for i, group in enumerate(branches.split(batch_size)):
            packed, calls = _run(run, group, batch_size is not None)
            hidden.append((packed[:, :T], packed[:, T:].unflatten(1, group.mask.shape[1:])))
            text_mask = text.attention_mask & (i == 0)  # each group reads the text again
            mask = torch.cat([text_mask, group.mask.flatten(1)], dim=1).flatten()
            routings += [Routing(logits, mask) for logits in calls]
        return Encoded(hidden[0][0], torch.cat([part for _, part in hidden], dim=1), routings)

    @staticmethod
    def _packed(model: PreTrainedModel, text: Text, branches: Branches) -> torch.Tensor:
        """Hidden states of `[text | branches]`, `(B, T + N·S, H)`."""
        embeds = torch.cat([embed_tokens(model, text.input_ids), branches.embeds.flatten(1, 2)], dim=1)
        anchors = to_device(branches.anchors, embeds.device)
        branch_positions = branch_position_ids(text, anchors, branches.mask).flatten(1)
        position_ids = torch.cat([text.position_ids, branch_positions], dim=1)
        _check_slots(model.config, embeds.shape[1])
        allowed = packed_attention(text, anchors, branches.mask)
        return backbone(
            model,
            embeds,
            attention_mask=additive_masks(model.config, allowed, position_ids, position_ids, embeds.dtype),
            position_ids=position_ids + position_offset(model.config),
            use_cache=False,
        )


class MaskedPrefixCache:
    """Keeps the text and the branches' slots, step after step, in one KV cache (a 4D mask tells them apart)."""

    def __init__(self, model: PreTrainedModel, text: Text):
        self.model, self.text, self.branches = model, text, 0
        self.cache = DynamicCache()  # without the config: sliding layers must keep the whole text
        self.key_positions = text.position_ids
        embeds = embed_tokens(model, text.input_ids)
        self.text_hidden = self._forward(embeds, text_attention(text), text.position_ids)

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "MaskedPrefixCache":
        T, fresh = self.text.input_ids.shape[1], copy.copy(self)
        slots = (self.key_positions.shape[1] - T) // self.branches
        own = T + self.branches * torch.arange(slots)[:, None] + columns[:, None]  # (R, slots, W)
        index = torch.cat([torch.arange(T).expand(len(rows), T), own.flatten(1)], dim=1)
        places = _places(rows, index, self.text_hidden.device)
        fresh.cache, fresh.text = copy.copy(self.cache), self.text.rows(rows)
        fresh.cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in fresh.cache.layers:
            layer.keys, layer.values = (x.transpose(1, 2)[places].transpose(1, 2) for x in (layer.keys, layer.values))
        fresh.key_positions = self.key_positions[places]
        return fresh

    def extend(self, anchors: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        anchors, self.branches = to_device(anchors, embeds.device), anchors.shape[1]
        N, T = anchors.shape[1], self.text.input_ids.shape[1]
        steps = (self.key_positions.shape[1] - T) // N + 1
        position_ids = self.text.position_ids.gather(1, anchors) + steps
        own = torch.eye(N, dtype=torch.bool, device=anchors.device).repeat(1, steps)
        allowed = torch.cat([prefix_attention(self.text, anchors), own.expand(len(anchors), -1, -1)], dim=2)
        self.key_positions = torch.cat([self.key_positions, position_ids], dim=1)
        _check_slots(self.model.config, self.key_positions.shape[1])
        return self._forward(embeds, allowed, position_ids)

    def _forward(self, embeds: torch.Tensor, allowed: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        masks = additive_masks(self.model.config, allowed, position_ids, self.key_positions, embeds.dtype)
        return backbone(
            self.model,
            embeds,
            attention_mask=masks,
            position_ids=position_ids + position_offset(self.model.config),
            use_cache=True,
            **{cache_name(forward_arguments(self.model)): self.cache},
        )


class Replay:
    """Every branch, and every document, as an ordinary right-padded sequence; nothing is shared, nothing is masked by
    hand."""

    def read(self, model: PreTrainedModel, text: Text) -> BranchCache:
        return ReplayCache(model, text)

    def encode(
        self,
        model: PreTrainedModel,
        text: Text,
        branches: Branches,
        batch_size: int | None = None,
        cache: BranchCache | None = None,
    ) -> Encoded:
        routings, hidden = [], []
        if cache is None:
            with recorded_routing(model) as calls:
                text_hidden, text_mask = self._text(model, text)
            routings = [Routing(logits, text_mask) for logits in calls]
        else:
            text_hidden = cache.text_hidden

        def run(group: Branches):
            with recorded_routing(model) as calls:
                group_hidden, mask = self._branches(model, text, group)
            return group_hidden, mask, calls

        for group in branches.split(batch_size):
            group_hidden, mask, calls = _run(run, group, batch_size is not None)
            hidden.append(group_hidden)
            routings += [Routing(logits, mask) for logits in calls]
        return Encoded(text_hidden, torch.cat(hidden, dim=1), routings)

    def text_hidden(self, model: PreTrainedModel, text: Text) -> torch.Tensor:
        """Hidden states of the text, `(B, T, H)`."""
        return self._text(model, text)[0]

    def branch_hidden(self, model: PreTrainedModel, text: Text, branches: Branches) -> torch.Tensor:
        """Hidden states of the branches, `(B, N, S, H)`."""
        return self._branches(model, text, branches)[0]

    def _text(self, model: PreTrainedModel, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of the text, and which tokens of the forward count."""
        embeds = embed_tokens(model, text.input_ids)
        documents = int(text.host.document_ids.max())
        number = torch.arange(1, documents + 1, device=embeds.device)
        members = text.document_ids[:, None, :] == number[:, None]  # (B, documents, T)
        anchors = (members.long().cumsum(-1).argmax(-1)).masked_fill(~members.any(-1), 0)
        no_slots = embeds.new_zeros(len(embeds), documents, 0, embeds.shape[-1])
        branches = Branches(anchors, no_slots, no_slots[..., 0].bool())
        hidden = self._rows(model, text, embeds, branches)
        rows = (text.document_ids - 1).clamp(min=0)
        sequence = torch.arange(len(embeds), device=embeds.device)[:, None]
        own = torch.arange(hidden.shape[2], device=embeds.device) < members.sum(-1, keepdim=True)
        return hidden[sequence, rows, text.position_ids], own.flatten()

    def _branches(self, model: PreTrainedModel, text: Text, branches: Branches) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of the branches, and which tokens of the forward count."""
        embeds = embed_tokens(model, text.input_ids)
        branches = replace(branches, anchors=to_device(branches.anchors, embeds.device))
        hidden = self._rows(model, text, embeds, branches)
        index = branch_position_ids(text, branches.anchors, branches.mask).clamp(max=hidden.shape[2] - 1)
        slot = (
            torch.arange(hidden.shape[2], device=embeds.device)
            - text.position_ids.gather(1, branches.anchors)[..., None]
        )
        own = (slot > 0) & (slot <= branches.mask.sum(-1, keepdim=True))
        return hidden.gather(2, index[..., None].expand(*index.shape, hidden.shape[-1])), own.flatten()

    def _rows(self, model: PreTrainedModel, text: Text, embeds: torch.Tensor, branches: Branches) -> torch.Tensor:
        """Hidden states of shape `(B, N, W, H)` of the sequences `document[: anchor + 1] + valid slots`."""
        B, N, S = branches.mask.shape
        T = text.input_ids.shape[1]
        prefix = (text.position_ids.gather(1, branches.anchors) + 1)[..., None]
        length = prefix + branches.mask.sum(-1, keepdim=True)
        column = torch.arange(int(length.max()), device=embeds.device)
        in_text = branches.anchors[..., None] + 1 - prefix + column
        source = in_text
        if S > 0:
            slots = torch.argsort((~branches.mask).int(), dim=-1, stable=True)  # valid ones first, in order
            slot = slots.gather(-1, (column - prefix).clamp(0, S - 1))
            in_branch = T + torch.arange(N, device=embeds.device)[:, None] * S + slot
            source = torch.where(column < prefix, in_text, in_branch)
        source = torch.where(column < length, source, 0)
        pool = torch.cat([embeds, branches.embeds.flatten(1, 2)], dim=1)
        hidden = backbone(
            model,
            gather_hidden(pool, source).flatten(0, 1),
            attention_mask=(column < length).flatten(0, 1).long(),
            use_cache=False,
        )
        return hidden.unflatten(0, (B, N))


class ReplayCache:
    """Runs every branch again from the text's start at each step."""

    def __init__(self, model: PreTrainedModel, text: Text):
        self.model, self.text, self.path = model, text, Replay()
        self.text_hidden = self.path.text_hidden(model, text)
        self.embeds: list[torch.Tensor] = []

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "ReplayCache":
        fresh, places = copy.copy(self), _places(rows, columns, self.text_hidden.device)
        fresh.text, fresh.embeds = self.text.rows(rows), [x[places] for x in self.embeds]
        return fresh

    def extend(self, anchors: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        self.embeds.append(embeds)
        slots = torch.stack(self.embeds, dim=2)
        branches = Branches(anchors, slots, torch.ones(slots.shape[:3], dtype=torch.bool, device=slots.device))
        return self.path.branch_hidden(self.model, self.text, branches)[:, :, -1]


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
    near = {}
    if (window := getattr(config, "sliding_window", None)) is not None:
        near["sliding_attention"] = queries - keys < window
    if (chunk := getattr(config, "attention_chunk_size", None)) is not None:
        near["chunked_attention"] = queries // chunk == keys // chunk
    masks = {kind: _additive(allowed & seen, dtype) for kind, seen in near.items()}
    return in_mask_form(config, _additive(allowed, dtype), masks)


def in_mask_form(
    config: PreTrainedConfig, full: torch.Tensor, near: dict[str, torch.Tensor]
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The masks of full attention and, by layer type, of nearer ones, each `(B, 1, Q, K)`, as the family's forward takes
    them."""
    layer_types = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if not layer_types and "sliding_attention" in near:
        return near["sliding_attention"]
    masks = {kind: mask for kind, mask in near.items() if kind in layer_types}
    return {"full_attention": full} | masks if masks else full


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
