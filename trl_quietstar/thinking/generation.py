"""Generating with thoughts: think after a token, predict the next from both, emit visible text only.

[`think_and_speak`] is the decoding loop that Transformers' `generate` runs in place of its own, so that prompts, padding,
logits processors, stopping criteria and streamers are prepared as usual. Hidden states come from a
[`~branches.decoders.Decoder`].
"""

from dataclasses import dataclass, field, replace

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.cache_utils import CacheLayerMixin
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .._compat import pad_token
from ..branches.decoders import decoder_of
from ..model.embeddings import embed_tokens
from ..model.family import check_length, max_positions
from ..model.heads import ThinkingModel, mixing_weights
from ..model.lm_head import logits_of, uncertainty
from ..model.marks import closing_mask, end_slots, start_slots
from ..text.batch import Positions, Text
from ..text.positions import is_difficult
from ..text.transfer import exact_dtype, to_device, to_host
from .drawing import SamplingSettings, draw_tokens, fixed_draws, thought_sampling
from .when import ENDLESS, Thinking
from .writing import Running, Writer


@dataclass
class GeneratedThought:
    """
    A thought that was written while generating.

    Parameters:
        position (`int`):
            The token that the thought follows, as an index into its row of `sequences`.
        token_ids (`list[int]`):
            The thought's tokens.
        mixing_weights (`list[float]`):
            The thought's weight in the prediction of each token that it was read for, in order.
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


class Predictor:
    """
    Predicts the next token of texts that are being generated, and thinks before it does where a thought is due.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            The model.
        thinking ([`~thinking.when.Thinking`]):
            When to think.
        sampling ([`~thinking.drawing.SamplingSettings`]):
            How thoughts are drawn.
        fixed (`bool`):
            Whether thoughts are drawn by fixed random numbers rather than new ones, or are greedy where `thinking` says so.
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
        if fixed and thinking.greedy:
            sampling = replace(sampling, do_sample=False)
        self.model, self.thinking, self.sampling = model, thinking, sampling
        self.writer = replace(Writer.of(model, sampling), draw=self._draw)
        self._drawn_from: list[torch.Tensor] = []  # `(B, 1, H)` for each token of the thought that is being written
        self.fixed, self.streamer = fixed, streamer
        self.thoughts: list[list[GeneratedThought]] = []
        # what the device has not told yet: of each row a thought, if any, with its tokens and their mask, or with a weight
        self._unread_tokens: list[tuple[list[GeneratedThought | None], torch.Tensor, torch.Tensor]] = []
        self._unread_weights: list[tuple[list[GeneratedThought | None], torch.Tensor]] = []

    def read_prompts(self, prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Begins the texts.

        Args:
            prompts (`torch.Tensor` of shape `(B, T)`):
                Token ids, padded on the left.
            mask (`torch.Tensor` of shape `(B, T)`, bool):
                False on padding; in the host's memory.

        Returns:
            The next tokens' logits, of shape `(B, V)`.
        """
        self.decoder = decoder_of(self.model, len(prompts))
        self.lengths, self.width = mask.sum(1), prompts.shape[1]
        self.thoughts = [[] for _ in prompts]
        self.left = torch.zeros_like(self.lengths)  # tokens that each row's thought still serves
        self.since = torch.full_like(self.lengths, ENDLESS)  # tokens since each row's last thought
        return self._logits(self.decoder.read(prompts, mask), None, torch.ones_like(self.left, dtype=torch.bool))

    def read_tokens(self, tokens: torch.Tensor, unfinished: torch.Tensor) -> torch.Tensor:
        """
        Goes on by the tokens that were emitted.

        Args:
            tokens (`torch.Tensor` of shape `(B,)`):
                Token ids.
            unfinished (`torch.Tensor` of shape `(B,)`, bool):
                Which texts go on; there are no thoughts after the others. In the host's memory.

        Returns:
            The next tokens' logits, of shape `(B, V)`.
        """
        self.lengths, self.width = self.lengths + 1, self.width + 1
        self.left, self.since = self.left * unfinished, self.since + 1
        self.decoder.drop(~unfinished)
        hidden = self.decoder.read(tokens[:, None], torch.ones(len(tokens), 1, dtype=torch.bool))
        alive, after_thought = self.left > 0, None
        if bool(alive.any()):
            after_thought = self.decoder.extend(embed_tokens(self.model, tokens[:, None]), alive[:, None])[:, -1]
        return self._logits(hidden, after_thought, unfinished)

    def _logits(
        self, hidden: torch.Tensor, after_thought: torch.Tensor | None, unfinished: torch.Tensor
    ) -> torch.Tensor:
        """The next tokens' logits from the texts' hidden states, `(B, H)`, and those after thoughts that are still read."""
        due, plain = (self.since >= self.thinking.distance) & unfinished, None
        if self.thinking.mode == "adaptive":
            plain = logits_of(self.model, hidden)
            due &= is_difficult(uncertainty(plain), self.thinking.threshold).cpu()
        if bool(due.any()):
            fresh = self._think(due)
            if after_thought is not None:  # where no new thought is due, the older one is read on
                fresh = torch.where(to_device(due, hidden.device)[:, None], fresh, after_thought)
            after_thought = fresh
            self.left = torch.where(due, self.thinking.span, self.left)
            self.since = self.since.masked_fill(due, 0)
        if after_thought is None:
            return logits_of(self.model, hidden) if plain is None else plain
        mix = self._weights(hidden, after_thought)[:, None].to(hidden.dtype)
        return logits_of(self.model, mix * after_thought + (1 - mix) * hidden)

    def _weights(self, hidden: torch.Tensor, after_thought: torch.Tensor) -> torch.Tensor:
        """The thoughts' weights in this prediction, `(B,)`, 0 where there is none; thoughts that have served are dropped."""
        served = self.left > 0
        weights = mixing_weights(self.model, hidden, after_thought) * to_device(served, hidden.device)
        thoughts = [x[-1] if active else None for x, active in zip(self.thoughts, served.tolist(), strict=True)]
        self._unread_weights.append((thoughts, weights))
        self.left = (self.left - 1).clamp(min=0)
        self.decoder.drop(served & (self.left == 0))
        return weights

    def _think(self, rows: torch.Tensor) -> torch.Tensor:
        """Writes a thought in the rows of a mask `(B,)`; returns the hidden states of its end slots, `(B, H)`."""
        self.decoder.fork(rows, len(self.model.thought_marks.unread))
        alive, marks, self._drawn_from = rows[:, None], self.model.thought_marks, []
        hidden = self.decoder.extend(start_slots(self.model, len(rows)), alive.expand(-1, marks.before))[:, -1:]
        token_ids, mask, _ = self.writer.write(self.decoder, hidden, alive, self._draws(hidden.device)[:, None])
        token_ids, mask = token_ids[:, 0], mask[:, 0]
        # the last token and the end share a forward
        last = torch.cat([embed_tokens(self.model, token_ids[:, -1:]), end_slots(self.model, len(rows))], dim=1)
        closed = marks.closed(token_ids, to_device(mask, token_ids.device))
        closing = closing_mask(rows, None if closed is None else closed.cpu(), marks.after)
        ended = self.decoder.extend(last, torch.cat([mask[:, -1:], closing], dim=1))
        self._note(rows, token_ids, mask)
        if closed is None:
            return ended[:, -1]
        states = torch.cat([*self._drawn_from, ended[:, :1]], dim=1)  # after each number of tokens, from none on
        own = states[torch.arange(len(rows), device=closed.device), to_device(mask.sum(1), closed.device)]
        return torch.where(closed[:, None], own, ended[:, -1])

    def _draw(self, hidden: torch.Tensor, draws: torch.Tensor, running: Running) -> torch.Tensor:
        """Draws a token of each thought; the hidden states it is drawn from predict the text after a thought that has closed
        itself."""
        self._drawn_from.append(hidden)
        return draw_tokens(self.model, hidden, draws, self.sampling)

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

    def written(self) -> list[list[GeneratedThought]]:
        """The thoughts of each row so far; waits for what only the device knows of them."""
        count = len(self._unread_tokens)
        read = to_host([*(ids for _, ids, _ in self._unread_tokens), *(w for _, w in self._unread_weights)])
        for (thoughts, _, mask), ids in zip(self._unread_tokens, read[:count], strict=True):
            for thought, own, exists in zip(thoughts, ids, mask, strict=True):
                if thought is not None:
                    thought.token_ids = own[exists].tolist()
        for (thoughts, _), weights in zip(self._unread_weights, read[count:], strict=True):
            for thought, weight in zip(thoughts, weights.tolist(), strict=True):
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
    Generates, greedily or by sampling: the decoding loop that `generate(custom_generate=...)` calls.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            The model.
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Prompts, padded on the left where `attention_mask`, among the further arguments, is 0.
        logits_processor, stopping_criteria, generation_config, streamer, tokenizer:
            As `generate` prepares them. With `do_sample=False` thoughts are drawn all the same, by the random numbers of
            [`~thinking.drawing.fixed_draws`], unless they are greedy too (`thinking.greedy`).
        thinking ([`~thinking.when.Thinking`]):
            When to think.
        return_thoughts (`bool`):
            Whether to return the thoughts.
        thought_streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
            Gets the tokens of each thought, before the text that it served, and ends with that text.

    Returns:
        `torch.Tensor` of shape `(B, T + new)`, or [`GenerateThoughtfulOutput`].

    Raises:
        `ValueError`: for a decoding method other than greedy search and sampling, a cache to go on from, or right
            padding.
    """
    config, mask = generation_config, model_kwargs.get("attention_mask")
    mask = torch.ones(input_ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    _check_request(config, input_ids, mask, synced_gpus, model_kwargs)
    sampling = thought_sampling(model.quietstar_settings, model.thought_tokenizer(tokenizer))
    _check_positions(model, config, input_ids.shape[1])
    _check_turn(model, thinking, input_ids, mask)
    predictor = Predictor(model, thinking, sampling, not config.do_sample, thought_streamer)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = pad_token(config) if ends else None  # of rows that have ended
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    scores: list[torch.Tensor] = []
    raw_logits: list[torch.Tensor] = []
    logits = predictor.read_prompts(input_ids, mask)
    while True:
        warped = logits_processor(input_ids, logits)  # type: ignore[arg-type]  # it wants a `LongTensor`
        if config.output_scores:
            scores.append(warped)
        if config.output_logits:
            raw_logits.append(logits)
        tokens = torch.multinomial(warped.softmax(-1), 1)[:, 0] if config.do_sample else warped.argmax(-1)
        if pad is not None:
            tokens = torch.where(unfinished, tokens, pad)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, tuple(scores))
        going_on = unfinished.cpu()  # the one wait for the device
        if not bool(going_on.any()):
            break
        logits = predictor.read_tokens(tokens, going_on)
    for listener in (x for x in (thought_streamer, streamer) if x is not None):
        listener.end()
    if not (return_thoughts or config.return_dict_in_generate):
        return input_ids
    thoughts = predictor.written() if return_thoughts else None
    return GenerateThoughtfulOutput(input_ids, tuple(scores) or None, tuple(raw_logits) or None, thoughts=thoughts)  # type: ignore[arg-type]  # `LongTensor`s


def _check_request(
    config: GenerationConfig, input_ids: torch.Tensor, mask: torch.Tensor, synced_gpus: bool, model_kwargs: dict
) -> None:
    """Refuses what does not go with thoughts."""
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
    if not bool(mask.any(1).all()):
        raise ValueError("`attention_mask` leaves a prompt without a token; give each one token at least.")
    if not bool(mask[:, -1].all()):
        raise ValueError("Prompts are padded on the right; set `padding_side='left'` in the tokenizer.")


def _check_turn(model: ThinkingModel, thinking: Thinking, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
    """A turn that asks for a thought has its place at the end of a prompt."""
    marks, at = model.thought_marks, input_ids.shape[1] - 1
    if not marks.unread or thinking.mode == "never":
        return
    if thinking.mode != "prompt_end":
        raise ValueError(
            f"`think` is {thinking.mode!r}, and with `thought_prompt_role` a turn before the answer asks for the thought; leave `think` "
            "out, or pass `think='prompt_end'` or `think='never'`."
        )
    ends = torch.full((len(input_ids), 1), at)
    marks.check(Text.from_batch(input_ids.cpu(), mask), Positions(ends, ends == at))


def _check_positions(model: ThinkingModel, config: GenerationConfig, prompt_length: int) -> None:
    """Rotary positions go on beyond those that a model was trained for; a table of positions ends."""
    if getattr(model.config.get_text_config(), "rope_parameters", None) is None:
        thought_length = model.quietstar_settings.thought_length
        limit, text, advice, before = max_positions(model.config), None, "lower `max_length` to", 0
        if config.max_new_tokens is not None:
            text = f"A prompt of {prompt_length} tokens and `max_new_tokens` {config.max_new_tokens}"
            advice, before = "lower `max_new_tokens` to", prompt_length
        around = model.thought_marks.around
        check_length(config.max_length, thought_length, limit, text, None, advice, before, around)
