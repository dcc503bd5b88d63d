"""The start-up check: which path is exact on *this* model? Nobody trains on silently wrong masks.

It stands above the paths that it judges, since it judges them by what sampling and scoring make of them.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from .._compat import full_float32, is_fault_of_device
from ..branches import interface
from ..branches.base import BranchCache, BranchPath
from ..branches.cached_replay import CachedReplay
from ..branches.cuda_graph import LEAST_TOKENS
from ..branches.masked_prefix import MaskedPrefix
from ..branches.replay import Replay
from ..branches.shared_prefix import SharedPrefix, SharedPrefixCache
from ..model.concurrency import eval_mode
from ..model.embeddings import embed_tokens, weight_of
from ..model.heads import ThinkingModel, suppressed_tokens
from ..model.lm_head import token_statistics
from ..model.marks import start_slots
from ..model.sharding import check_one_device
from ..text.batch import Text, Thoughts
from ..text.positions import choose_positions, seeded_generators
from ..text.transfer import exact_dtype
from .drawing import SamplingSettings, uniforms
from .sampling import sample_thoughts
from .scoring import ScoreRequest, score


logger = logging.getLogger(__name__)

# Largest difference, relative to the largest magnitude, that rounding explains
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# For a quantized model, whose rows round otherwise in another batch: SmolLM2-135M differs by up to 0.15 in 8 bits, and by
# 0.30 or more if a mask is wrong
QUANTIZED_TOLERANCE = 2e-1
TEXT_LENGTH = 24  # tokens of the random texts
# Fastest first
PATHS_OF: dict[str, tuple[BranchPath, ...]] = {
    "shared_prefix": (SharedPrefix(), MaskedPrefix()),
    "replay": (CachedReplay(), CachedReplay(by_token=True), Replay()),
}
PATHS = PATHS_OF["shared_prefix"] + PATHS_OF["replay"]


@torch.no_grad()
def path_difference(model: ThinkingModel, path: BranchPath, seed: int = 0) -> float:
    """
    Largest difference, relative to the largest magnitude, between a path and the model run in the ordinary way.

    Thoughts are sampled with `path` on random texts, with padding and with two packed documents. Then they are scored in three
    ways: with `path`, with the forwards that sample, and with replay. The text's log-probabilities are also held against the
    model's own forward, LM head included.

    Args:
        model ([`ThinkingModel`]):
            A model with heads; run in `eval()` mode.
        path ([`BranchPath`]):
            The path on trial.
        seed (`int`):
            Of the texts.

    Returns:
        `float`: 0 is perfect agreement; NaN if any number is.
    """
    text = _random_text(model, seed)
    ordinary = _ordinary_logps(model, text)  # before the path may change how the model attends
    positions = choose_positions(text, 6, seeded_generators(seed, 0, [0, 1]))
    settings = SamplingSettings(
        thought_length=3,
        num_thoughts=2,
        min_thought_length=2,
        stop=lambda ids: ids[:, -1] % 2 == 0,
        suppressed=suppressed_tokens(model),
    )
    generators = seeded_generators(seed, 1, [0, 1])
    thoughts = sample_thoughts(
        model, path.read(model, text), positions, settings, uniforms(positions, settings, generators)
    )
    ours, oracle = (score(model, ScoreRequest(text, thoughts, 3, p)) for p in (path, Replay()))
    fields = ("thought_logps", "talk_logps", "text_logps", "thought_values")
    pairs = [(getattr(ours, name), getattr(oracle, name)) for name in fields]
    if oracle.router_loss is not None:
        assert ours.router_loss is not None  # a path that records no routing is wrong
        pairs.append((ours.router_loss, oracle.router_loss))
    pairs.append((_stepwise_logps(model, path.read(model, text), thoughts), oracle.thought_logps))
    pairs += [(mine[: len(own)], own) for mine, own in zip(ours.text_logps.unbind(), ordinary, strict=True)]
    plain = Text.from_batch(text.input_ids, text.attention_mask)  # which a path may read without a mask
    pairs.append((_text_logps(model, path, plain), _text_logps(model, Replay(), plain)))
    exact = exact_dtype(text.input_ids.device)
    differences = [(a - b).to(exact).abs().max() / b.to(exact).abs().max().clamp(min=1) for a, b in pairs]
    return float(torch.stack(differences).max())


def _stepwise_logps(model: ThinkingModel, cache: BranchCache, thoughts: Thoughts) -> torch.Tensor:
    """Log-probabilities of the thoughts by the forwards that sample them: shape `(B, J, G, L)`."""
    B, J, G, L = thoughts.token_ids.shape
    embeds = embed_tokens(model, thoughts.token_ids.flatten(1, 2))
    slots = torch.cat([start_slots(model, B, J * G), embeds[:, :, :-1]], dim=2)
    if isinstance(cache, SharedPrefixCache):
        cache.room = slots.shape[2] + LEAST_TOKENS  # as of thoughts that are long enough for a CUDA graph
    hidden = torch.stack([cache.extend(thoughts.anchors, slot) for slot in slots.unbind(2)][-L:], dim=2)
    return token_statistics(
        *(model, hidden.unflatten(1, (J, G)), thoughts.token_ids, thoughts.host_mask),
        suppressed=suppressed_tokens(model),
    ).logps


def _text_logps(model: ThinkingModel, path: BranchPath, text: Text) -> torch.Tensor:
    """Log-probabilities of the text as a path reads it: shape `(B, T - 1)`."""
    hidden = path.read(model, text).text_hidden[:, :-1]
    return token_statistics(model, hidden, text.input_ids[:, 1:], text.host.predicted()).logps


def _random_text(model: ThinkingModel, seed: int) -> Text:
    """Two rows: a row of two packed documents, and a row padded at its end."""
    tables, device = (
        (model.get_input_embeddings(), model.get_output_embeddings()),
        model.quietstar.start_embedding.device,
    )
    V = min(len(weight_of(table)) for table in tables)  # either may have rows that no token of a text has
    ids = torch.randint(V, (2, TEXT_LENGTH), generator=torch.Generator().manual_seed(seed))
    padding = model.config.get_text_config().pad_token_id
    ids[ids == padding] = 0 if padding else 1  # some families take a position from a token that is padding
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    position_ids = torch.arange(TEXT_LENGTH).repeat(2, 1)
    position_ids[0] %= TEXT_LENGTH // 2
    return Text.from_batch(ids, mask, position_ids=position_ids).to(device)


def _ordinary_logps(model: ThinkingModel, text: Text) -> list[torch.Tensor]:
    """Log-probabilities of each row's first document by the model's own forward, without padding."""
    logps = []
    for ids, documents in zip(text.input_ids, text.host.document_ids, strict=True):
        ids = ids[: int((documents == 1).sum())]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        logps.append(log_probs.gather(-1, ids[1:, None]).squeeze(-1))
    return logps


def choose_path(model: ThinkingModel, wanted: str = "auto", with_dropout: bool = False) -> BranchPath:
    """
    The first path that is exact on this model: the shared prefix by its attention or by a mask, replay that goes on from the
    family's cache, plain replay.

    Args:
        model ([`ThinkingModel`]):
            A model with heads.
        wanted (`str`):
            `"auto"`, `"shared_prefix"` (an error where it is not exact) or `"replay"`.
        with_dropout (`bool`):
            Whether training drops attention weights, which only the family's own attention does.

    Raises:
        `ValueError`: if `"shared_prefix"` is wanted and is not exact, or if even replay is not: the model does not read
            from left to right, or not by embeddings; or if `device_map` spread it over several devices.
    """
    check_one_device(model)
    paths = PATHS if wanted == "auto" else PATHS_OF[wanted]
    if with_dropout:
        paths = tuple(path for path in paths if type(path) is not SharedPrefix)
    with eval_mode(model):
        path, problems = _first_exact(model, paths)
    if path is None and wanted == "shared_prefix":
        raise ValueError(f"The shared prefix is not exact on this model: {problems[-1]}. Use `thought_path='auto'`.")
    if path is None:
        raise ValueError(
            f"{type(model).__name__} cannot think: run as an ordinary sequence, a thought {problems[-1]}. Thoughts need a "
            "decoder that reads from left to right (an encoder may have to be loaded with `is_decoder=True`) and takes "
            "`inputs_embeds`."
        )
    if wanted == "auto" and isinstance(path, Replay):
        logger.warning(
            "Thoughts will run by replay, which is exact but slower: on this model the shared-prefix path %s.",
            problems[sum(isinstance(tried, SharedPrefix) for tried in paths) - 1],
        )
    return path


@torch.no_grad()
def takes_masks(model: ThinkingModel) -> bool:
    """Whether this model reads a branch by a 4D mask as it should; in `eval()` mode."""
    return _problem(model, MaskedPrefix()) is None


def _first_exact(model: ThinkingModel, paths: Sequence[BranchPath]) -> tuple[BranchPath | None, list[str]]:
    """The first path without a problem, if any, and the problems of those before it."""
    problems: list[str] = []
    for path in paths:
        problem = _problem(model, path)
        if problem is None:
            return path, problems
        problems.append(problem)
        interface.disable(model)
    return None, problems


@contextmanager
def _own_precision(model: ThinkingModel) -> Iterator[None]:
    """Without autocast: neither that around the check, nor that which accelerate puts around the forward of a model in training."""
    wrapped = vars(model).pop("forward", None)
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


@contextmanager
def _anywhere(model: ThinkingModel) -> Iterator[None]:
    """With thoughts that may stand anywhere, as they do in random texts, and not before an answer alone."""
    marks = model.thought_marks
    if not marks.unread:
        yield
        return
    vars(model)["_thought_marks"] = replace(marks, unread=())
    try:
        yield
    finally:
        vars(model)["_thought_marks"] = marks


def _problem(model: ThinkingModel, path: BranchPath) -> str | None:
    """What is wrong with a path on this model, in words that follow its name; None if nothing is."""
    quantized = getattr(model, "is_quantized", False)  # set by Transformers when it quantizes
    tolerance = QUANTIZED_TOLERANCE if quantized else TOLERANCES[model.dtype]
    try:
        # TF32 rounds by more than a wrong mask may differ
        with full_float32(), _own_precision(model), _anywhere(model):
            difference = path_difference(model, path)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        if is_fault_of_device(error):
            raise
        return f"fails with {type(error).__name__}: {error}"
    if difference <= tolerance:  # False for NaN
        return None
    return f"differs from ordinary forwards by {difference:.1e} relative, above the {tolerance:.0e} that rounding explains"
