"""Sampling thoughts: all positions at once, without gradient.

A token is drawn by inverting the distribution's cumulative sum at a given uniform number. So a thought is a function
of the model, the text up to its position, and its own random numbers: the same on either path and in any batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StopStringCriteria
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..branches.base import BranchCache, BranchPath
from ..model.embeddings import embed_tokens, embed_vector
from ..model.heads import ThinkingModel
from ..model.lm_head import Drawn, logits_by_rows, normalized_entropy, scratch
from ..settings import QuietStarSettings
from ..text.batch import Positions, Text, Thoughts, choose_positions, gather_hidden, seeded_generators
from ..text.transfer import to_device, to_host


BLOCK = 128  # tokens of the vocabulary whose probabilities are summed first when one is drawn
TOKENS_BETWEEN_LOOKS = 4  # for ends of thoughts on a device, each of which is waited for
MODES = ("always", "adaptive", "prompt_end", "never")
ENDLESS = 2**31  # tokens: more than any text has


@dataclass(frozen=True)
class SamplingSettings:
    """
    How thoughts are drawn.

    Parameters:
        thought_length (`int`):
            L, the most tokens.
        num_thoughts (`int`):
            G, thoughts a position.
        temperature, top_k, top_p, min_p:
            As in [`~transformers.GenerationConfig`]; `top_k=0`, `top_p=1.0` and `min_p=None` switch theirs off.
        do_sample (`bool`):
            Whether to sample; otherwise the most likely token is taken.
        min_thought_length (`int`):
            Least tokens before `stop` may end a thought.
        stop (`Callable`, *optional*):
            From token ids of shape `(rows, length)` to a bool of shape `(rows,)`: whether the thought ends here.
    """

    thought_length: int
    num_thoughts: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    do_sample: bool = True
    min_thought_length: int = 1
    stop: Callable[[torch.Tensor], torch.Tensor] | None = None

    def warpers(self) -> LogitsProcessorList:
        """Transformers' own logits warpers, in the order `generate` applies them."""
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(_TopP(self.top_p))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


