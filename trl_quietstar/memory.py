"""How much memory scoring needs, estimated before it is spent."""

from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from .distributed import own_part
from .embeddings import embed_tokens
from .paths import backbone


PROBE_TOKENS = 32
SHARE = 0.6  # of the free memory that activations may take
CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))  # of a container


def kept_per_token(model: PreTrainedModel) -> float:
    """
    Bytes that a forward keeps of each token for the backward, counted in one over a few tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM, as it will be trained: adapters, frozen weights and checkpointed layers keep less.
    """
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout != torch.strided:  # the few numbers that a sparse adapter adds to a weight
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    # once in a run, and again where it is resumed: dropout must not draw from the random numbers of training
    kind = model.device.type
    with (
        torch.random.fork_rng([] if kind == "cpu" else [model.device], device_type="cuda" if kind == "cpu" else kind),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        hidden = backbone(model, embed_tokens(model, ids), use_cache=False)
    total = sum(kept.values())
    del hidden  # until here it held all that was counted, so that no address was counted twice
    return total / PROBE_TOKENS


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, or in the container where there is a limit."""
    if device.type == "mps":
        return max(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), 0)
    if device.type != "cpu":
        kind = torch.get_device_module(device)
        unused = kind.memory_reserved(device) - kind.memory_allocated(device)  # by PyTorch, which hands it out again
        return kind.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    if all(file.is_file() for file in CGROUP) and CGROUP[0].read_text().strip() != "max":
        free = min(free, int(CGROUP[0].read_text()) - int(CGROUP[1].read_text()))
    return free


def memory_budget(model: PreTrainedModel) -> int:
    """
    Bytes that a training run has for activations, by what is free ahead of its first backward: then gradients are still to
    come, and AdamW's two moments.
    """
    to_come = sum(3 * local.nbytes for local in map(own_part, model.parameters()) if local.requires_grad)
    return max(free_bytes(model.device) - to_come, 0)


def branches_that_fit(per_token: float, rows: int, text_length: int, branches: int, slots: int, free: float) -> int:
    """
    How many branches of each row can be scored at once.

    Args:
        per_token (`float`):
            As [`kept_per_token`] gives it.
        rows (`int`), text_length (`int`), branches (`int`), slots (`int`):
            B, T, N and S.
        free (`float`):
            Bytes.

    Returns:
        `int`: from 1 to N.
    """
    tokens = SHARE * free / max(per_token, 1.0) / rows - text_length
    return min(max(int(tokens // slots), 1), branches)


def suits_one_pass(
    model: PreTrainedModel, per_token: float, rows: int, text_length: int, branches: int, slots: int, free: float
) -> bool:
    """
    Whether thoughts are short enough to be sampled in the graph of training, which keeps at each slot of a branch the keys and
    values of all slots before it: no more of these than of all else, and all of it fits.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
        per_token (`float`), rows (`int`), text_length (`int`), branches (`int`), slots (`int`), free (`float`):
            As in [`branches_that_fit`].
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    regrown = rows * branches * slots**2 / 2 * pair
    if regrown > rows * branches * slots * per_token:
        return False
    return branches_that_fit(per_token, rows, text_length, branches, slots, free - regrown / SHARE) == branches
