"""What stands around a thought in its branch: a prompt that asks for it, what opens it, and what closes it.

With `thought_format="embeddings"` one learned vector opens a thought and another one closes it. With `"text"` strings of ordinary
tokens do, so that anything that runs the plain model can write such a thought.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from ..settings import QuietStarSettings
from ..text.batch import Positions, Text, Thoughts, gather
from .embeddings import embed_tokens, embed_vector, string_ids
from .turns import turn_tokens


if TYPE_CHECKING:
    from .heads import ThinkingModel

Embed = Callable[[torch.Tensor], torch.Tensor]  # from token ids to embeddings


@dataclass(frozen=True)
class Marks:
    """
    What stands around a thought, in tokens.

    Parameters:
        prompt (`tuple[int, ...]`):
            The `thought_prompt`, which the branch alone reads. As a turn of a conversation it ends with what opens the answer.
        start, end (`tuple[int, ...]`, *optional*):
            What opens a thought, and what closes one that has not closed itself. None: the learned embeddings.
        ends (`Callable`, *optional*):
            Whether thoughts end with the string that closes them: from token ids of shape `(rows, length)` to a bool of shape
            `(rows,)`. None: no thought closes itself.
        unread (`tuple[int, ...]`):
            What opens the answer at the end of a text. The branch leaves the text before it, and reads the same in `prompt`.
    """

    prompt: tuple[int, ...] = ()
    start: tuple[int, ...] | None = None
    end: tuple[int, ...] | None = None
    ends: Callable[[torch.Tensor], torch.Tensor] | None = None
    unread: tuple[int, ...] = ()

    @classmethod
    def of(cls, settings: QuietStarSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> "Marks":
        """
        Reads the strings of the settings.

        Args:
            settings ([`~settings.QuietStarSettings`]):
                What the model remembers of its training.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                The model's tokenizer. Each string is read by itself, without special tokens around it.
            vocab_size (`int`):
                V, to which all ids must belong.

        Raises:
            `ValueError`: for a string without tokens, or with one that the model does not know; or a turn that the chat template
                does not write before the answer.
        """

        def ids(name: str) -> tuple[int, ...]:
            return tuple(string_ids(tokenizer, getattr(settings, name), vocab_size))

        unread: tuple[int, ...] = ()
        prompt = () if settings.thought_prompt is None else ids("thought_prompt")
        if settings.thought_prompt is not None and settings.thought_prompt_role is not None:
            unread, prompt = turn_tokens(tokenizer, settings.thought_prompt, settings.thought_prompt_role)
        if settings.thought_format == "embeddings":
            return cls(prompt, unread=unread)
        start, end = ids("thought_start_text"), ids("thought_end_text")
        return cls(prompt, start, end, string_end(tokenizer, settings.thought_end_text, "`thought_end_text`"), unread)

    @property
    def before(self) -> int:
        """Slots of a branch before the thought."""
        return len(self.prompt) + (1 if self.start is None else len(self.start))

    @property
    def after(self) -> int:
        """Slots of a branch between the thought and its talk."""
        return 1 if self.end is None else len(self.end)

    @property
    def around(self) -> int:
        """Positions that a branch takes beside thought and talk."""
        return self.before + self.after - len(self.unread)

    def slots(self, thought_length: int, talk_length: int) -> int:
        """S, the slots of a branch: what opens the thought, the thought, what closes it, and all tokens of the talk but the last."""
        return self.before + thought_length + self.after + talk_length - 1

    def anchors(self, index: torch.Tensor) -> torch.Tensor:
        """The text tokens that branches follow, for thoughts after the tokens at `index`, of the same shape."""
        return (index - len(self.unread)).clamp(min=0) if self.unread else index

    def opened(self, token_ids: list[int]) -> list[int]:
        """The tokens of a text with those that ask for a thought, and open it where tokens do."""
        return [*token_ids[: len(token_ids) - len(self.unread)], *self.prompt, *(self.start or ())]

    def check(self, text: Text, positions: Positions) -> None:
        """
        Refuses thoughts elsewhere than before an answer, if a turn asks for them.

        Args:
            text ([`Text`]), positions ([`Positions`]):
                The texts, and where thoughts are in them.

        Raises:
            `ValueError`: if what stands at the end of a text is not what opens an answer.
        """
        if not self.unread:
            return
        text, positions = text.host, positions.host
        index = positions.index[..., None] + torch.arange(1 - len(self.unread), 1)
        found = gather(text.input_ids, index.clamp(min=0)) == torch.tensor(self.unread)
        inside = gather(text.position_ids, positions.index) >= len(self.unread)
        if not bool(((found.all(-1) & inside) | ~positions.mask).all()):
            raise ValueError(
                "`thought_prompt_role` puts a turn before an answer, and a thought is asked for where the text does not end with what "
                "opens an answer in the chat template. Give messages with `thought_positions='prompt_end'` (`--chat`, "
                "`add_generation_prompt=True`), or leave the role out."
            )

    def closed(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """
        Which thoughts have closed themselves, so that nothing closes them again.

        Args:
            token_ids, mask (`torch.Tensor` of shape `(..., L)`):
                Tokens, and which of them exist: the first ones.

        Returns:
            `torch.Tensor` of shape `(...)`, bool; None where no thought can.
        """
        if self.ends is None:
            return None
        L, lengths = mask.shape[-1], mask.sum(-1, keepdim=True)
        # each thought's last token to the end of its row; what comes before a short one is no token's id
        source = torch.arange(L, device=mask.device) - L + lengths
        ids = token_ids.gather(-1, source.clamp(min=0)).masked_fill(source < 0, NO_TOKEN)
        return self.ends(ids.flatten(0, -2)).view(mask.shape[:-1]) & mask[..., 0]


NO_TOKEN = 2**31 - 1  # above the ids of any tokenizer


def marks_needed(settings: QuietStarSettings) -> bool:
    """Whether a tokenizer has to say what stands around a thought."""
    return settings.thought_format != "embeddings" or settings.thought_prompt is not None


class StringEnd:
    """Whether texts end with the token that completes a string: from token ids of shape `(rows, length)` to a bool of shape
    `(rows,)`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, string: str):
        self.criteria = StopStringCriteria(tokenizer, [string])

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.criteria(token_ids, None)


