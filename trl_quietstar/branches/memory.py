"""How much memory thoughts need, estimated before it is spent, and how many branches run at once by that estimate.

Training, validation, inspection and scoring go by it; there is no other bound. Two estimates stand behind it. With gradient,
what a token keeps for the backward is counted in a forward ([`kept_per_token`]). Without gradient only keys and values stay, and
the model's sizes tell the rest ([`branches_without_graph`]).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.embeddings import embed_tokens, weight_of
from ..model.family import max_positions
from ..model.sharding import own_part
from .base import BranchPath, backbone
from .cached_replay import CachedReplay
from .cuda_graph import held_bytes
from .replay import Replay


PROBE_TOKENS = 64  # in the longer of the two forwards that are counted; the other has half as many
SHARE = 0.6  # of the free memory, which activations may take
CPU_TOKENS = 4096  # in a forward without graph on a CPU: more are no faster there, and take memory for nothing
# a layer's parameters times tokens: from here on arithmetic takes an accelerator longer than its launches take the host. Measured on an
# H200, where a layer of a token took the host 1.7 ms, in which the device does that much at 650 TFLOP/s
BUSY = 2**39
# the same of a CUDA graph, whose kernels follow each other in an eighth of that time; an estimate
BUSY_REPLAYED = 2**36
CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))  # a container's limit and use

_layer_sizes: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()  # counted once for a model


@dataclass(frozen=True)
class Plan:
    """
    How the thoughts of a batch are sampled and scored.

    Parameters:
        single_pass (`bool`):
            Whether thoughts are sampled in the forward that scores them.
        training (`int`, *optional*):
            How many branches of each row keep their activations for the backward at once; None for all.
        sampling, scoring (`int`, *optional*):
            How many branches of each row are sampled at once, and scored at once, without gradient; None for all.
    """

    single_pass: bool
    training: int | None = None
    sampling: int | None = None
    scoring: int | None = None


@dataclass(frozen=True)
class Size:
    """
    What is to be sampled and scored.

    Parameters:
        rows, text_length, branches, slots (`int`):
            B, T, N and S.
    """

    rows: int
    text_length: int
    branches: int
    slots: int


def kept_per_token(model: PreTrainedModel) -> float:
    """
    Bytes that a forward keeps of each token for the backward, under the autocast that is on.

    Two forwards are counted, and the longer one's surplus is divided by its further tokens. So what does not grow with the tokens,
    such as autocast's copies of weights, does not count.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM, as it will be trained: adapters, frozen weights and checkpointed layers keep less.
    """
    # dropout must not draw from the random numbers of training: this runs once in a run, and again where it is resumed
    half = min(PROBE_TOKENS, max_positions(model.config) or PROBE_TOKENS) // 2
    kind = model.device.type
    forked = dict(devices=[], device_type="cuda") if kind == "cpu" else dict(devices=[model.device], device_type=kind)
    with torch.random.fork_rng(**forked), torch.enable_grad():
        less, more = (kept_by_forward(model, tokens) for tokens in (half, 2 * half))
    return max(more - less, 0) / half


def kept_by_forward(model: PreTrainedModel, tokens: int) -> int:
    """Bytes that a forward over so many tokens keeps for the backward."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout == torch.strided:  # others are the few numbers that a sparse adapter adds to a weight
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        # else a node would hold its own output: a circle through C++, which stays for ever, with all weights
        return tensor.detach()

    ids = torch.arange(tokens, device=model.device)[None] % weight_of(model.get_input_embeddings()).shape[0]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = backbone(model, embed_tokens(model, ids), use_cache=False)
    total = sum(kept.values())
    del hidden  # until here it held all that was counted, so that no address was counted twice
    return total


def passing_per_token(model: PreTrainedModel) -> int:
    """Bytes that a forward without gradient holds of a token at its widest place, in an MLP, by the model's sizes."""
    config, hidden = model.config.get_text_config(), weight_of(model.get_output_embeddings()).shape[1]
    inner = _number(config, "intermediate_size") or 4 * hidden
    experts = _number(config, "num_experts_per_tok") or 1
    return (8 * hidden + 4 * inner * experts) * max(model.dtype.itemsize, 4)  # norms compute in float32


def cached_per_token(model: PreTrainedModel) -> int:
    """Bytes of a token's keys and values in all layers, by the model's sizes and the autocast that is on."""
    config, kind = model.config.get_text_config(), model.device.type
    heads = _number(config, "num_key_value_heads") or _number(config, "num_attention_heads") or 1
    hidden = weight_of(model.get_output_embeddings()).shape[1]
    size = _number(config, "head_dim") or hidden // (_number(config, "num_attention_heads") or 1)
    low = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if low else model.dtype
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize


