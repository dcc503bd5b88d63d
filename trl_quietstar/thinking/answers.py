"""What a model says after each of a batch's thoughts: its own answers, for rewards that compare them with the right one.

Thoughts are given, as they were sampled in training. The tokens after them are the most likely ones, by the prediction that is
rewarded: text and thought mixed, or the thought's alone. [`~thinking.generation.think_and_speak`] writes thoughts of its own.
"""

from collections.abc import Callable, Collection

import torch

from ..branches.decoders import Decoder, decoder_of
from ..model.embeddings import embed_tokens
from ..model.heads import ThinkingModel, mixing_weights
from ..model.lm_head import logits_of
from ..model.marks import closing_mask, end_slots, start_slots
from ..text.batch import Text, Thoughts, gather
from ..text.transfer import to_device


@torch.no_grad()
def greedy_answers(
    model: ThinkingModel,
    text: Text,
    thoughts: Thoughts,
    limits: torch.Tensor,
    eos_token_ids: Collection[int],
    batch_size: int | None = None,
    new_decoder: Callable[[ThinkingModel, int], Decoder] = decoder_of,
    greatest: Callable[[int], int] = int,
) -> list[list[int]]:
    """
    Decodes an answer after each thought, greedily.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            A model with heads, in `eval()` mode.
        text ([`Text`]), thoughts ([`Thoughts`] of shape `(B, J, G, L)`):
            The batch and its thoughts. Text after a position is not read.
        limits (`torch.Tensor` of shape `(B, J)`):
            The most tokens of an answer after each position; in the host's memory.
        eos_token_ids (`Collection[int]`):
            Tokens that end an answer and are no part of it.
        batch_size (`int`, *optional*):
            How many thoughts of each text are read at once. Defaults to all.
        new_decoder (`Callable`, *optional*):
            From the model and a number of rows to a decoder. Defaults to the fastest that the start-up check found exact.
        greatest (`Callable`, *optional*):
            As in [`~thinking.sampling.ThoughtSampler`].

    Returns:
        `list`: the tokens of each of the B·J·G answers, in this order; none where there is no thought.
    """
    B, J, G, _ = thoughts.mask.shape
    prompts, prompt_mask = _prompts(text, thoughts)
    limits = (limits * thoughts.positions.host.mask)[..., None].expand(B, J, G).flatten(1)
    ids, mask = thoughts.token_ids.flatten(1, 2), thoughts.host_mask.flatten(1, 2)
    answers: list[list[list[int]]] = [[] for _ in range(B)]
    for columns in torch.arange(J * G).split(batch_size or J * G):
        places = columns // G  # the position of each thought
        decoder = new_decoder(model, B * len(columns))
        told = _answered(
            model,
            decoder,
            (prompts[:, places].flatten(0, 1), prompt_mask[:, places].flatten(0, 1)),
            (ids[:, to_device(columns, ids.device)].flatten(0, 1), mask[:, columns].flatten(0, 1)),
            limits[:, columns].flatten(),
            eos_token_ids,
            greatest,
        )
        for row in range(B):
            answers[row] += told[row * len(columns) : (row + 1) * len(columns)]
    return sum(answers, [])


def _prompts(text: Text, thoughts: Thoughts) -> tuple[torch.Tensor, torch.Tensor]:
    """Each position's document up to it, padded on the left: token ids and mask, `(B, J, T)`, in the host's memory."""
    host, anchors = text.host, thoughts.positions.host.index
    lengths = gather(host.position_ids, anchors) + 1
    steps = torch.arange(1 - int(lengths.max()), 1)
    places = anchors[..., None] + steps
    return gather(host.input_ids, places.clamp(min=0)), steps > -lengths[..., None]


def _answered(
    model: ThinkingModel,
    decoder: Decoder,
    prompts: tuple[torch.Tensor, torch.Tensor],
    thoughts: tuple[torch.Tensor, torch.Tensor],
    limits: torch.Tensor,
    eos_token_ids: Collection[int],
    greatest: Callable[[int], int],
) -> list[list[int]]:
    """The answers of R rows, each with a prompt and a thought: their tokens and masks, `(R, T)` and `(R, L)`."""
    R, device = len(limits), thoughts[0].device
    length = int(thoughts[1].any(0).sum())  # of the longest thought
    ids, mask = thoughts[0][:, :length], thoughts[1][:, :length]
    one = torch.ones(R, 1, dtype=torch.bool)
    hidden = decoder.read(to_device(prompts[0], device), prompts[1])
    marks, closed = model.thought_marks, model.thought_marks.closed(ids, to_device(mask, device))
    decoder.fork(one[:, 0], len(marks.unread))
    slots = [start_slots(model, R), embed_tokens(model, ids), end_slots(model, R)]
    closed = None if closed is None else closed.cpu()
    parts = [one.expand(-1, marks.before), mask, closing_mask(one[:, 0], closed, marks.after)]
    filled = torch.cat(parts, dim=1)
    branch = decoder.extend(torch.cat(slots, dim=1), filled)
    last = filled.cumsum(1).argmax(1)  # the first place that has them all
    after_thought = branch[torch.arange(R, device=device), to_device(last, device)]
    answers: list[list[int]] = [[] for _ in range(R)]
    going_on, tokens = limits > 0, None
    while greatest(int(going_on.any())):
        if tokens is not None:  # rows that have ended take no place, so that none grows past a model's last position
            hidden = decoder.read(tokens[:, None], going_on[:, None])
            after_thought = decoder.extend(embed_tokens(model, tokens[:, None]), going_on[:, None])[:, -1]
        mix = mixing_weights(model, hidden, after_thought)[:, None].to(hidden.dtype)
        tokens = logits_of(model, mix * after_thought + (1 - mix) * hidden).argmax(-1)
        for row, token in enumerate(tokens.tolist()):  # the one wait for the device
            if going_on[row] and token not in eos_token_ids:
                answers[row].append(token)
                going_on[row] = len(answers[row]) < limits[row]
            else:
                going_on[row] = False
    return answers
