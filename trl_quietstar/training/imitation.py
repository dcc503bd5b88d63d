"""`SelfImitation`: useful thoughts of a run's own, which it goes on to imitate (self-imitation learning,
huggingface.co/papers/1806.05635)."""

import random
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from ..config import QuietStarConfig
from ..learning.experience import Experience
from ..learning.rewards import is_mixed, useful
from ..text.batch import Positions, Text, Thoughts
from ..text.divided import Divided, Written, joined, without_thoughts
from ..text.transfer import to_host
from ..thinking.scoring import Scores
from .distributed import is_sharded


FILE = "quietstar_self_imitation.safetensors"
Row = dict[str, torch.Tensor]  # one text with one thought, as `Written.tensors` names them, on the host


class SelfImitation:
    """
    Keeps the latest `self_imitation_memory` of these thoughts, and gives `self_imitation_batch_size` of them to each optimizer step as
    if its data held them. All processes keep the same ones.

    A thought is kept if it is useful, if another one of its group is not, and if none of the group earned more. So what the model can do
    anyway is not learned again.

    Args:
        args ([`QuietStarConfig`]):
            Options of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
    """

    def __init__(self, args: QuietStarConfig, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self._kept: deque[Row] = deque(maxlen=args.self_imitation_memory)
        # of this process, since thoughts were last drawn: the row in the step's global batch, the position's number, and what is kept
        self._new: list[tuple[int, int, Row]] = []

    def __len__(self) -> int:
        return len(self._kept) + len(self._new)

    @torch.no_grad()
    def add(self, text: Text, scores: Scores, experience: Experience, rows: list[int]) -> None:
        """
        Takes in the thoughts of a batch that are worth keeping.

        Args:
            text ([`Text`]), scores ([`Scores`]), experience ([`Experience`]):
                The batch, the scores of its thoughts by the policy that wrote them, and what they earned.
            rows (`list[int]`):
                Index of each row in the step's global batch.
        """
        talk = (scores.reader_logps, experience.logps_without, experience.score_mask)
        helps, thoughts = useful(*talk, self.args.useful_gain) & experience.exists, experience.thoughts
        groups = is_mixed(helps) if helps.shape[-1] > 1 else helps.any(-1)
        best = experience.rewards.masked_fill(~helps, -torch.inf).argmax(-1)
        of_best = best[..., None, None].expand(-1, -1, 1, thoughts.mask.shape[-1])
        token_ids, mask = (x.gather(2, of_best) for x in (thoughts.token_ids, thoughts.mask))
        groups, *found = to_host([groups, thoughts.positions.index, token_ids, mask])
        for row, column in groups.nonzero().tolist():
            index, own_ids, own_mask = (x[row, column].reshape(1, 1, *x.shape[2:]) for x in found)
            own = Thoughts(Positions(index, torch.ones_like(index, dtype=torch.bool)), own_ids, own_mask)
            kept = Written(text.host.rows(torch.tensor([row])), own)
            self._new.append((rows[row], column, trimmed(kept.tensors())))

    def beside(self, batches: list[Divided], step: int) -> list[Divided]:
        """
        The batches of an optimizer step, with kept thoughts beside those that are written for them. All processes must call it.

        Args:
            batches (`list` of [`~text.divided.Divided`]):
                The batches of this process.
            step (`int`):
                Number of the optimizer step, which decides which thoughts are drawn.
        """
        self._gather()
        count = min(self.args.self_imitation_batch_size, len(self._kept))
        drawn = random.Random(f"{self.args.seed} {step}").sample(list(self._kept), count)
        if not drawn:
            return batches
        P, first = self.accelerator.num_processes, self.accelerator.process_index
        return [self._with(batch, drawn[i * P + first :: len(batches) * P]) for i, batch in enumerate(batches)]

    def _with(self, batch: Divided, rows: list[Row]) -> Divided:
        """A batch with thoughts that are drawn for it. Where layers must run as often as on other processes, it has some in any case."""
        parts = rows if batch.written is None else [batch.written.tensors(), *rows]
        if not parts and is_sharded(self.accelerator):
            parts = [without_thoughts(batch.sampled).tensors()]
        return replace(batch, written=joined(parts, batch.sampled.input_ids.device)) if parts else batch

    def _gather(self) -> None:
        """Puts the new thoughts of all processes into the order of their rows, in which one process would have found them."""
        new = gather_object(self._new) if self.accelerator.num_processes > 1 else self._new
        self._kept.extend(row for *_, row in sorted(new, key=lambda found: found[:2]))
        self._new = []

    # Checkpoints

    def save(self, folder: str) -> None:
        """Writes the thoughts beside a checkpoint's state. All processes must call it."""
        self._gather()
        if self._kept and self.accelerator.is_main_process:
            save_file(joined(list(self._kept), torch.device("cpu")).tensors(), Path(folder, FILE))

    def restore(self, folder: str) -> None:
        """Reads what [`SelfImitation.save`] wrote, if anything."""
        if Path(folder, FILE).is_file():
            whole = load_file(Path(folder, FILE))
            for row in range(len(whole["input_ids"])):
                self._kept.append(trimmed({name: x[row : row + 1] for name, x in whole.items()}))


def trimmed(tensors: Row) -> Row:
    """One row with one thought, of its own, without what fills it up at the end."""
    text = int(tensors["attention_mask"].nonzero()[:, 1].max()) + 1
    thought = int(tensors["mask"].sum())
    ends = {"index": None, "exists": None, "thought_ids": thought, "mask": thought}
    return {name: x[..., : ends.get(name, text)].clone() for name, x in tensors.items()}
