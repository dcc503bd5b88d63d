"""`Reference`: the policy as it was when training began, for the KL term and for rewards against it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..config import QuietStarConfig
from ..model.adapters import AdapterReference
from ..text.batch import Thoughts
from ..thinking.scoring import ThoughtScores, score_thoughts
from .distributed import is_sharded, prepare_reference
from .thinker import ThoughtRequest, ask


class Reference:
    """
    The frozen policy: a copy of the model, or under PEFT what the adapter was at the start. Nothing is kept where no option
    needs it.

    Args:
        args ([`QuietStarConfig`]):
            Options of the run.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The thinking model, before the first step.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.

    Raises:
        `ValueError`: if `sync_ref_model` is asked for under PEFT.
    """

    def __init__(self, args: QuietStarConfig, model: nn.Module, accelerator: Accelerator):
        self.args, self.policy, self.accelerator = args, model, accelerator
        self.model: PreTrainedModel | None = None  # the copy
        self._adapter: AdapterReference | None = None
        if not args.uses_reference:
            return
        if is_peft_model(model):
            if args.sync_ref_model:
                raise ValueError(
                    "`sync_ref_model=True` needs a reference of its own, but under PEFT the reference is the adapter as it was "
                    "at the start; set `sync_ref_model=False`."
                )
            self._adapter = AdapterReference(model, is_sharded(accelerator))
            return
        copied = copy.deepcopy(model).requires_grad_(False).eval()
        self.model = cast(PreTrainedModel, prepare_reference(copied, accelerator))

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """The reference policy inside, ready to be scored with."""
        if self._adapter is None:
            assert self.model is not None
            yield self.model
            return
        with self._adapter.in_place():
            yield self.policy

    def score(self, request: ThoughtRequest, thoughts: Thoughts) -> ThoughtScores | None:
        """Scores a batch's thoughts as the request would; None where no option needs a reference."""
        if not self.args.uses_reference:
            return None
        args = (request.text, thoughts, request.path, request.temperature)
        with self.in_place() as model:
            scoring = request.plan.scoring
            return ask(self.accelerator, model, request.text, score_thoughts, *args, branch_batch_size=scoring)