@dataclass(frozen=True)
class Thinking:
    """
    When to think in generation and scoring, and for how long a thought is read. A new thought takes an older one's place.

    Parameters:
        mode (`str`):
            `"always"`; `"adaptive"`: where the no-thought prediction is uncertain; `"prompt_end"`: once, before the first
            new token; or `"never"`.
        every (`int`):
            Least distance between two thoughts, in tokens.
        threshold (`float`):
            Least no-thought entropy, divided by log V, to think at (adaptive).
        reach (`int`, *optional*):
            M, the tokens that one thought serves. Defaults to `every`, and with `"prompt_end"` to all that follow.

    Raises:
        `ValueError`: if a value is outside its limits.
    """

    mode: str = "always"
    every: int = 1
    threshold: float = 0.6
    reach: int | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`think` is {self.mode!r}; choose one of {', '.join(MODES)}.")
        if self.every < 1:
            raise ValueError(f"`think_every` is {self.every}, below its limit of 1; raise it.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`thinking_threshold` is {self.threshold}; it lies between 0 and 1.")

    @property
    def distance(self) -> int:
        """Least distance between two thoughts, in tokens; more than any text has where there is one thought only."""
        return ENDLESS if self.mode == "prompt_end" else self.every

    @property
    def span(self) -> int:
        """M, the tokens that one thought serves, unless another takes its place."""
        return self.distance if self.reach is None else self.reach

    @classmethod
    def of(
        cls,
        settings: QuietStarSettings,
        mode: "str | Thinking | None" = None,
        every: int | None = None,
        threshold: float | None = None,
    ) -> "Thinking":
        """
        When a model thinks: as it was trained to, unless a user asks for something else.

        Args:
            settings ([`~settings.QuietStarSettings`]):
                The model's.
            mode (`str` or [`Thinking`], *optional*), every (`int`, *optional*), threshold (`float`, *optional*):
                What the user asks for. `every` alone keeps the mode, unless the model thinks at the end of the prompt only.

        Raises:
            `ValueError`: if a value is outside its limits, or goes with another mode only.
        """
        if isinstance(mode, Thinking):
            if every is not None or threshold is not None:
                raise ValueError("`think` says all; leave out `think_every` and `thinking_threshold`.")
            return mode
        talk_length = ENDLESS if settings.talk_length == "completion" else int(settings.talk_length)
        if every is not None and every > talk_length:
            raise ValueError(
                f"`think_every` is {every}, but the model reads a thought for `talk_length` {talk_length} tokens; lower it."
            )
        thinking = cls._as_trained(settings, talk_length)
        asked = mode is not None
        if mode is not None and mode != thinking.mode:
            thinking = cls(mode, reach=talk_length if mode == "prompt_end" else None)
        for name, value in (("think_every", every), ("thinking_threshold", threshold)):
            if value is not None and (thinking.mode == "prompt_end" or (thinking.mode == "never" and not asked)):
                raise ValueError(
                    f"`{name}` is {value}, but the model thinks {thinking}; leave it out, or pass `think='always'` or "
                    "`think='adaptive'` too."
                )
        if every is not None:
            thinking = replace(thinking, every=every, reach=None)
        return thinking if threshold is None else replace(thinking, threshold=threshold)

    @classmethod
    def _as_trained(cls, settings: QuietStarSettings, talk_length: int) -> "Thinking":
        """A number or a fraction of positions saves time in training; such a model learns to think anywhere."""
        if settings.thought_positions == "none":
            return cls("never")
        if settings.thought_positions == "prompt_end":
            return cls("prompt_end", reach=talk_length)
        if settings.thought_positions == "difficulty":
            return cls("adaptive", settings.min_thought_interval, settings.difficulty_threshold, talk_length)
        return cls()

    def __str__(self) -> str:
        """In words, after "thinks"."""
        if self.mode == "never":
            return "never"
        where = "once, at the end of the prompt"
        if self.mode != "prompt_end":
            where = "before every token" if self.every == 1 else f"every {self.every} tokens"
        if self.mode == "adaptive":
            where = f"where the next token is uncertain (normalised entropy of {self.threshold:g} or more)"
            where += "" if self.every == 1 else f", {self.every} tokens apart or more"
        read = "all that follows" if self.span >= ENDLESS else "one token" if self.span == 1 else f"{self.span} tokens"
        return f"{where}, each thought for {read}" if self.mode != "prompt_end" else f"{where}, for {read}"


