"""What [`benchmarks.real`] measures of a model on held-out problems.

A problem is solved by an *exact match*: every token of the answer, EOS included, is the most likely one after those before it.
That is what greedy decoding writes, as [`generated`] checks on a few problems.
"""

import math
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from benchmarks.real_tasks import Row
from trl_quietstar import QuietStarREINFORCETrainer
from trl_quietstar.evaluation.anti_theater import AntiTheaterReport
from trl_quietstar.evaluation.controls import controlled
from trl_quietstar.learning.rewards import exact_match, is_mixed, useful
from trl_quietstar.model.heads import ThinkingModel
from trl_quietstar.model.lm_head import token_statistics
from trl_quietstar.text.batch import Text, Thoughts, talk_after
from trl_quietstar.text.positions import choose_positions, seeded_generators
from trl_quietstar.thinking.drawing import SamplingSettings, uniforms
from trl_quietstar.thinking.sampling import sample_thoughts
from trl_quietstar.thinking.scoring import ScoreRequest, at_talk, score


BATCH = 50
SEED = 7
GROUP = 8  # thoughts of a problem
# what stands in a thought's place: the name in results, and in `trl_quietstar.evaluation.controls`
CONDITIONS = {"with": "real", "another's": "shuffled", "filler": "filler", "random": "random"}


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927), of `right` among `count` independent problems."""
    z, share = 1.959964, right / count
    middle, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max((middle - spread) / (1 + z * z / count), 0.0), min((middle + spread) / (1 + z * z / count), 1.0)


def _batches(trainer: Trainer, count: int) -> list[dict]:
    """The first held-out problems. Batches are of nearly equal size, since another problem's thought needs a neighbour."""
    assert trainer.data_collator is not None
    rows = torch.arange(count).chunk(math.ceil(count / BATCH))
    return [trainer.data_collator([trainer.eval_dataset[int(i)] for i in part]) for part in rows]  # type: ignore[index]  # is a `Dataset` here


@torch.no_grad()
def solved_without(trainer: Trainer, count: int) -> list[bool]:
    """Which of the first held-out problems are solved without a thought, by the logits of the model's plain forward."""
    model, solved = trainer.accelerator.unwrap_model(trainer.model).eval(), []
    for batch in _batches(trainer, count):
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
        labels = batch.pop("labels")[:, 1:]
        with trainer.accelerator.autocast():
            likeliest = model(**batch).logits[:, :-1].argmax(-1)
        solved += ((likeliest == labels) | (labels == -100)).all(1).tolist()
    return solved


def solved_after(
    trainer: QuietStarREINFORCETrainer, count: int, conditions: tuple[str, ...]
) -> tuple[dict[str, list[bool]], list[str]]:
    """
    Which of the first held-out problems are solved after the model's own greedy thought, and after what stands in its place.

    Args:
        trainer ([`QuietStarREINFORCETrainer`]):
            Has the model and the held-out problems.
        count (`int`):
            How many problems.
        conditions (`tuple[str, ...]`):
            Names in `CONDITIONS`.

    Returns:
        `tuple`: for each condition whether each problem is solved, and the thoughts as text.
    """
    greedy = replace(trainer.thinker.sampling, do_sample=False, num_thoughts=1)
    solved: dict[str, list[bool]] = {name: [] for name in conditions}
    written: list[str] = []
    for batch in _batches(trainer, count):
        thoughts, found = _scored(trainer, batch, greedy, conditions)
        for name in conditions:
            solved[name] += found[name][0][:, 0].tolist()
        written += thought_texts(thoughts, trainer.thinker.tokenizer)
    return solved, written


def group_shares(trainer: QuietStarREINFORCETrainer, count: int) -> dict[str, float]:
    """
    What reinforcement has to live on, from `GROUP` thoughts on each problem at temperature 1: the share of them that raise the
    answer's probability by more than `useful_gain` (`useful_thoughts`), and of problems with both such and other ones
    (`mixed_groups`); the share of thoughts after which a problem is solved (`right_thoughts`), and of problems that are solved
    after some of them (`mixed_right`).
    """
    sampling = replace(trainer.thinker.sampling, do_sample=True, num_thoughts=GROUP, temperature=1.0)
    found = [_scored(trainer, batch, sampling, ("with",))[1]["with"] for batch in _batches(trainer, count)]
    solved, helped = (torch.cat(parts) for parts in zip(*found, strict=True))
    shares = {
        **{"useful_thoughts": helped, "mixed_groups": is_mixed(helped)},
        **{"right_thoughts": solved, "mixed_right": is_mixed(solved)},
    }
    return {name: values.double().mean().item() for name, values in shares.items()}