def string_end(tokenizer: PreTrainedTokenizerBase, string: str, name: str) -> StringEnd:
    """
    Makes what tells whether a text ends with a string.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        string (`str`):
            The string.
        name (`str`):
            What errors call it.

    Raises:
        `ValueError`: if the string cannot be told from the tokenizer's tokens.
    """
    try:
        return StringEnd(tokenizer, string)
    except ValueError as error:  # it puts letters before each token and looks for them in what is decoded
        raise ValueError(
            f"{name} is {string!r}, but this tokenizer does not decode what it was given, so that no string can be looked for; "
            "leave it out and set `min_thought_length`, at which the EOS token ends a thought."
        ) from error


def start_slots(model: "ThinkingModel", *shape: int, embed: Embed | None = None) -> torch.Tensor:
    """
    The slots before a thought, `(*shape, before, E)`.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            The model.
        shape (`int`):
            Of the branches.
        embed (`Callable`, *optional*):
            From token ids to embeddings. Defaults to [`~model.embeddings.embed_tokens`].
    """
    marks = model.thought_marks
    if marks.start is not None:
        return _embedded(model, (*marks.prompt, *marks.start), shape, embed)
    start = embed_vector(model, model.quietstar.start_embedding).expand(*shape, 1, -1)
    return torch.cat([_embedded(model, marks.prompt, shape, embed), start], dim=-2) if marks.prompt else start


def end_slots(model: "ThinkingModel", *shape: int, embed: Embed | None = None) -> torch.Tensor:
    """The slots that close a thought, `(*shape, after, E)`; arguments as for [`start_slots`]."""
    marks = model.thought_marks
    if marks.end is not None:
        return _embedded(model, marks.end, shape, embed)
    return embed_vector(model, model.quietstar.end_embedding).expand(*shape, 1, -1)


def filler_slots(model: "ThinkingModel", start: torch.Tensor, length: int) -> torch.Tensor:
    """What stands in a thought's place in the control without content: the start embedding or string, over and over. `start`, of
    shape `(..., before, E)`, is what [`start_slots`] gave; the slots have shape `(..., length, E)`."""
    marks = model.thought_marks
    repeated = start[..., len(marks.prompt) :, :]
    return repeated[..., torch.arange(length, device=start.device) % repeated.shape[-2], :]


def _embedded(
    model: "ThinkingModel", ids: tuple[int, ...], shape: tuple[int, ...], embed: Embed | None
) -> torch.Tensor:
    token_ids = torch.tensor(ids, device=model.quietstar.start_embedding.device)
    embeds = embed_tokens(model, token_ids) if embed is None else embed(token_ids)
    return embeds.expand(*shape, -1, -1)


def closing_mask(exists: torch.Tensor, closed: torch.Tensor | None, after: int) -> torch.Tensor:
    """Which of the slots that close thoughts hold something, `(..., after)`: none of a thought that has `closed` itself. Both
    masks have shape `(...)`."""
    needed = exists if closed is None else exists & ~closed
    return needed[..., None].expand(*needed.shape, after)


def after_thought(hidden: torch.Tensor, thoughts: Thoughts, closed: torch.Tensor | None, after: int) -> torch.Tensor:
    """
    The hidden states that predict the talk: first that of the last slot that closes a thought, then those of the talk.

    Args:
        hidden (`torch.Tensor` of shape `(B, J, G, 1 + L + after + M - 1, H)`):
            Hidden states of branches from the last slot before the thought on.
        thoughts ([`Thoughts`] of shape `(B, J, G, L)`):
            The thoughts.
        closed (`torch.Tensor` of shape `(B, J, G)`, *optional*):
            Which of them have closed themselves: their last token predicts the talk.
        after (`int`):
            Slots that close the others.

    Returns:
        `torch.Tensor` of shape `(B, J, G, M, H)`.
    """
    read = hidden[..., thoughts.mask.shape[-1] + after :, :]
    if closed is None:
        return read
    last = thoughts.mask.sum(-1)[..., None, None].expand(*closed.shape, 1, hidden.shape[-1])
    first = torch.where(closed[..., None, None], hidden.gather(3, last), read[..., :1, :])
    return torch.cat([first, read[..., 1:, :]], dim=3)
