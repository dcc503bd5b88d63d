"""How noisy is the policy gradient under each baseline?

    python -m benchmarks.gradient_variance --seeds 0 1 2 --output out/gradient_variance.json

At several points of the learning benchmark the policy is held fixed, a copy of the value head is fitted to it on fresh
problems, and the same 32 problems are thought about many times anew. Each time gives one gradient of the policy term for
every baseline, from the same thoughts. The variance is the mean squared distance from the mean gradient, over all
parameters of the policy. A baseline that only shrinks the gradient gains nothing, so the variance is also given relative to
the squared length of the mean gradient (noise to signal). Intervals are 95%, by bootstrap over the resampled thoughts.
"""

import copy
import json
import tempfile
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from trl_quietstar import QuietStarREINFORCETrainer
from trl_quietstar.learning.advantages import squared_scores, thought_advantages, value_weights
from trl_quietstar.learning.rewards import masked_mean, thought_rewards
from trl_quietstar.text.batch import Text, Thoughts, talk_after
from trl_quietstar.text.positions import choose_positions, seeded_generators
from trl_quietstar.thinking.drawing import uniforms
from trl_quietstar.thinking.sampling import sample_thoughts
from trl_quietstar.thinking.scoring import ScoreRequest, Scores, at_talk, score

from .learning import (
    PROBLEMS,
    TASKS,
    Task,
    benchmark_parser,
    configuration,
    held_out_data,
    pretrain,
    problem_rows,
    tokenizer,
    training_data,
)


BASELINES = {
    "none": dict(baseline="none"),
    "value, GAE": dict(baseline="value", use_gae=True, gamma=0.99, gae_lambda=0.95),
    "value, no GAE": dict(baseline="value", use_gae=False),
    "least variance": dict(baseline="least_variance"),
    "leave-one-out": dict(baseline="leave_one_out"),
}
WEIGHTED = "leave-one-out, weighted"  # by the squared scores of the other thoughts, as `least_variance`
POINTS = (0, 50, 100)
FITTING_STEPS = 200


def rollout(trainer: QuietStarREINFORCETrainer, text: Text, seed: int) -> tuple[Thoughts, Scores, torch.Tensor]:
    """Thoughts about a text, their scores, with gradient, and their rewards."""
    model, args = trainer.model, trainer.args
    generators = seeded_generators(seed, 0, list(range(PROBLEMS)))
    positions = choose_positions(text, "all", generators)
    cache = trainer.path.read(model, text)
    thoughts = sample_thoughts(
        model, cache, positions, trainer.sampling, uniforms(positions, trainer.sampling, generators)
    )
    scores = score(model, ScoreRequest(text, thoughts, 1, trainer.path, prediction=args.reward_prediction))
    mask = talk_after(text, positions, 1).target_mask[:, :, None]
    without, correct = (at_talk(x, thoughts, 1) for x in (scores.text_logps, scores.text_correct))
    rewards = thought_rewards(scores.talk_logps, without, scores.talk_correct, correct, mask, args.reward_type)
    return thoughts, scores, rewards


def problem_text(rows: Dataset) -> Text:
    """Problems of one length as a batch."""
    return Text.from_batch(torch.tensor(rows["input_ids"]), labels=torch.tensor(rows["labels"]))


def weighted_leave_one_out(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean reward of the other thoughts at a position, weighted: both of shape `(B, J, G)`."""
    total, weight = (rewards * weights).sum(-1, keepdim=True), weights.sum(-1, keepdim=True)
    return (total - rewards * weights) / (weight - weights).clamp(min=1e-12)


def fit_values(trainer: QuietStarREINFORCETrainer, task: Task, seed: int, baseline: str) -> None:
    """Trains the value head alone, to what it would be for a baseline if the policy stood still."""
    head = trainer.model.quietstar.value_head
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, FITTING_STEPS)
    problems = Dataset.from_list(
        problem_rows(task, PROBLEMS * FITTING_STEPS, torch.Generator().manual_seed(500 + seed))
    )
    for step in range(FITTING_STEPS):
        text = problem_text(problems.select(range(step * PROBLEMS, (step + 1) * PROBLEMS)))
        thoughts, scores, rewards = rollout(trainer, text, 10_000 + step)
        _, returns = thought_advantages(rewards, scores.thought_values, thoughts.mask, baseline)
        weights = value_weights(scores.thought_logps.detach(), baseline)
        errors = (scores.thought_values - returns) ** 2
        loss = masked_mean(errors if weights is None else weights * errors, thoughts.mask)
        gradients = torch.autograd.grad(loss, list(head.parameters()))
        for parameter, gradient in zip(head.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@contextmanager
def head_of(model: torch.nn.Module, head: torch.nn.Module):
    """Puts another value head in place of a model's own."""
    own, model.quietstar.value_head = model.quietstar.value_head, head
    try:
        yield
    finally:
        model.quietstar.value_head = own


def gradients(
    trainer: QuietStarREINFORCETrainer, task: Task, resamples: int, least_variance: torch.nn.Module
) -> dict[str, np.ndarray]:
    """Policy gradients of shape `(resamples, parameters)` for each baseline, of which one has a value head of its own."""
    model, text = trainer.model, problem_text(held_out_data(task).select(range(PROBLEMS)))
    policy = [p for name, p in model.named_parameters() if "value_head" not in name and "mixing_head" not in name]
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*BASELINES, WEIGHTED)}
    for resample in range(resamples):
        thoughts, scores, rewards = rollout(trainer, text, resample)
        values = {"value": scores.thought_values}
        with head_of(model, least_variance), torch.no_grad():
            request = ScoreRequest(text, thoughts, 1, trainer.path)
            values["least_variance"] = score(model, request).thought_values
        judged = {}
        for name, options in BASELINES.items():
            own = values.get(options["baseline"], scores.thought_values)
            judged[name], _ = thought_advantages(rewards, own, thoughts.mask, **options)
        weights = (squared_scores(scores.thought_logps.detach()) * thoughts.mask).sum(-1)
        judged[WEIGHTED] = (rewards - weighted_leave_one_out(rewards, weights))[..., None] * thoughts.mask
        for name, advantages in judged.items():
            loss = masked_mean(-advantages * scores.thought_logps, thoughts.mask)
            parts = torch.autograd.grad(loss, policy, retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(policy, parts, strict=True)]
            found[name].append(torch.cat([g.flatten() for g in flat]).numpy())
    return {name: np.stack(rows) for name, rows in found.items()}