def _number(config: PreTrainedConfig, name: str) -> int | None:
    """A size in a configuration, the largest where layers differ; None where it has no such size."""
    layers = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]
    values = [getattr(layer, name, None) for layer in layers]
    values = [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]
    return max((value for value in values if value is not None), default=None)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, or in the container where there is a limit."""
    if device.type == "mps":
        return max(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), 0)
    if device.type != "cpu":
        kind = torch.get_device_module(device)
        unused = kind.memory_reserved(device) - kind.memory_allocated(device)  # by PyTorch, which hands it out again
        return kind.mem_get_info(device)[0] + max(unused - held_bytes(device), 0)
    free = psutil.virtual_memory().available
    if all(file.is_file() for file in CGROUP) and CGROUP[0].read_text().strip() != "max":
        free = min(free, int(CGROUP[0].read_text()) - int(CGROUP[1].read_text()))
    return free


def memory_budget(model: PreTrainedModel) -> int:
    """
    Bytes that a training run has for activations.

    It is measured ahead of the first backward, when gradients and AdamW's two moments are still to come; their size is taken off
    what is free.
    """
    to_come = sum(3 * local.nbytes for local in map(own_part, model.parameters()) if local.requires_grad)
    return max(free_bytes(model.device) - to_come, 0)


def branches_that_fit(per_token: float, size: Size, free: float) -> int:
    """
    How many branches of each row can be scored at once with gradient.

    Args:
        per_token (`float`):
            As [`kept_per_token`] gives it.
        size ([`Size`]):
            Of the batch.
        free (`float`):
            Bytes.

    Returns:
        `int`: from 1 to N.
    """
    tokens = SHARE * free / max(per_token, 1.0) / size.rows - size.text_length
    return min(max(int(tokens // size.slots), 1), size.branches)


def branches_without_graph(model: PreTrainedModel, path: BranchPath, size: Size, new: int, free: float) -> int:
    """
    How many branches of each row can run at once without gradient, when only their keys and values are kept.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
        path ([`~branches.base.BranchPath`]):
            How thoughts are run.
        size ([`Size`]):
            Of the batch.
        new (`int`):
            How many slots of each branch a forward takes: 1 in sampling.
        free (`float`):
            Bytes.

    Returns:
        `int`: from 1 to N.
    """
    passing, cached = passing_per_token(model), cached_per_token(model)
    # tokens whose keys are the branch's alone
    own = size.slots + (size.text_length if isinstance(path, Replay) else 0)
    # twice, since room for keys grows by doubling
    per_branch = new_tokens(path, size, new) * passing + 2 * own * cached
    left = SHARE * free / size.rows - size.text_length * (passing + cached)
    return min(max(int(left // per_branch), 1), size.branches)


def new_tokens(path: BranchPath, size: Size, new: int) -> int:
    """How many tokens a forward runs for `new` slots of a branch: plain replay runs the text and earlier slots again."""
    again = isinstance(path, Replay) and not (isinstance(path, CachedReplay) and new == 1)
    return size.text_length + size.slots if again else new


def suits_one_pass(model: PreTrainedModel, per_token: float, size: Size, free: float) -> bool:
    """
    Whether thoughts are sampled in the graph of training.

    That graph keeps at each slot of a branch the keys and values of all slots before it. They must take no more than everything
    else, and all of it must fit. Away from a CPU each forward must also be large enough to pay for its launches: sampling in the
    graph makes about twice as many, and is not replayed ([`cuda_graph`]).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
        per_token (`float`), size ([`Size`]), free (`float`):
            As in [`branches_that_fit`].
    """
    branches = size.rows * size.branches
    if not is_busy(model, branches):
        return False
    regrown = branches * size.slots**2 / 2 * cached_per_token(model)
    if regrown > branches * size.slots * per_token:
        return False
    return branches_that_fit(per_token, size, free - regrown / SHARE) == size.branches


def is_busy(model: PreTrainedModel, tokens: int, least: float = BUSY) -> bool:
    """Whether a forward over so many tokens takes the device longer than its launches take the host; on a CPU always."""
    return model.device.type == "cpu" or _layer_size(model) * tokens >= least


def _layer_size(model: PreTrainedModel) -> float:
    """Parameters of a layer."""
    if model not in _layer_sizes:
        weights = (weight_of(model.get_input_embeddings()), weight_of(model.get_output_embeddings()))
        tables = {id(weight): weight.numel() for weight in weights}  # one where they are tied
        layers = model.config.get_text_config().num_hidden_layers
        _layer_sizes[model] = (model.num_parameters() - sum(tables.values())) / layers
    return _layer_sizes[model]


def plan_batch(
    model: PreTrainedModel,
    path: BranchPath,
    size: Size,
    per_token: float | None,
    free: float,
    in_graph: bool,
    least: Callable[[int], int] = int,
) -> Plan:
    """
    How a batch is sampled and scored in the memory that is free.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
        path ([`~branches.base.BranchPath`]):
            How thoughts are run.
        size ([`Size`]):
            Of the batch; its N is that of the process with most branches.
        per_token (`float`, *optional*):
            As [`kept_per_token`] gives it; None if no group needs to be chosen for the backward.
        free (`float`):
            Bytes.
        in_graph (`bool`):
            Whether thoughts may be sampled in the forward that scores them.
        least (`Callable`, *optional*):
            From this process's number to the least of all processes, if each must call the layers as often as the others.
            Defaults to this process's own number.
    """

    def group(fitting: int) -> int | None:
        fitting = least(fitting)
        return None if fitting >= size.branches else fitting

    sampling = group(branches_without_graph(model, path, size, 1, free))
    scoring = group(branches_without_graph(model, path, size, size.slots, free))
    if per_token is None:
        return Plan(in_graph and sampling is None and scoring is None, None, sampling, scoring)
    slots = new_tokens(path, size, size.slots)
    training = group(branches_that_fit(per_token, replace(size, slots=slots), free))
    single_pass = in_graph and training is None and suits_one_pass(model, per_token, size, free)
    return Plan(single_pass, training, sampling, scoring)
