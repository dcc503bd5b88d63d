"""lm-evaluation-harness with thoughts: the model `quietstar`, and the comparison with and without them.

    trl-quietstar eval --model out/lora --tasks gsm8k,commonsense_qa --compare

Importing this module registers the model with lm-eval (`pip install trl-quietstar[eval]`), so that its own
`simple_evaluate(model="quietstar", model_args={"pretrained": "out/lora"}, ...)` finds it. Generation tasks generate with
thoughts, log-likelihood tasks score with thoughts, and `think="never"` is lm-eval's own model on the base weights.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from .heads import ThinkingModel
from .loading import load_tokenizer
from .modeling import QuietStarForCausalLM, base_of
from .sampling import Thinking


FLIPS = 10_000  # of the paired test
PER_UNIT = ("word_perplexity", "byte_perplexity", "bits_per_byte")  # of rolling likelihoods, without errors in lm-eval


@register_model("quietstar")
class QuietStarLM(HFLM):
    """
    A thinking model in lm-eval.

    Args:
        pretrained (`str`):
            Hub id or local folder: a thinking model, or an adapter with its heads.
        think (`str`), think_every (`int`), thinking_threshold (`float`):
            As in `generate` of a thinking model.
        revision (`str`, *optional*):
            Of the model on the Hub.
        trust_remote_code (`bool`):
            Whether to run model code from the Hub. Off unless you say so.
        batch_size (`int`):
            Texts at once.
        device (`str`, *optional*):
            Defaults to the accelerator, if any.
        dtype (`str`):
            Of the weights.

    Raises:
        `ValueError`: if a value is outside its limits.
    """

    def __init__(
        self,
        pretrained: str,
        think: str = "always",
        think_every: int = 1,
        thinking_threshold: float = 0.6,
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 1,
        device: str | None = None,
        dtype: str = "auto",
        **kwargs,
    ):
        self.thinking = Thinking(think, int(think_every), float(thinking_threshold))
        hub: dict = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = QuietStarForCausalLM.from_pretrained(pretrained, dtype=dtype, **hub).eval()
        model.to(device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"))
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=load_tokenizer(pretrained, **hub),
            batch_size=batch_size,
            **kwargs,
        )

    @property
    def thinker(self) -> ThinkingModel:
        """The thinking model itself, inside an adapter or not."""
        return base_of(self.model)  # type: ignore[return-value]

    @property
    def max_length(self) -> int:
        """Tokens of a text, leaving room for a thought after it."""
        if self.thinking.mode == "never":
            return super().max_length
        return super().max_length - self.thinker.quietstar_settings.thought_length - 1

    def _when(self) -> dict:
        """When to think, as the model's methods take it."""
        thinking = self.thinking
        return dict(think=thinking.mode, think_every=thinking.every, thinking_threshold=thinking.threshold)

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        options = self._when()
        if self.thinking.mode != "never":
            options["tokenizer"] = self.tokenizer
        return super()._model_generate(context, max_length, stop, **generation_kwargs, **options)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        if self.thinking.mode == "never":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        size = override_bs or self.batch_size_per_gpu
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in tqdm(range(0, len(order), size), disable=disable_tqdm, desc="Scoring with thoughts"):
            batch = order[start : start + size]
            for index, result in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                results[index] = result
                self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
        return results

    def _score(self, requests) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, and whether greedy decoding would write it."""
        rows = [(context + continuation)[-self.max_length :] for _, context, continuation in requests]
        width = max(map(len, rows))
        ids, mask, wanted = (torch.zeros(len(rows), width, dtype=torch.long, device=self.device) for _ in range(3))
        for b, (row, (_, _, continuation)) in enumerate(zip(rows, requests, strict=True)):
            ids[b, : len(row)] = torch.tensor(row, device=self.device)
            mask[b, : len(row)] = 1
            wanted[b, max(len(row) - len(continuation), 1) : len(row)] = 1
        logps, correct = self.thinker.log_likelihoods(ids, mask, wanted, **self._when(), tokenizer=self.tokenizer)
        totals, all_correct = logps.sum(1), (correct | ~wanted[:, 1:].bool()).all(1)
        return [(float(total), bool(greedy)) for total, greedy in zip(totals, all_correct, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """
    One metric of one task.

    Parameters:
        task, metric (`str`):
            Their names; of several filters of a task's answers, the metric names its own.
        value, stderr (`float`):
            What lm-eval reports; the standard error is NaN where it has none.
        samples (`dict[int, float]`):
            The metric of each document, where it is a number; its log-likelihood, where the metric is one of all documents'
            likelihood per byte or word.
    """

    task: str
    metric: str
    value: float
    stderr: float
    samples: dict[int, float]


def evaluate_tasks(
    model: QuietStarLM,
    tasks: list[str],
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> list[Outcome]:
    """
    Runs tasks of lm-eval.

    Args:
        model ([`QuietStarLM`]):
            The model.
        tasks (`list[str]`):
            Names of tasks or groups.
        include_path (`str`, *optional*):
            Folder with task files of one's own, which are read once in a process.
        limit (`int`, *optional*):
            Documents of each task. Defaults to all.
        num_fewshot (`int`, *optional*):
            Examples in the prompt. Defaults to the task's own.

    Raises:
        `ValueError`: if a task is unknown.
    """
    manager = _tasks(include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, and `--include_path` adds a "
            "folder of your own."
        )
    results = simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, limit=limit, num_fewshot=num_fewshot, bootstrap_iters=1000
    )
    outcomes = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = metrics.get(f"{metric}_stderr,{name}")
            found = {
                sample["doc_id"]: sample[metric]
                for sample in results["samples"].get(task, [])
                if sample.get("filter", name) == name and metric in sample
            }
            samples = {i: float(x) for i, x in found.items() if isinstance(x, (bool, int, float))}
            stderr = float(stderr) if isinstance(stderr, (int, float)) else float("nan")
            if metric in PER_UNIT and found and not samples:
                pairs = np.array(list(found.values()))
                samples, stderr = dict(zip(found, pairs[:, 0].tolist(), strict=True)), ratio_error(metric, pairs)
            label = metric if name == "none" else f"{metric} ({name})"
            outcomes.append(Outcome(task, label, float(value), stderr, samples))
    return outcomes


@functools.cache
def _tasks(include_path: str | None) -> TaskManager:
    """lm-eval's index, which takes seconds to build."""
    return TaskManager(include_path=include_path)