def statistics(found: dict[str, np.ndarray], draws: int = 1_000) -> dict[str, dict]:
    """Variance of each baseline, its reduction against none, and noise to signal, with intervals."""
    rng = np.random.default_rng(0)
    # everything needed is in the inner products, which are small
    products = {name: (rows.astype(np.float64) @ rows.T.astype(np.float64)) for name, rows in found.items()}
    count = len(products["none"])
    weights = rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
    weights = np.concatenate([np.full((1, count), 1 / count), weights])  # the sample itself comes first

    def moments(product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        squared_mean = np.einsum("di,ij,dj->d", weights, product, weights)
        variance = (weights @ np.diag(product) - squared_mean) * count / (count - 1)
        return variance, squared_mean

    plain, plain_mean = moments(products["none"])
    results = {}
    for name, product in products.items():
        variance, squared_mean = moments(product)
        signal = squared_mean[0] - variance[0] / count  # the mean's own noise taken out
        reduction = 1 - variance / plain
        relative = 1 - (variance / squared_mean) / (plain / plain_mean)
        results[name] = {
            "variance": variance[0],
            "reduction": reduction[0],
            "reduction_interval": np.percentile(reduction[1:], [2.5, 97.5]).tolist(),
            "noise_to_signal": variance[0] / signal if signal > 0 else None,
            "relative_reduction": relative[0],
            "relative_reduction_interval": np.percentile(relative[1:], [2.5, 97.5]).tolist(),
        }
    return results


class AtPoints(TrainerCallback):
    """Measures at some steps of training."""

    def __init__(self, task: Task, resamples: int):
        self.task, self.resamples, self.found = task, resamples, {}
        self.trainer: QuietStarREINFORCETrainer | None = None

    def measure(self, step: int) -> None:
        model = self.trainer.model.eval()
        fitted, least_variance = (copy.deepcopy(model.quietstar.value_head) for _ in range(2))
        with head_of(model, least_variance):
            fit_values(self.trainer, self.task, step, "least_variance")
        with head_of(model, fitted):
            fit_values(self.trainer, self.task, step, "value")
            self.found[step] = statistics(gradients(self.trainer, self.task, self.resamples, least_variance))
        model.train()
        for name, values in self.found[step].items():
            low, high = values["reduction_interval"]
            print(
                f"  step {step:>3} {name:<24} variance {values['variance']:.3e}, {values['reduction']:+.3f} lower "
                f"[{low:+.3f}, {high:+.3f}], noise to signal {values['noise_to_signal'] or float('nan'):.1f}, "
                f"{values['relative_reduction']:+.3f} lower",
                flush=True,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in POINTS:
            self.measure(state.global_step)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--resamples", type=int, default=100)
    arguments = parser.parse_args()
    task, results = TASKS["easy"], {}
    for seed in arguments.seeds:
        print(f"seed {seed}")
        model = pretrain(task, seed, arguments.pretraining_steps)
        at_points = AtPoints(task, arguments.resamples)
        with tempfile.TemporaryDirectory() as directory:
            at_points.trainer = QuietStarREINFORCETrainer(
                copy.deepcopy(model),
                configuration(task, directory, seed, max(POINTS)),
                training_data(task, seed, max(POINTS)),
                processing_class=tokenizer(),
                callbacks=[at_points],
            )
            at_points.measure(0)
            at_points.trainer.train()
        results[seed] = at_points.found
    if arguments.output:
        arguments.output.write_text(json.dumps({"resamples": arguments.resamples, "seeds": results}, indent=2))


if __name__ == "__main__":
    main()
