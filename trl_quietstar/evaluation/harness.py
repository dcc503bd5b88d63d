"""lm-evaluation-harness with thoughts: the model `quietstar`, and the comparison with and without them.

    trl-quietstar eval --model out/lora --tasks gsm8k,commonsense_qa --compare

Importing this module registers the model with lm-eval (`pip install trl-quietstar[eval]`), so that its own
`simple_evaluate(model="quietstar", model_args={"pretrained": "out/lora"}, ...)` finds it. Generation tasks generate with
thoughts, log-likelihood tasks score with thoughts, and `think="never"` is lm-eval's own model on the base weights.
"""

import functools
import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from lm_eval import simple_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from lm_eval.models.utils_hf import get_dtype
from lm_eval.tasks import TaskManager
from torch import nn
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..loading import load_tokenizer, warn_of_untrained_heads
from ..model.adapters import base_of, put_adapter
from ..model.heads import ThinkingModel
from ..model.saved import check_source
from ..modeling import QuietStarForCausalLM, check_thinker
from ..thinking.when import Thinking


FLIPS = 10_000  # random flips of sign in the paired test
# metrics of rolling log-likelihoods, for which lm-eval reports no standard error
PER_UNIT = ("word_perplexity", "byte_perplexity", "bits_per_byte")
# arguments of lm-eval's own model that load other weights than a thinking model's, or spread it over several GPUs
REFUSED = ("delta", "autogptq", "gptqmodel", "gguf_file", "parallelize", "tp_plan", "device_map")
# arguments that have no effect on a model that is loaded already
OF_LOADING = ("peft", "revision", "subfolder", "dtype", "device", "trust_remote_code")

