"""What a thinking model knows of itself: its settings, and what it works out once, when it is first asked for."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..branches.base import BranchPath
from ..branches.replay import Replay
from ..model.concurrency import LOCK
from ..model.marks import Marks, marks_needed
from ..model.saved import tokenizer_beside
from ..settings import QuietStarSettings
from .check import choose_path, takes_masks


if TYPE_CHECKING:
    from ..model.heads import ThinkingModel as FamilyModel
else:
    FamilyModel = object  # at run time [`~modeling.QuietStarMixin`] has it stand before each family's own class


class Known(FamilyModel):
    """The part of [`~modeling.QuietStarMixin`] that tells what there is, and changes nothing."""

    @property
    def quietstar_settings(self) -> QuietStarSettings:
        """The settings saved in the config."""
        return QuietStarSettings.from_dict(self.config.quietstar, str(self.config.name_or_path))

    @property
    def thought_marks(self) -> Marks:
        """What stands around a thought, by the tokenizer that was used first, or else by the one beside the model."""
        return self._marks(None)

    def _marks(self, tokenizer: PreTrainedTokenizerBase | None) -> Marks:
        settings, vocab_size = self.quietstar_settings, self.config.get_text_config().vocab_size
        if not marks_needed(settings):
            return Marks()
        return self._checked(
            "_thought_marks", lambda: Marks.of(settings, tokenizer or tokenizer_beside(self), vocab_size)
        )

    @property
    def thought_path(self) -> BranchPath:
        """How thoughts are run on this model, by the start-up check."""
        return self._checked("_thought_path", lambda: choose_path(self))

    @thought_path.setter
    def thought_path(self, path: BranchPath) -> None:
        vars(self)["_thought_path"] = path

    @property
    def branches_in_cache(self) -> bool:
        """Whether a thought may share a cache with the text it branches off, told apart by a mask."""
        return self._checked(
            "_branches_in_cache", lambda: not isinstance(self.thought_path, Replay) and takes_masks(self)
        )

    def _checked(self, name: str, check: Callable[[], Any]) -> Any:
        """What a check found when it was first asked for; it runs once, in whichever thread."""
        with LOCK:
            if name not in vars(self):
                vars(self)[name] = check()
            return vars(self)[name]

    def thought_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase | None:
        """
        The tokenizer that says when a thought ends: the one given, or the one beside the model; None if thoughts have a
        fixed length. It also says which tokens stand around a thought.

        Raises:
            `ValueError`: if there is none.
        """
        if tokenizer is None and self.quietstar_settings.min_thought_length is not None:
            tokenizer = tokenizer_beside(self)
        self._marks(tokenizer)
        return tokenizer
