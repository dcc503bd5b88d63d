"""Scoring with thoughts: how likely given text is under the predictions that generation with thoughts would make.

All positions think at once, on the packed path, with the random numbers of greedy generation; so the log-probabilities of
what greedy generation wrote are those it wrote it with.
"""

import torch

from .geometry import Positions, Text, Thoughts
from .heads import ThinkingModel
from .lm_head import normalized_entropy, token_statistics
from .paths import Path
from .sampling import SamplingSettings, Thinking, fixed_draws, sample_thoughts, thought_sampling
from .scoring import ScoreRequest, Scores, score


BRANCHES_AT_ONCE = 96


@torch.no_grad()
def think_in_chunks(
    model: ThinkingModel,
    path: Path,
    text: Text,
    positions: Positions,
    settings: SamplingSettings,
    draws: torch.Tensor,
    talk_length: int,
    prediction: str,
) -> tuple[Thoughts, Scores]:
    """
    Writes and scores thoughts at any number of positions, a few of them at a time, so that memory does not grow with
    the text's length squared.

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        path ([`Path`]):
            How to get hidden states.
        text ([`Text`]):
            The batch.
        positions ([`Positions`]):
            Where to think.
        settings ([`SamplingSettings`]):
            How.
        draws (`torch.Tensor` of shape `(B, J, G, L)`):
            A uniform number for each token.
        talk_length (`int`):
            M.
        prediction (`str`):
            `"mixed"` or `"thought"`.

    Returns:
        [`Thoughts`], and [`Scores`] with `text_logps`, `talk_logps`, `talk_correct` and `mixing_weights`.
    """
    size = max(BRANCHES_AT_ONCE // (settings.num_thoughts * len(positions.index)), 1)
    thoughts, scores = [], []
    pieces = (x.split(size, dim=1) for x in (positions.index, positions.mask, draws))
    for index, mask, numbers in zip(*pieces, strict=True):
        part = sample_thoughts(model, path.read(model, text), text, Positions(index, mask), settings, numbers)
        thoughts.append(part)
        scores.append(score(model, ScoreRequest(text, part, talk_length, path, prediction=prediction)))
    joined = {
        name: torch.cat([part[name] for part in scores], dim=1)
        for name in ("talk_logps", "talk_correct", "mixing_weights")
    }
    token_ids, mask = (torch.cat([x.token_ids for x in thoughts], 1), torch.cat([x.mask for x in thoughts], 1))
    return Thoughts(positions, token_ids, mask), Scores(text_logps=scores[0].text_logps, **joined)  # type: ignore[arg-type]


@torch.no_grad()
def log_likelihoods(
    model: ThinkingModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    score_mask: torch.Tensor | None = None,
    thinking: Thinking | None = None,
    tokenizer=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-likelihoods of given text, thinking before its tokens as greedy generation would.

    Args:
        model ([`ThinkingModel`]):
            A thinking model, in `eval()` mode.
        input_ids (`torch.Tensor` of shape `(B, T)`):
            The texts.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            1 on text; padding on either side.
        score_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            1 on the tokens to score, a run in each row: the first is what generation would begin with. Defaults to all
            tokens but the first.
        thinking ([`~sampling.Thinking`], *optional*):
            When to think. Defaults to always.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            For models whose thoughts may end early. Defaults to the one beside the model.

    Returns:
        `tuple`: log-probabilities in nats and whether each token is the most likely one (bool), both of shape `(B, T - 1)`,
        for all tokens but the first; 0 and False where nothing is scored.
    """
    thinking, text = thinking or Thinking(), Text.from_batch(input_ids, attention_mask)
    wanted = text.predicted() if score_mask is None else text.predicted() & score_mask[:, 1:].bool()
    path: Path = model.thought_path  # type: ignore[assignment]
    hidden = path.read(model, text).text_hidden[:, :-1]
    plain = token_statistics(model, hidden, input_ids[:, 1:], wanted)
    logps, correct = plain.logps, plain.correct
    positions = _positions(wanted, thinking, hidden, model)
    if not bool(positions.mask.any()):
        return logps, correct
    settings = thought_sampling(model.quietstar_settings, model.thought_tokenizer(tokenizer))  # type: ignore[arg-type]
    draws = fixed_draws(text.position_ids.gather(1, positions.index), settings)
    prediction: str = model.quietstar_settings.prediction  # type: ignore[union-attr,assignment]
    ends = _ends(wanted, positions)
    reach = thinking.span if thinking.span == 1 else min(thinking.span, int((ends - positions.index).max()))
    _, scores = think_in_chunks(model, path, text, positions, settings, draws, reach, prediction)
    served = positions.index[..., None] + torch.arange(reach, device=logps.device)
    valid = positions.mask[..., None] & (served < ends[..., None])
    valid &= wanted.gather(1, served.clamp(max=logps.shape[1] - 1).flatten(1)).view(served.shape)
    rows = torch.arange(len(logps), device=logps.device)[:, None, None].expand_as(served)
    logps[rows[valid], served[valid]] = scores.talk_logps[:, :, 0][valid].to(logps.dtype)
    correct[rows[valid], served[valid]] = scores.talk_correct[:, :, 0][valid].to(correct.dtype)
    return logps, correct


def _positions(wanted: torch.Tensor, thinking: Thinking, hidden: torch.Tensor, model: ThinkingModel) -> Positions:
    """Where generation would think: at the first wanted place where it is due, and again once that thought has served."""
    due = wanted
    if thinking.mode == "never":
        due = torch.zeros_like(wanted)
    elif thinking.mode == "adaptive":
        due = wanted & (normalized_entropy(model, hidden) >= thinking.threshold)
    chosen = torch.zeros_like(due)
    free = torch.zeros(len(due), dtype=torch.long, device=due.device)  # from where a row may think again
    for t in range(due.shape[1]):
        chosen[:, t] = due[:, t] & (free <= t)
        free = torch.where(chosen[:, t], t + thinking.distance, free)
    width = max(int(chosen.sum(1).max()), 1)
    order = torch.argsort((~chosen).int(), dim=1, stable=True)[:, :width]
    return Positions(order, chosen.gather(1, order))


def _ends(wanted: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Of shape `(B, J)`: where a thought's predictions end at the latest, at the next thought or the last wanted token."""
    last = (wanted * torch.arange(1, wanted.shape[1] + 1, device=wanted.device)).amax(1, keepdim=True)
    following = torch.where(positions.mask, positions.index, last)[:, 1:]
    return torch.where(positions.mask, torch.cat([following, last], dim=1), positions.index)
