"""Causal controls: something else stands in a thought's place, and the same text is read after it.

What the prediction of the text loses by the exchange is what the thought gave it.
"""

from dataclasses import replace

import torch

from ..text.batch import Thoughts


CONTROLS = ("real", "shuffled", "random", "filler", "truncated")


def controlled(thoughts: Thoughts, control: str, vocab_size: int, generator: torch.Generator) -> Thoughts:
    """
    Replaces every thought by a control.

    - `"real"`: the thought itself.
    - `"shuffled"`: a thought that was written at another position, and in another text if the batch has several
      (content that belongs elsewhere).
    - `"random"`: tokens drawn uniformly from the vocabulary.
    - `"filler"`: the start, an embedding or a string, repeated (compute without content).
    - `"truncated"`: the first half of the thought's tokens, rounded up.

    Args:
        thoughts ([`Thoughts`]):
            The sampled thoughts, which stay as they are.
        control (`str`):
            A name from the list above.
        vocab_size (`int`):
            V, the number of tokens to draw from.
        generator (`torch.Generator`):
            Draws the random tokens.

    Raises:
        `ValueError`: if the control is unknown.
    """
    if control == "real":
        return thoughts
    if control == "filler":
        return replace(thoughts, filler=True)  # scoring puts the start in place, which may be no token
    if control == "random":
        drawn = torch.randint(vocab_size, thoughts.token_ids.shape, generator=generator)
        return replace(thoughts, token_ids=drawn.to(thoughts.token_ids.device))
    if control == "truncated":
        kept = (thoughts.mask.sum(-1, keepdim=True) + 1) // 2
        # the mask alone becomes shorter, so that shapes stay the same in all conditions
        return replace(thoughts, mask=thoughts.mask & (thoughts.mask.long().cumsum(-1) <= kept))
    if control == "shuffled":
        return _shuffled(thoughts)
    raise ValueError(f"There is no control {control!r}; choose one of {', '.join(CONTROLS)}.")


def _shuffled(thoughts: Thoughts) -> Thoughts:
    """Gives each position the thoughts of the position half the batch further on, around the end to the start."""
    # only places that hold a thought take part: a masked one has none to give
    places = thoughts.positions.mask.flatten().nonzero().flatten()
    moved = places.roll(-(len(places) // 2))
    token_ids, mask = thoughts.token_ids.flatten(0, 1).clone(), thoughts.mask.flatten(0, 1).clone()
    token_ids[places], mask[places] = token_ids[moved], mask[moved]
    return replace(thoughts, token_ids=token_ids.view_as(thoughts.token_ids), mask=mask.view_as(thoughts.mask))