Found = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _scored(
    trainer: QuietStarREINFORCETrainer, batch: dict, sampling: SamplingSettings, conditions: tuple[str, ...]
) -> tuple[Thoughts, Found]:
    """A batch's thoughts; and for each condition whether the problem is solved, and whether its answer is likelier than without
    a thought by more than `useful_gain`: two bool tensors of shape `(B, G)`, in the host's memory."""
    trainer.model.eval()
    text = trainer.thinker.text(batch)
    return trainer.thinker.ask(text, _think_and_score, text, trainer, sampling, conditions)


def _think_and_score(
    base: ThinkingModel,
    text: Text,
    trainer: QuietStarREINFORCETrainer,
    sampling: SamplingSettings,
    conditions: tuple[str, ...],
) -> tuple[Thoughts, Found]:
    generators = seeded_generators(SEED, 0, list(range(len(text.input_ids))))
    positions = choose_positions(text, "prompt_end", generators)
    cache = trainer.path.read(base, text)
    thoughts = sample_thoughts(base, cache, positions, sampling, uniforms(positions, sampling, generators))
    length = trainer.thinker.talk_length(text)
    answer = talk_after(text, positions, length).target_mask[:, :, None]
    plain = token_statistics(base, cache.text_hidden[:, :-1], text.input_ids[:, 1:], text.host.predicted())
    without = at_talk(plain.logps, thoughts, length)
    found = {}
    for name in conditions:
        generator = torch.Generator().manual_seed(SEED)
        other = controlled(thoughts, CONDITIONS[name], base.config.vocab_size, generator)
        prediction = trainer.args.reward_prediction
        scores = score(base, ScoreRequest(text, other, length, trainer.path, prediction=prediction, cache=cache))
        solved = exact_match(scores.talk_correct, answer)[:, 0]
        helped = useful(scores.reader_logps, without, answer, trainer.args.useful_gain)[:, 0]
        found[name] = solved.cpu(), helped.cpu()
    return thoughts, found


def validated(trainer: QuietStarREINFORCETrainer) -> AntiTheaterReport:
    """Anti-theater validation on all held-out problems, with one sampled thought for each: more problems say more than more
    thoughts on the same ones."""
    sampling = trainer.thinker.sampling
    trainer.thinker.sampling = replace(sampling, num_thoughts=1)
    try:
        return trainer.validate_thoughts()
    finally:
        trainer.thinker.sampling = sampling


def thought_texts(thoughts: Thoughts, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The first thought of each row as text."""
    ids, masks = thoughts.token_ids[:, 0, 0].tolist(), thoughts.mask[:, 0, 0].tolist()
    kept = ([token for token, exists in zip(*row, strict=True) if exists] for row in zip(ids, masks, strict=True))
    return [tokenizer.decode(tokens) for tokens in kept]


def generated(trainer: Trainer, rows: list[Row], thinks: bool) -> list[bool]:
    """Whether `generate` writes the answers of problems, greedily in thought and speech: a check of [`solved_after`] and
    [`solved_without`] by the loop that a user would run."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    tokenizer, options = trainer.processing_class, {}
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if thinks:
        settings = model.quietstar_settings
        model.adopt_settings(replace(settings, top_k=1))
        options = {"think": "prompt_end", "tokenizer": tokenizer}
    right = []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt").to(model.device)
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        length = {"max_new_tokens": len(answer), "pad_token_id": tokenizer.eos_token_id}
        with trainer.accelerator.autocast():
            output = model.generate(**prompt, do_sample=False, **length, **options)
        right.append(output[0, prompt["input_ids"].shape[1] :].tolist() == answer)
    if thinks:
        model.adopt_settings(settings)
    return right