# strings of a request (None for a window of a text), and the tokens of its context and its continuation
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("quietstar")
class QuietStarLM(HFLM):
    """
    A thinking model in lm-eval.

    Args:
        pretrained (`str` or [`~transformers.PreTrainedModel`]):
            Hub id or local folder of a thinking model or of an adapter with its heads; or a thinking model that is
            loaded already.
        think (`str`), think_every (`int`), thinking_threshold (`float`), *optional*:
            When the model thinks, as in `generate` of a thinking model. Defaults to how the model was trained to think.
        kwargs:
            Arguments of lm-eval's own model, `hf`: `tokenizer`, `revision`, `dtype`, `device`, `batch_size` (also
            `"auto"`), `load_in_4bit`, `peft` (an adapter to put on `pretrained`, with heads or without) and so on.

    Raises:
        `TypeError`: if an argument is unknown.
        `ValueError`: if a value is outside its limits, or an argument does not go with thoughts.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        think: str | None = None,
        think_every: int | None = None,
        thinking_threshold: float | None = None,
        **kwargs,
    ):
        refused = {name: value for name, value in kwargs.items() if value and name in REFUSED}
        if kwargs.pop("backend", "causal") not in ("causal", "default"):
            refused["backend"] = "seq2seq"
        if not isinstance(pretrained, str):
            check_thinker(pretrained)
            refused |= {name: value for name, value in kwargs.items() if value and name in OF_LOADING}
        if refused:
            raise ValueError(
                f"{', '.join(f'`{name}={value!r}`' for name, value in refused.items())} does not go with "
                f"{'a thinking model' if isinstance(pretrained, str) else 'a model that is loaded already'}; leave it out."
            )
        if isinstance(pretrained, str):
            check_source(pretrained)
        kwargs["device"] = kwargs.get("device") or str(torch.accelerator.current_accelerator() or "cpu")
        super().__init__(pretrained, backend="causal", **kwargs)
        self.thinking = Thinking.of(self.thinker.quietstar_settings, think, think_every, thinking_threshold)
        if self.thinker.fresh_thought_embeddings and self.thinking.mode != "never":
            warn_of_untrained_heads(str(self.thinker.config.name_or_path))
        if self.softmax_dtype not in (None, torch.float32) and self.thinking.mode != "never":
            raise ValueError(
                f"`softmax_dtype={kwargs['softmax_dtype']!r}` does not go with thoughts, whose log-probabilities are taken in "
                "float32; leave it out."
            )

    def _get_config(self, *args, **kwargs) -> None:
        # an adapter's folder need not have a configuration: `_create_model` takes the loaded model's
        self._config: Any = None

    def _create_tokenizer(self, pretrained, tokenizer, **kwargs) -> None:
        try:
            super()._create_tokenizer(pretrained, tokenizer, **kwargs)
        except (OSError, ValueError):
            if isinstance(pretrained, str) and not tokenizer:
                load_tokenizer(pretrained)  # raises an error that says what is missing
            raise

    def _create_model(
        self,
        pretrained: str,
        revision: str | None = "main",
        dtype: str | torch.dtype | None = "auto",
        peft: str | None = None,
        **kwargs,
    ) -> None:
        """Loads the thinking model on one device, by the arguments by which lm-eval loads a plain one."""
        # lm-eval always passes these: the refused ones are empty here, and a saved model brings its own quantization
        unused = ("gpus", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "quantization_config")
        for name in (*REFUSED, *unused):
            kwargs.pop(name, None)
        names = set(inspect.signature(BitsAndBytesConfig).parameters) & set(kwargs)
        if names:
            kwargs["quantization_config"] = BitsAndBytesConfig(**{name: kwargs.pop(name) for name in names})
        base = QuietStarForCausalLM.from_pretrained(pretrained, revision=revision, dtype=get_dtype(dtype), **kwargs)
        model: nn.Module = base if peft is None else put_adapter(base, peft, revision=revision)
        if not names:  # a quantized model is on its device already
            model.to(self.device)
        self._model, self._config = model, base_of(model).config

    @property
    def thinker(self) -> ThinkingModel:
        """The thinking model itself, without the adapter around it."""
        return base_of(self.model)

    @property
    def max_length(self) -> int:
        """
        Most tokens that are read before the last predicted one. A thought before that one takes positions beyond the text: its
        `thought_length` tokens, and what stands around them.
        """
        if self.thinking.mode == "never":
            return super().max_length
        positions = resolve_max_length(self.model.config, self.tokenizer, default=self._DEFAULT_MAX_LENGTH)
        self.thinker.thought_tokenizer(self.tokenizer)
        taken = self.thinker.quietstar_settings.thought_length + self.thinker.thought_marks.around
        return min(super().max_length, positions - taken)

    def _model_generate(
        self, context: torch.Tensor, max_length: int | None, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        options: dict = {"think": self.thinking}
        if self.thinking.mode != "never":
            options["tokenizer"] = self.tokenizer
        return super()._model_generate(context, max_length, stop, **generation_kwargs, **options)

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.thinking.mode == "never":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        # longest first: what does not fit into memory fails at once, and rows of a batch have similar lengths
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        results: dict[int, tuple[float, bool]] = {}
        progress = tqdm(total=len(order), disable=disable_tqdm, desc="Scoring with thoughts")

        def score(size: int, indices: list[int]) -> None:
            left = [i for i in indices if i not in results]  # called again, with a smaller size, when memory ran out
            for batch in (left[start : start + size] for start in range(0, len(left), size)):
                for index, result in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                    results[index] = result
                    if requests[index][0] is not None:  # None: a window of a text, which is cached as a whole
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
                progress.update(len(batch))

        if override_bs or self.batch_size_per_gpu != "auto":
            score(override_bs or self.batch_size_per_gpu, order)
        else:  # as many as fit; found anew for each part, since later parts have shorter texts
            part = max(math.ceil(len(order) / self.batch_schedule), 1)
            for start in range(0, len(order), part):
                find_executable_batch_size(score, self.max_batch_size)(order[start : start + part])
        return [results[i] for i in range(len(requests))]

    def _score(self, requests: list[TokenRequest]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each request's continuation, and whether greedy decoding would write it."""
        longest = max(len(continuation) for *_, continuation in requests)
        if longest > self.max_length:
            raise ValueError(
                f"A continuation has {longest} tokens, and with a thought the model scores {self.max_length} at most; shorten "
                "it, or use `think='never'`."
            )
        # a context that is too long loses its beginning, as with lm-eval's own model
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        width = max(map(len, rows))
        ids, mask, wanted = (torch.zeros(len(rows), width, dtype=torch.long, device=self.device) for _ in range(3))
        for b, (row, (_, _, continuation)) in enumerate(zip(rows, requests, strict=True)):
            ids[b, : len(row)] = torch.tensor(row, device=self.device)
            mask[b, : len(row)] = 1
            wanted[b, len(row) - len(continuation) : len(row)] = 1
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            options = dict(think=self.thinking, tokenizer=self.tokenizer)
            logps, correct = self.thinker.log_likelihoods(ids, mask, wanted, **options)
        totals, all_correct = logps.sum(1), (correct | ~wanted[:, 1:].bool()).all(1)
        return [(float(total), bool(greedy)) for total, greedy in zip(totals, all_correct, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """
    One metric of one task.

    Parameters:
        task (`str`):
            Name of the task.
        metric (`str`):
            Name of the metric, with the filter of the answers in brackets if the task has filters.
        value (`float`):
            The value that lm-eval reports.
        stderr (`float`):
            Standard error of the value; NaN if there is none.
        samples (`dict[int, float]`):
            The metric of each document, by the document's number, as far as it is a number. For likelihoods per byte or
            word, which only all documents together have: the log-likelihood of each document in nats.
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
            Names of tasks or of groups of tasks.
        include_path (`str`, *optional*):
            Folder with task files of your own. A process reads it once.
        limit (`int`, *optional*):
            Number of documents of each task. Defaults to all.
        num_fewshot (`int`, *optional*):
            Number of examples in the prompt. Defaults to the task's own.

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
            # lm-eval's keys are "metric,filter", and "metric_stderr,filter" for its error; others are names and versions
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
            if metric in PER_UNIT and found and not samples:  # samples are pairs of log-likelihood and length there
                pairs = np.array(list(found.values()))
                samples, stderr = dict(zip(found, pairs[:, 0].tolist(), strict=True)), ratio_error(metric, pairs)
            label = metric if name == "none" else f"{metric} ({name})"
            outcomes.append(Outcome(task, label, float(value), stderr, samples))
    return outcomes


@functools.cache
def _tasks(include_path: str | None) -> TaskManager:
    """lm-eval's index of tasks. It is kept, because building it takes seconds."""
    return TaskManager(include_path=include_path)


def ratio_error(metric: str, pairs: np.ndarray) -> float:
    """
    Standard error of a likelihood per byte or word over all documents, by the delta method.

    With nll `n_i`, length `s_i` and ratio `r = Σ n_i / Σ s_i` of N documents the error of r is
    `sqrt(N / (N - 1) · Σ (n_i - r·s_i)²) / Σ s_i`. A perplexity is `exp(r)`, whose derivative scales the error.

    Args:
        metric (`str`):
            A name of `PER_UNIT`.
        pairs (`np.ndarray` of shape `(N, 2)`):
            Log-likelihood in nats and length of each document.

    Returns:
        `float`: the standard error; NaN for a single document.
    """
    (nll, size), n = (-pairs[:, 0], pairs[:, 1]), len(pairs)
    if n < 2:
        return float("nan")
    ratio = nll.sum() / size.sum()
    error = math.sqrt(n / (n - 1) * float(((nll - ratio * size) ** 2).sum())) / float(size.sum())
    return error / math.log(2) if metric == "bits_per_byte" else error * math.exp(ratio)


def paired_test(first: Outcome, second: Outcome, seed: int = 0) -> float:
    """
    Two-sided p-value for the difference of two outcomes: a permutation test of the mean difference over documents, which
    flips the signs of differences at random 10,000 times. For metrics of 0 and 1 it is McNemar's test.

    Args:
        first, second ([`Outcome`]):
            The same metric on the same documents.
        seed (`int`):
            Seeds the flips.

    Returns:
        `float`: the p-value; NaN if the metric has no values for single documents.
    """
    documents = sorted(first.samples.keys() & second.samples.keys())
    if not documents:
        return float("nan")
    differences = np.array([first.samples[i] - second.samples[i] for i in documents])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, len(differences)))
    extreme = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9  # rounding must not break ties
    return float((extreme.sum() + 1) / (FLIPS + 1))  # the outcome itself counts as one flip, so that p is never 0
