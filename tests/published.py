"""Checkpoints of the published Quiet-STaR code, and what they predict by hand.

The names and shapes of the layout are written out here, so that nothing depends on how the package reads them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, relu
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from .tiny import byte_tokenizer, exact, randomize


H = 32
OPTIONS = {  # what its training script asks for
    "max_thoughts": 13,
    "merged_talk_heads": True,
    "merged_lm_and_talk_heads": False,
    "merged_lm_and_think_heads": True,
    "use_concat_talk_head": True,
    "use_shallow_think": True,
    "use_shallow_talk": False,
    "use_complex_think_head": False,
    "use_complex_talk_head": True,
    "use_weighted_talk_head": True,
}


def published_config(**changes) -> MistralConfig:
    """A small Mistral with two tokens more than the tokenizer has."""
    shape = dict(
        vocab_size=len(byte_tokenizer()) + 2,
        hidden_size=H,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=0,
    )
    return MistralConfig(**{**shape, **OPTIONS, **changes})


def published_heads(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The weights that the code adds to the base's; the mixing weights that they give leave [0, 1] on both sides."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float, *shape: int) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    return {
        "start_embedding": noise(0.005, 2, H),
        "end_embedding": noise(0.005, 2, H),
        "talk_head.0.0.weight": noise(0.2, H, 2 * H),
        "talk_head.0.0.bias": noise(0.3, H),
        "talk_head.0.2.weight": noise(0.3, H, H),
        "talk_head.0.2.bias": noise(0.3, H),
        "talk_head.0.4.weight": noise(0.3, 1, H),
    }


def published_checkpoint(
    folder: Path, form: str = "safetensors", dtype: torch.dtype = torch.float32, heads: dict | None = None, **changes
) -> Path:
    """
    Writes a checkpoint as the published code saves one, with the base's tokenizer beside it: in one file of safetensors, one of
    PyTorch (`"bin"`), or two of safetensors (`"shards"`).
    """
    config = published_config(**changes)
    base = MistralForCausalLM(config).to(dtype)
    randomize(base)
    weights = {**base.state_dict(), **(published_heads(dtype) if heads is None else heads)}
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(weights)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        places = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def base_of_checkpoint(folder: Path) -> PreTrainedModel:
    """The plain Mistral in a checkpoint, in float64."""
    model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    return exact(model)


@torch.no_grad()
def by_hand(
    base: PreTrainedModel,
    heads: dict[str, torch.Tensor],
    ids: torch.Tensor,
    position: int,
    thought: torch.Tensor,
    talk_length: int,
    suppressed: list[int],
) -> dict[str, torch.Tensor]:
    """
    Log-probabilities of a thought and of the talk after it, as one ordinary sequence in float64.

    Args:
        base, heads:
            [`base_of_checkpoint`] and [`published_heads`].
        ids (`torch.Tensor` of shape `(T,)`), position (`int`), thought (`torch.Tensor` of shape `(L,)`):
            A text, and a thought after one of its tokens.
        talk_length (`int`):
            M; the text goes on for as long.
        suppressed (`list[int]`):
            Ids of tokens that the thought cannot hold.

    Returns:
        `dict`: `thought`, of shape `(L,)`; `mixed`, `alone` and `weights`, of shape `(M,)`.
    """
    table, head = base.model.embed_tokens.weight, base.lm_head.weight
    w = {name.removeprefix("talk_head.0."): value.double() for name, value in heads.items()}
    start, end = (100 * w[name][:1] for name in ("start_embedding", "end_embedding"))
    talk = ids[position + 1 : position + 1 + talk_length]
    row = torch.cat([table[ids[: position + 1]], start, table[thought], end, table[talk[:-1]]])
    states = base.model(inputs_embeds=row[None]).last_hidden_state[0][position + 1 :]
    without = base.model(input_ids=ids[None]).last_hidden_state[0][position : position + talk_length]
    after = states[len(thought) + 1 :]
    inner = relu(linear(torch.cat([without, after], -1), w["0.weight"], w["0.bias"]))
    weights = linear(relu(linear(inner, w["2.weight"], w["2.bias"])), w["4.weight"])
    drawn = states[: len(thought)] @ head.T
    drawn[:, suppressed] = -torch.inf

    def logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    return {
        "thought": logps(drawn, thought),
        "mixed": logps(((1 - weights) * without + weights * after) @ head.T, talk),
        "alone": logps(after @ head.T, talk),
        "weights": weights[:, 0],
    }
