"""Generating with thoughts: think after a token, predict the next from both, emit visible text only.

[`think_and_speak`] is the decoding loop that Transformers' `generate` runs in place of its own, so that prompts, padding,
logits processors, stopping criteria and streamers are prepared as usual. It asks a [`Decoder`] for hidden states: with the
shared prefix, text and thoughts share one KV cache, from which a thought is dropped as soon as it was used
([`CachedDecoder`]); where that is not exact, the text's cache is copied for each thought
([`~branches.cached_replay.CachedReplayDecoder`]), or everything is run again at each token ([`ReplayDecoder`]).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.cache_utils import CacheLayerMixin
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .._compat import pad_token
from ..branches.base import backbone
from ..branches.cached_replay import CachedReplay, CachedReplayDecoder
from ..branches.masks import additive_masks
from ..branches.replay import Replay
from ..model.embeddings import embed_tokens
from ..model.family import cache_name, check_length, forward_arguments, max_positions, position_offset
from ..model.heads import ThinkingModel
from ..model.lm_head import logits_of, uncertainty
from ..text.batch import Branches, Text
from ..text.positions import is_difficult
from ..text.transfer import exact_dtype, to_device, to_host
from .drawing import SamplingSettings, fixed_draws, thought_sampling
from .when import ENDLESS, Thinking
from .writing import Writer, end_slots, start_slots


@dataclass
class GeneratedThought:
    """
    A thought written while generating.

    Parameters:
        position (`int`):
            Index in the row of `sequences` of the token it was written after.
        token_ids (`list[int]`):
            Its tokens.
        mixing_weights (`list[float]`):
            Its weight in the prediction of each token it served, in order.
    """

    position: int
    token_ids: list[int]
    mixing_weights: list[float] = field(default_factory=list)


@dataclass
class GenerateThoughtfulOutput(GenerateDecoderOnlyOutput):
    """
    What `generate` returns with `return_dict_in_generate=True` or `return_thoughts=True`: `sequences`, `scores` and
    `logits` as usual, and `thoughts`, a list of [`GeneratedThought`] for each row.
    """

    thoughts: list[list[GeneratedThought]] | None = None


class Decoder(Protocol):
    """A batch of texts that grow, and one branch after each of them. Masks are in the host's memory, which so knows what is
    kept; token ids and embeddings are on the device."""

    def read(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Appends tokens, `(B, Q)` with their mask, to the texts; hidden states `(B, H)` of the last ones."""
        ...

    def fork(self, rows: torch.Tensor) -> None:
        """Begins a branch after the present text in the rows of a mask `(B,)`; an older one there is gone."""
        ...

    def extend(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Appends slots, `(B, Q, E)` with their mask, to the branches; their hidden states `(B, Q, H)`."""
        ...

    def drop(self, rows: torch.Tensor) -> None:
        """Ends the branches of the rows of a mask `(B,)`."""
        ...


class CachedDecoder:
    """
    Texts and branches in one KV cache. Each slot has an owner, 0 for the text, and is seen by position: a text sees text,
    a branch the text up to where it was forked and its own slots.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            The model.
        rows (`int`):
            B.
    """

    def __init__(self, model: ThinkingModel, rows: int):
        self.model = model
        self.cache = DynamicCache()  # without the config: sliding layers must keep the whole text
        nothing = torch.zeros(rows, 0, dtype=torch.long, device=model.device)
        self.positions, self.owner, self.valid = nothing, nothing, nothing.bool()  # of each slot
        self.host_owner = torch.zeros(rows, 0, dtype=torch.long)  # what the host knows of owners and branches
        self.host_branch = torch.zeros(rows, dtype=torch.long)
        zeros = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.length = zeros  # of each row's text
        self.branch, self.anchor, self.tip = (
            zeros,
            zeros,
            zeros,
        )  # its owner, and the positions where it begins and ends
        self.forks = 0

    def read(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = to_device(mask, token_ids.device)
        steps = mask.long().cumsum(1)
        positions = (self.length[:, None] + steps - 1).clamp(min=0)
        self.length = self.length + steps[:, -1]
        text = torch.zeros_like(self.branch)
        self._own(torch.zeros_like(self.host_branch), token_ids.shape[1])
        return self._forward(embed_tokens(self.model, token_ids), positions, mask, text, positions.amax(1))[:, -1]

    def fork(self, rows: torch.Tensor) -> None:
        self.forks += 1
        self.host_branch = torch.where(rows, self.forks, self.host_branch)
        rows = to_device(rows, self.branch.device)
        self.branch = torch.where(rows, self.forks, self.branch)
        self.anchor = torch.where(rows, self.length - 1, self.anchor)
        self.tip = torch.where(rows, self.length - 1, self.tip)

    def extend(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = to_device(mask, embeds.device)
        steps = mask.long().cumsum(1)
        positions = self.tip[:, None] + steps
        self.tip = self.tip + steps[:, -1]
        self._own(self.host_branch, embeds.shape[1])
        return self._forward(embeds, positions, mask, self.branch, self.anchor)

    def drop(self, rows: torch.Tensor) -> None:
        self.host_branch = self.host_branch.masked_fill(rows, 0)
        self.branch = self.branch.masked_fill(to_device(rows, self.branch.device), 0)
        keep = ((self.host_owner == 0) | (self.host_owner == self.host_branch[:, None])).any(0)
        kept = keep.nonzero().flatten()
        if len(kept) == len(keep):
            return
        index = to_device(kept, self.branch.device)
        if bool(keep[: len(kept)].all()):
            self.cache.crop(len(kept) - len(keep))
        else:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys.index_select(2, index), layer.values.index_select(2, index)
        self.positions, self.owner, self.valid = (
            x.index_select(1, index) for x in (self.positions, self.owner, self.valid)
        )
        self.host_owner = self.host_owner[:, kept]

    def _own(self, owner: torch.Tensor, slots: int) -> None:
        """Notes new slots of the owners `(B,)` on the host."""
        self.host_owner = torch.cat([self.host_owner, owner[:, None].expand(-1, slots)], dim=1)

    def _forward(self, embeds, positions, mask, owner, anchor) -> torch.Tensor:
        """One pass of new slots `(B, Q, E)` of the owners `(B,)`, which see text up to the positions `anchor`, `(B,)`."""
        Q = embeds.shape[1]
        self.positions = torch.cat([self.positions, positions], dim=1)
        self.owner = torch.cat([self.owner, owner[:, None].expand(-1, Q)], dim=1)
        self.valid = torch.cat([self.valid, mask.bool()], dim=1)
        seen = ((self.owner == 0) & (self.positions <= anchor[:, None])) | (self.owner == owner[:, None])
        earlier = self.positions[:, None] <= positions[..., None]
        own = torch.eye(Q, dtype=torch.bool, device=embeds.device)
        allowed = (seen & self.valid)[:, None] & earlier
        allowed[:, :, -Q:] |= own  # so that no row is empty
        config = self.model.config
        return backbone(
            self.model,
            embeds,
            attention_mask=additive_masks(config, allowed, positions, self.positions, embeds.dtype),
            position_ids=positions + position_offset(config),
            use_cache=True,
            **{cache_name(forward_arguments(self.model)): self.cache},
        )


class ReplayDecoder:
    """
    Runs texts and branches again at each call, for models that keep no cache to go on from.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            The model.
        rows (`int`):
            B.
    """

    def __init__(self, model: ThinkingModel, rows: int):
        self.model, self.path = model, Replay()
        self.token_ids = torch.zeros(rows, 0, dtype=torch.long, device=model.device)
        self.mask = self.slot_mask = torch.zeros(rows, 0, dtype=torch.bool)
        self.slots = embed_tokens(model, self.token_ids)
        self.anchors = torch.zeros(rows, dtype=torch.long)

    def read(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.token_ids = torch.cat([self.token_ids, token_ids], dim=1)
        self.mask = torch.cat([self.mask, mask.bool()], dim=1)
        return self.path.text_hidden(self.model, self._text())[:, -1]

    def fork(self, rows: torch.Tensor) -> None:
        self.anchors = torch.where(rows, self.mask.shape[1] - 1, self.anchors)
        self.drop(rows)

    def extend(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.slots = torch.cat([self.slots, embeds], dim=1)
        self.slot_mask = torch.cat([self.slot_mask, mask.bool()], dim=1)
        mask = to_device(self.slot_mask, self.slots.device)
        branches = Branches(self.anchors[:, None], self.slots[:, None], mask[:, None])
        return self.path.branch_hidden(self.model, self._text(), branches)[:, 0, -embeds.shape[1] :]

    def drop(self, rows: torch.Tensor) -> None:
        mask = self.slot_mask & ~rows[:, None]
        used = mask.any(0).nonzero().flatten()
        self.slots = self.slots.index_select(1, to_device(used, self.slots.device))
        self.slot_mask = mask[:, used]

    def _text(self) -> Text:
        return Text.from_batch(self.token_ids, to_device(self.mask, self.token_ids.device))


def decoder_of(model: ThinkingModel, rows: int) -> Decoder:
    """The decoder for B `rows` that is exact on this model, by the start-up check."""
    if model.branches_in_cache:
        return CachedDecoder(model, rows)
    if isinstance(model.thought_path, CachedReplay):
        return CachedReplayDecoder(model, rows)
    return ReplayDecoder(model, rows)


class Mind:
    """
    Thinks for a batch of texts that are being generated, and says what comes next.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            The model.
        thinking ([`~thinking.when.Thinking`]):
            When.
        sampling ([`~thinking.drawing.SamplingSettings`]):
            How thoughts are drawn.
        fixed (`bool`):
            Whether thoughts are drawn by fixed random numbers rather than new ones.
        streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
            Gets the tokens of each thought.
    """

    def __init__(
        self,
        model: ThinkingModel,
        thinking: Thinking,
        sampling: SamplingSettings,
        fixed: bool,
        streamer: BaseStreamer | None = None,
    ):
        self.model, self.thinking, self.sampling = model, thinking, sampling
        self.writer = Writer.of(model, sampling)
        self.fixed, self.streamer = fixed, streamer
        self.thoughts: list[list[GeneratedThought]] = []
        # what the device has not told yet: of each row a thought, if any, with its tokens and their mask, or with a weight
        self._unread_tokens: list[tuple[list[GeneratedThought | None], torch.Tensor, torch.Tensor]] = []
        self._unread_weights: list[tuple[list[GeneratedThought | None], torch.Tensor]] = []

    def begin(self, prompt: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Reads the prompt, `(B, T)`; returns the next token's logits, `(B, V)`. The mask is in the host's memory."""
        self.decoder = decoder_of(self.model, len(prompt))
        self.lengths, self.width = mask.sum(1), prompt.shape[1]
        self.thoughts = [[] for _ in prompt]
        self.left = torch.zeros_like(self.lengths)  # tokens that each row's thought still serves
        self.since = torch.full_like(self.lengths, ENDLESS)  # tokens since each row's last thought
        return self._logits(self.decoder.read(prompt, mask), None, torch.ones_like(self.left, dtype=torch.bool))

    def go_on(self, tokens: torch.Tensor, unfinished: torch.Tensor) -> torch.Tensor:
        """Reads the tokens that were emitted, `(B,)`; returns the next one's logits. Finished rows, by a mask in the host's
        memory, no longer think."""
        self.lengths, self.width = self.lengths + 1, self.width + 1
        self.left, self.since = self.left * unfinished, self.since + 1
        self.decoder.drop(~unfinished)
        hidden = self.decoder.read(tokens[:, None], torch.ones(len(tokens), 1, dtype=torch.bool))
        alive, read = self.left > 0, None
        if bool(alive.any()):
            read = self.decoder.extend(embed_tokens(self.model, tokens[:, None]), alive[:, None])[:, -1]
        return self._logits(hidden, read, unfinished)

    def _logits(self, hidden: torch.Tensor, read: torch.Tensor | None, unfinished: torch.Tensor) -> torch.Tensor:
        due, plain = (self.since >= self.thinking.distance) & unfinished, None
        if self.thinking.mode == "adaptive":
            plain = logits_of(self.model, hidden)
            due &= is_difficult(uncertainty(plain), self.thinking.threshold).cpu()
        if bool(due.any()):
            fresh = self._think(due)
            read = fresh if read is None else torch.where(to_device(due, hidden.device)[:, None], fresh, read)
            self.left = torch.where(due, self.thinking.span, self.left)
            self.since = self.since.masked_fill(due, 0)
        if read is None:
            return logits_of(self.model, hidden) if plain is None else plain
        served = self.left > 0
        weights = torch.ones(len(hidden), dtype=self.model.quietstar.start_embedding.dtype, device=hidden.device)
        if self.model.quietstar_settings.prediction == "mixed":
            weights = self.model.quietstar.mixing_head(hidden, read)
        weights = weights * to_device(served, hidden.device)
        thoughts = [x[-1] if active else None for x, active in zip(self.thoughts, served.tolist(), strict=True)]
        self._unread_weights.append((thoughts, weights))
        self.left = (self.left - 1).clamp(min=0)
        self.decoder.drop(served & (self.left == 0))
        mix = weights[:, None].to(hidden.dtype)
        return logits_of(self.model, mix * read + (1 - mix) * hidden)

    def _think(self, rows: torch.Tensor) -> torch.Tensor:
        """Writes a thought in the rows of a mask `(B,)`; returns what it ends with, `(B, H)`."""
        self.decoder.fork(rows)
        alive = rows[:, None]
        hidden = self.decoder.extend(start_slots(self.model, len(rows), 1), alive)
        token_ids, mask, _ = self.writer.write(self.decoder, hidden, alive, self._draws(hidden.device)[:, None])
        self._note(rows, token_ids[:, 0], mask[:, 0])
        # the last token and the end share a forward
        last = torch.cat([embed_tokens(self.model, token_ids[:, 0, -1:]), end_slots(self.model, len(rows), 1)], dim=1)
        return self.decoder.extend(last, torch.cat([mask[:, :, -1], alive], dim=1))[:, -1]

    def _draws(self, device: torch.device) -> torch.Tensor:
        """Uniform numbers of shape `(B, L)`."""
        length = self.sampling.thought_length
        if self.fixed:
            draws = fixed_draws(self.lengths[:, None] - 1, self.sampling)[:, 0, 0]
            return to_device(draws, device)
        return torch.rand(len(self.lengths), length, dtype=exact_dtype(device), device=device)

    def _note(self, rows: torch.Tensor, token_ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Takes down thoughts of shape `(B, l)`, whose tokens the device tells later if nobody is listening."""
        thoughts = [GeneratedThought(self.width - 1, []) if own else None for own in rows.tolist()]
        for row, thought in enumerate(thoughts):
            if thought is not None:
                self.thoughts[row].append(thought)
                if self.streamer is not None:
                    self.streamer.put(token_ids[row].cpu()[mask[row]])
        self._unread_tokens.append((thoughts, token_ids, mask))

    def told(self) -> list[list[GeneratedThought]]:
        """The thoughts of each row, with all that the device knows of them."""
        read = to_host(
            [*(ids for _, ids, _ in self._unread_tokens), *(weights for _, weights in self._unread_weights)]
        )
        for thoughts, _, mask in self._unread_tokens:
            for thought, ids, exists in zip(thoughts, read.pop(0), mask, strict=True):
                if thought is not None:
                    thought.token_ids = ids[exists].tolist()
        for thoughts, _ in self._unread_weights:
            for thought, weight in zip(thoughts, read.pop(0).tolist(), strict=True):
                if thought is not None:
                    thought.mixing_weights.append(weight)
        self._unread_tokens, self._unread_weights = [], []
        return self.thoughts


@torch.no_grad()
def think_and_speak(
    model: ThinkingModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    thinking: Thinking,
    return_thoughts: bool = False,
    streamer: BaseStreamer | None = None,
    thought_streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    synced_gpus: bool = False,
    **model_kwargs,
) -> torch.Tensor | GenerateThoughtfulOutput:
    """
    The decoding loop, as `generate(custom_generate=...)` calls it: greedy or sampled.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            The model.
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Prompts, padded on the left where `attention_mask`, among the further arguments, is 0.
        logits_processor, stopping_criteria, generation_config, streamer, tokenizer:
            As `generate` prepares them. With `do_sample=False` thoughts are still drawn as in training, by random numbers
            that depend on the place in the text alone.
        thinking ([`~thinking.when.Thinking`]):
            When to think.
        return_thoughts (`bool`):
            Whether to return them.
        thought_streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
            Gets the tokens of each thought, before the text that it served.

    Returns:
        `torch.Tensor` of shape `(B, T + new)`, or [`GenerateThoughtfulOutput`].

    Raises:
        `ValueError`: for a decoding method other than greedy search and sampling, a cache to go on from, or right
            padding.
    """
    attention_mask = model_kwargs.get("attention_mask")
    mask = torch.ones(input_ids.shape, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
    _check_request(generation_config, input_ids, mask, synced_gpus, model_kwargs)
    config, pad = generation_config, pad_token(generation_config)
    _check_positions(model, config, input_ids.shape[1])
    sampling = thought_sampling(model.quietstar_settings, model.thought_tokenizer(tokenizer))  # type: ignore[arg-type]
    mind = Mind(model, thinking, sampling, not config.do_sample, thought_streamer)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    scores, raw_logits = [], []
    logits = mind.begin(input_ids, mask)
    while True:
        warped = logits_processor(input_ids, logits)  # type: ignore[arg-type]
        if config.output_scores:
            scores.append(warped)
        if config.output_logits:
            raw_logits.append(logits)
        tokens = torch.multinomial(warped.softmax(-1), 1)[:, 0] if config.do_sample else warped.argmax(-1)
        if ends and pad is not None:
            tokens = torch.where(unfinished, tokens, pad)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, tuple(scores))
        running = unfinished.cpu()
        if not bool(running.any()):
            break
        logits = mind.go_on(tokens, running)
    if streamer is not None:
        streamer.end()
    if not (return_thoughts or config.return_dict_in_generate):
        return input_ids
    return GenerateThoughtfulOutput(
        sequences=input_ids,  # type: ignore[arg-type]
        scores=tuple(scores) or None,  # type: ignore[arg-type]
        logits=tuple(raw_logits) or None,  # type: ignore[arg-type]
        thoughts=mind.told() if return_thoughts else None,
    )


def _check_request(config: GenerationConfig, input_ids, mask, synced_gpus: bool, model_kwargs: dict) -> None:
    if input_ids.shape[1] == 0:
        raise ValueError("There are no `input_ids` to think after; give a prompt of at least one token.")
    if synced_gpus:
        raise ValueError("Thinking does not run on a model that is sharded over processes; use `think='never'`.")
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        raise ValueError(
            f"Thinking works with greedy search and sampling, not with {mode.value!r}; set `num_beams=1` and the like, or "
            "`think='never'`."
        )
    for name in ("cache", "past_key_values"):
        cache = model_kwargs.get(name)
        layers = cache.layers if isinstance(cache, Cache) else ()
        if any(isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0 for layer in layers):
            raise ValueError(f"Thinking cannot go on from `{name}`; pass the whole text, or `think='never'`.")
    if not bool(mask[:, -1].all()):
        raise ValueError("Prompts are padded on the right; set `padding_side='left'` in the tokenizer.")


def _check_positions(model: ThinkingModel, config: GenerationConfig, prompt_length: int) -> None:
    """Rotary positions go on beyond those that a model was trained for; a table of positions ends."""
    if getattr(model.config.get_text_config(), "rope_parameters", None) is None:
        thought_length = model.quietstar_settings.thought_length
        limit, text, advice, before = max_positions(model.config), None, "lower `max_length` to", 0
        if config.max_new_tokens is not None:
            text = f"A prompt of {prompt_length} tokens and `max_new_tokens` {config.max_new_tokens}"
            advice, before = "lower `max_new_tokens` to", prompt_length
        check_length(config.max_length, thought_length, limit, text, None, advice, before)  # type: ignore[arg-type]