def thought_end(tokenizer: PreTrainedTokenizerBase, stop_string: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    When a thought ends early: at the EOS token or a string.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the model.
        stop_string (`str`, *optional*):
            The string.

    Returns:
        `Callable` from thoughts so far, of shape `(rows, length)`, to a bool of shape `(rows,)`.

    Raises:
        `ValueError`: if the string cannot be told from the tokenizer's tokens.
    """
    try:
        criteria = None if stop_string is None else StopStringCriteria(tokenizer, [stop_string])
    except ValueError as error:  # it puts letters before each token and looks for them in what is decoded
        raise ValueError(
            f"`thought_stop_string` is {stop_string!r}, but this tokenizer does not decode what it was given, so that no "
            "string can be looked for; leave it out and set `min_thought_length`, at which the EOS token ends a thought."
        ) from error
    eos = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id

    def ends(token_ids: torch.Tensor) -> torch.Tensor:
        ended = token_ids[:, -1] == eos
        return ended if criteria is None else ended | criteria(token_ids, None)

    return ends


def thought_sampling(
    settings: QuietStarSettings, tokenizer: PreTrainedTokenizerBase | None, num_thoughts: int = 1
) -> SamplingSettings:
    """
    How a model draws its thoughts, by the settings it was trained with.

    Args:
        settings ([`~settings.QuietStarSettings`]):
            The model's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Needed where thoughts may end early.
        num_thoughts (`int`):
            G.
    """
    stop = None
    if settings.min_thought_length is not None and tokenizer is not None:
        stop = thought_end(tokenizer, settings.thought_stop_string)
    return SamplingSettings(
        thought_length=settings.thought_length,
        num_thoughts=num_thoughts,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        min_thought_length=settings.min_thought_length or 1,
        stop=stop,
    )


def uniforms(positions: Positions, settings: SamplingSettings, generators: list[torch.Generator]) -> torch.Tensor:
    """Random numbers of shape `(B, J, G, L)`, in the host's memory; each sequence's come from its own generator, in
    position order."""
    B, J = positions.index.shape
    draws = torch.zeros(B, J, settings.num_thoughts, settings.thought_length, dtype=torch.float64)
    for row, count, generator in zip(draws, positions.host.mask.sum(1).tolist(), generators, strict=True):
        row[:count] = torch.rand(row[:count].shape, generator=generator, dtype=torch.float64)
    return draws


def fixed_draws(position_ids: torch.Tensor, settings: SamplingSettings, seed: int = 0) -> torch.Tensor:
    """
    The same random numbers for every thought at the same place of a text, whatever the batch and however far the text
    has come: what greedy generation and scoring think with.

    Args:
        position_ids (`torch.Tensor` of shape `(B, J)`):
            Of the thought positions; best in the host's memory.
        settings ([`SamplingSettings`]):
            How many thoughts and tokens.
        seed (`int`):
            Of all of them.

    Returns:
        `torch.Tensor` of shape `(B, J, G, L)`, in the host's memory.
    """
    places, inverse = position_ids.cpu().unique(return_inverse=True)
    shape = (settings.num_thoughts, settings.thought_length)
    rows = [
        torch.rand(shape, generator=generator, dtype=torch.float64)
        for generator in seeded_generators(seed, 0, places.tolist())
    ]
    return torch.stack(rows)[inverse]


@torch.no_grad()
def sample_thoughts(
    model: ThinkingModel,
    cache: BranchCache,
    text: Text,
    positions: Positions,
    settings: SamplingSettings,
    draws: torch.Tensor,
    greatest: Callable[[int], int] = int,
) -> Thoughts:
    """
    Writes `num_thoughts` thoughts at every position (Quiet-STaR, section 4.1: parallel generation).

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        cache ([`BranchCache`]):
            The text as this model read it; not used again after this call.
        text ([`Text`]):
            The batch.
        positions ([`Positions`]):
            Where to think.
        settings ([`SamplingSettings`]):
            How.
        draws (`torch.Tensor` of shape `(B, J, G, L)`):
            A uniform number for each token, as [`uniforms`] or [`fixed_draws`] gives them, in the host's memory.
        greatest (`Callable`, *optional*):
            As in [`ThoughtSampler`].

    Returns:
        [`Thoughts`] with tensors of shape `(B, J, G, L)`.
    """

    def draw(hidden: torch.Tensor, u: torch.Tensor, running: _Running) -> torch.Tensor:
        return draw_tokens(model, hidden, u, settings)

    embed = functools.partial(embed_tokens, model)
    return _write(model, cache, positions, settings, draws, draw, embed, greatest)[0]


@dataclass(frozen=True)
class _Running:
    """
    Branches that the model runs on: all `(B, N)`, or a selection `(R, W)` of them where many have ended.

    Parameters:
        cache ([`BranchCache`]):
            Of these branches.
        places (`tuple` of `torch.Tensor`, *optional*):
            Row and column of each among those of `of`; None: these are all.
        anchors (`torch.Tensor` of shape `(R, W)`):
            As in [`BranchCache`].
        draws, token_ids, mask (`torch.Tensor` of shape `(R, W, L)`):
            Uniform numbers, tokens so far, and which of them exist.
        alive (`torch.Tensor` of shape `(R, W)`, bool):
            Which have not ended.
        of ([`_Running`], *optional*):
            What they were selected from.
    """

    cache: BranchCache
    anchors: torch.Tensor
    draws: torch.Tensor
    token_ids: torch.Tensor
    mask: torch.Tensor
    alive: torch.Tensor
    places: tuple[torch.Tensor, torch.Tensor] | None = None
    of: "_Running | None" = None

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "_Running":
        """Of these rows, `(R,)`, the branches at columns, `(R, W)`; both in the host's memory."""
        device = self.token_ids.device
        places = (to_device(rows[:, None], device), to_device(columns, device))
        draws, token_ids, mask, alive = (x[places] for x in (self.draws, self.token_ids, self.mask, self.alive))
        cache, anchors = self.cache.select(rows, columns), self.anchors[rows[:, None], columns]
        return _Running(cache, anchors, draws, token_ids, mask, alive, places, self)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of these branches, `(R, W, ...)`, among all, `(B, N, ...)`, where others have 0."""
        if self.of is None or self.places is None:
            return values
        room = values.new_zeros(*self.of.alive.shape, *values.shape[2:])
        return self.of.spread(room.index_put(self.places, values))

    def everything(self) -> "_Running":
        """All branches, each as far as it was run."""
        now = self
        while now.of is not None and now.places is not None:
            for name in ("token_ids", "mask"):
                getattr(now.of, name)[now.places] = getattr(now, name)
            now = now.of
        return now


def _fewer(alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows and columns, for [`_Running.select`], of at most half as many branches with all that are `alive`, `(R, W)`, in the
    host's memory; None if there are none so few."""
    counts = alive.sum(1)
    rows, width = torch.arange(len(alive)), max(int(counts.max()), 1)
    if 2 * int((counts > 0).sum()) <= len(alive):  # of any fewer, the text's keys and values would be copied often
        rows = (counts > 0).nonzero().flatten() if bool(alive.any()) else rows[:1]
    if 2 * len(rows) * width > alive.numel():
        return None
    return rows, torch.argsort((~alive[rows]).int(), dim=1, stable=True)[:, :width]


def _write(
    model: ThinkingModel,
    cache: BranchCache,
    positions: Positions,
    settings: SamplingSettings,
    draws: torch.Tensor,
    draw: Callable[[torch.Tensor, torch.Tensor, _Running], torch.Tensor],
    embed: Callable[[torch.Tensor], torch.Tensor],
    greatest: Callable[[int], int],
    finishes: bool = False,
) -> tuple[Thoughts, _Running]:
    """
    The loop over a thought's tokens: `draw` gives them for hidden states `(R, W, H)`, uniform numbers `(R, W)` and the
    branches they are of; `embed` their embeddings. Thoughts that have ended are left out as soon as they are half of what is
    run; where the branches will go on, `finishes` has the last token run before.
    """
    (B, J), G, L = positions.index.shape, settings.num_thoughts, settings.thought_length
    shape, device = (B, J, G, L), positions.index.device
    token_ids = torch.zeros(B, J * G, L, dtype=torch.long, device=device)
    alive = positions.mask.repeat_interleave(G, dim=1)
    anchors = positions.host.index.repeat_interleave(G, dim=1)
    mask = torch.zeros_like(token_ids, dtype=torch.bool)
    now = _Running(cache, anchors, to_device(draws, device).flatten(1, 2), token_ids, mask, alive)
    embeds = embed_vector(model, model.quietstar.start_embedding).expand(B, J * G, -1)
    for step in range(L):
        now.mask[..., step] = now.alive
        drawn = draw(now.cache.extend(now.anchors, embeds), now.draws[..., step], now)
        now.token_ids[..., step] = drawn
        if settings.stop is not None and settings.min_thought_length <= step + 1 < L:
            now.alive.logical_and_(~settings.stop(now.token_ids[..., : step + 1].flatten(0, 1)).view(drawn.shape))
            if device.type == "cpu" or (step + 1) % TOKENS_BETWEEN_LOOKS == 0:
                alive, written = to_host([now.alive, now.mask[..., step]])
                if not greatest(int(alive.any())):
                    break
                fewer = _fewer(written if finishes else alive)
                if fewer is not None:
                    now = now.select(*fewer)
                    drawn = now.token_ids[..., step].clone()  # no view of what goes on changing: a graph may keep it
        if step + 1 < L:
            embeds = embed(drawn)
    whole = now.everything()
    thoughts = Thoughts(positions, (whole.token_ids * whole.mask).view(shape), whole.mask.view(shape))
    return _cut(thoughts, L, settings), now


def _cut(thoughts: Thoughts, length: int, settings: SamplingSettings) -> Thoughts:
    """The first tokens of thoughts. Where none ends early, the host knows which exist without asking the device."""
    cut = Thoughts(thoughts.positions, thoughts.token_ids[..., :length], thoughts.mask[..., :length])
    known = vars(thoughts).get("host_mask")
    if settings.stop is None:
        known = thoughts.positions.host.mask[..., None, None].expand(thoughts.mask.shape)
    if known is not None:
        vars(cut)["host_mask"] = known[
            ..., :length
        ]  # no field: `dataclasses.replace` must not carry it to another mask
    return cut


def unfinished(thoughts: Thoughts, settings: SamplingSettings) -> torch.Tensor:
    """
    Mask of shape `(B, J, G)`: thoughts that were cut at `thought_length` before they ended by themselves.

    Args:
        thoughts ([`Thoughts`]):
            The thoughts.
        settings ([`SamplingSettings`]):
            With which they were sampled.
    """
    cut = thoughts.mask[..., -1]
    if settings.stop is None or thoughts.mask.shape[-1] < settings.thought_length:
        return torch.zeros_like(cut)
    return cut & ~settings.stop(thoughts.token_ids.flatten(0, 2)).view(cut.shape)


@dataclass(frozen=True)
class ThoughtSampler:
    """
    How the thoughts of a batch are drawn, positions included; each row from its own random numbers.

    Parameters:
        settings ([`SamplingSettings`]):
            Of the thoughts.
        generators (`list[torch.Generator]`):
            One for each row.
        thought_positions, difficulty_threshold, min_thought_interval:
            As in [`QuietStarConfig`].
        greatest (`Callable`, *optional*):
            From a number to the greatest of all processes, where each must call the layers as often as the others. Defaults to
            this process's own.
        given (`tuple`, *optional*):
            [`Positions`] and uniform numbers of shape `(B, J, G, L)`, in place of those from the generators.
    """

    settings: SamplingSettings
    generators: list[torch.Generator]
    thought_positions: int | float | str
    difficulty_threshold: float = 0.6
    min_thought_interval: int = 3
    greatest: Callable[[int], int] = int
    given: tuple[Positions, torch.Tensor] | None = None

    def positions(self, text: Text) -> Positions:
        """Where thoughts will be, if no model is needed to tell; draws the generators' first numbers."""
        return choose_positions(text, self.thought_positions, self.generators)

    @torch.no_grad()
    def sample(self, model: ThinkingModel, text: Text, path: BranchPath, batch_size: int | None = None) -> Thoughts:
        """Reads the text and writes its thoughts, without gradient; of each row about `batch_size` at once, or all."""
        cache, device = path.read(model, text), text.input_ids.device
        positions = self._positions(model, text, cache)
        size = positions.index.shape[1] if batch_size is None else max(batch_size // self.settings.num_thoughts, 1)
        groups = (x.split(size, dim=1) for x in (positions.host.index, positions.host.mask, self._draws(positions)))
        parts: list[Thoughts] = []
        for index, mask, draws in zip(*groups, strict=True):
            if parts:
                cache = cache.again()
            places = Positions(index, mask).to(device)
            parts.append(sample_thoughts(model, cache, text, places, self.settings, draws, self.greatest))
        token_ids, mask = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("token_ids", "mask"))
        thoughts, longest = Thoughts(positions, token_ids, mask), self.settings.thought_length
        if self.settings.stop is not None:  # where all thoughts ended early, no slot is kept for more
            longest = self.greatest(max(int(thoughts.host_mask.sum(-1).max()), 1))
        return _cut(thoughts, longest, self.settings)

    def sample_in_graph(
        self, model: ThinkingModel, text: Text, cache: BranchCache, embed: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[Thoughts, torch.Tensor, Drawn]:
        """
        The same thoughts, keeping the graph of the forwards that they were drawn from.

        Args:
            model ([`ThinkingModel`]):
                A model with heads.
            text ([`Text`]):
                The batch.
            cache ([`BranchCache`]):
                The text as this model read it, with gradient; it has then seen all tokens of a thought but the last.
            embed (`Callable`):
                From token ids to embeddings.

        Returns:
            `tuple`: [`Thoughts`]; the hidden states that each token was drawn from, `(B, J, G, L, H)`; and what is known of
            each token, of shape `(B, J, G, L)`.
        """
        states: list[torch.Tensor] = []  # of each token, all branches
        drawn: list[tuple[torch.Tensor, ...]] = []

        def draw(hidden: torch.Tensor, draws: torch.Tensor, running: _Running) -> torch.Tensor:
            known = draw_with_statistics(model, hidden, draws, self.settings)
            states.append(running.spread(hidden))
            drawn.append(tuple(running.spread(getattr(known, field.name)) for field in fields(Drawn)))
            return known.token_ids

        positions = self._positions(model, text, cache)
        draws = self._draws(positions)
        args = (model, cache, positions, self.settings, draws, draw, embed, self.greatest)
        thoughts, running = _write(*args, finishes=True)
        while running.of is not None and running.places is not None:
            running.of.cache.take_back(running.cache, running.places)  # type: ignore[attr-defined]  # they branch
            running = running.of
        thoughts = _cut(thoughts, len(states), self.settings)
        shape = thoughts.mask.shape
        known = Drawn(*(torch.stack(x, dim=2).view(shape) for x in zip(*drawn, strict=True)))
        return thoughts, torch.stack(states, dim=2).unflatten(1, shape[1:3]), known

    def _positions(self, model: ThinkingModel, text: Text, cache: BranchCache) -> Positions:
        if self.given is not None:
            return self.given[0]
        positions = choose_positions(
            text,
            self.thought_positions,
            self.generators,
            lambda: normalized_entropy(model, cache.text_hidden[:, :-1]),
            self.difficulty_threshold,
            self.min_thought_interval,
        )
        J, host = positions.index.shape[1], positions.host
        missing = (0, self.greatest(J) - J)
        padded = Positions(*(torch.nn.functional.pad(x, missing) for x in (host.index, host.mask)))
        return padded.to(text.input_ids.device)

    def _draws(self, positions: Positions) -> torch.Tensor:
        if self.given is not None:
            return self.given[1]
        return uniforms(positions, self.settings, self.generators)


@torch.no_grad()
def greedy_continuation(model: ThinkingModel, cache: BranchCache, positions: Positions, length: int) -> torch.Tensor:
    """
    What the model would say after each position if it did not think: its most likely tokens, without start embedding.

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        cache ([`BranchCache`]):
            The text as this model read it; not used again after this call.
        positions ([`Positions`]):
            Where.
        length (`int`):
            How many tokens.

    Returns:
        `torch.Tensor` of shape `(B, J, length)`.
    """
    greedy = SamplingSettings(length, do_sample=False)
    hidden = gather_hidden(cache.text_hidden, positions.index)
    unused = torch.zeros(positions.index.shape, device=hidden.device)
    tokens = [draw_tokens(model, hidden, unused, greedy)]
    while len(tokens) < length:
        hidden = cache.extend(positions.host.index, embed_tokens(model, tokens[-1]))
        tokens.append(draw_tokens(model, hidden, unused, greedy))
    return torch.stack(tokens, dim=-1)


@torch.no_grad()
def draw_tokens(
    model: ThinkingModel, hidden: torch.Tensor, draws: torch.Tensor, settings: SamplingSettings
) -> torch.Tensor:
    """Token ids of shape `(B, N)` for hidden states of shape `(B, N, H)` and uniform numbers of shape `(B, N)`."""
    warpers, u = settings.warpers(), draws.flatten()
    tokens = []
    for rows, logits in logits_by_rows(model, hidden.flatten(0, 1)):
        if settings.do_sample:
            warped = warpers(None, logits)  # type: ignore[arg-type]  # none reads the ids so far
            tokens.append(_invert(warped.sub_(warped.amax(-1, keepdim=True)).exp_(), u[rows]))
        else:
            tokens.append(logits.argmax(-1))
    return torch.cat(tokens).view(draws.shape)


@torch.no_grad()
def draw_with_statistics(
    model: ThinkingModel, hidden: torch.Tensor, draws: torch.Tensor, settings: SamplingSettings
) -> Drawn:
    """The same tokens, and what the policy at the sampling temperature says of them, from one set of logits."""
    shapers, u = replace(settings, temperature=1.0).warpers(), draws.flatten()
    parts = []
    for rows, logits in logits_by_rows(model, hidden.flatten(0, 1)):
        logits.div_(settings.temperature)
        top = logits.amax(-1, keepdim=True)
        shifted = logits.sub_(top)
        mass = torch.exp(
            shifted, out=scratch("weights", len(shifted), shifted.shape[1], shifted.dtype, shifted.device)
        )
        total = mass.sum(-1)
        if not settings.do_sample:
            token_ids = shifted.argmax(-1)
        else:
            token_ids = _invert(shapers(None, shifted).exp() if len(shapers) > 0 else mass, u[rows])  # type: ignore[arg-type]
        logps = shifted.gather(1, token_ids[:, None])[:, 0] - total.log()
        entropies = total.log() - shifted.mul_(mass).sum(-1) / total
        parts.append((token_ids, logps, entropies, top[:, 0] + total.log()))
    return Drawn(*(torch.cat(x).view(draws.shape) for x in zip(*parts, strict=True)))


def _invert(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """
    The token at which the cumulative probability passes `u`, of shape `(rows,)`; probabilities, `(rows, V)`, are relative to
    the greatest, which is 1.

    The sum runs over blocks of the vocabulary first, then within one, so that no second array of `(rows, V)` is made. It is a
    sum of whole numbers: that of others depends on the order, which a GPU does not keep, and MPS knows no float64.
    """
    V = probs.shape[1]
    whole = V // BLOCK * BLOCK
    sums = torch.cat(
        [probs[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1), probs[:, whole:].sum(-1, keepdim=True)], dim=1
    )
    cumulative = _whole(sums).cumsum(-1)
    threshold = _share(cumulative, u[:, None])
    # of a sum that is NaN nothing is passed: a token as good as any is drawn
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=sums.shape[1] - 1)
    mass = sums.gather(1, block)
    left = threshold - cumulative.gather(1, block) + _whole(mass)
    share = left.to(u.dtype) / _whole(mass)
    index = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    within = _whole(probs.gather(1, index.clamp(max=V - 1)) * (index < V) / mass).cumsum(-1)
    offset = torch.searchsorted(within, _share(within, share.clamp(min=0)), right=True)
    return (block * BLOCK + offset)[:, 0].clamp_(max=V - 1)


class _TopP(TopPLogitsWarper):
    """Transformers' own, whose sum PyTorch refuses on CUDA under `full_determinism`; there it is of whole numbers."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
            return super().__call__(input_ids, scores)  # type: ignore[arg-type]
        ascending, index = scores.sort(-1)
        below = _whole(ascending.softmax(-1)).cumsum(-1) <= int((1 - self.top_p) * 2**40)
        below[:, -1] = False  # the likeliest token stays
        return scores.masked_fill(below.scatter(1, index, below), self.filter_value)


def _whole(probs: torch.Tensor) -> torch.Tensor:
    """Probabilities as multiples of 2^-40; a vocabulary of them still fits into 64 bits."""
    return (probs * 2.0**40).long()


def _share(cumulative: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """A share, from 0 to 1, of a cumulative sum's total, and always less than that: something is left to be passed."""
    total = cumulative[:, -1:]
    return torch.minimum((share * total).long(), total - 1)