def ratio_error(metric: str, pairs: np.ndarray) -> float:
    """
    Standard error of a likelihood per byte or word over all documents, by the delta method.

    Args:
        metric (`str`):
            One of `PER_UNIT`.
        pairs (`np.ndarray` of shape `(N, 2)`):
            Log-likelihood and length of each document.

    Returns:
        `float`: NaN for a single document.
    """
    (nll, size), n = (-pairs[:, 0], pairs[:, 1]), len(pairs)
    if n < 2:
        return float("nan")
    ratio = nll.sum() / size.sum()
    error = math.sqrt(n / (n - 1) * float(((nll - ratio * size) ** 2).sum())) / float(size.sum())
    return error / math.log(2) if metric == "bits_per_byte" else error * math.exp(ratio)


def paired_test(first: Outcome, second: Outcome, seed: int = 0) -> float:
    """
    Two-sided p-value that two outcomes differ, document by document: the sign-flip permutation test of their mean difference,
    by 10,000 random flips. For metrics of 0 and 1 it is McNemar's test.

    Args:
        first, second ([`Outcome`]):
            Of the same documents.
        seed (`int`):
            Of the flips.

    Returns:
        `float`: NaN where the metric is not one of single documents.
    """
    documents = sorted(first.samples.keys() & second.samples.keys())
    if not documents:
        return float("nan")
    differences = np.array([first.samples[i] - second.samples[i] for i in documents])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, len(differences)))
    extreme = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9
    return float((extreme.sum() + 1) / (FLIPS + 1))
