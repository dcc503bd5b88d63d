"""Tiny models, a tokenizer and texts; and what is cast while they run.

The models are random but peaked, and the attention of every layer matters: a wrong mask, position or head shows as a
large difference, not as a rounding error. `exact` models are float64 throughout, which Transformers' RMSNorm is not.
"""

import functools
import types
import zlib

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.branches.base import BranchPath
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.model.heads import suppressed_tokens
from trl_quietstar.text.batch import Positions, Text, Thoughts
from trl_quietstar.text.positions import choose_positions, seeded_generators
from trl_quietstar.thinking.drawing import SamplingSettings, uniforms
from trl_quietstar.thinking.sampling import sample_thoughts


VOCAB = 97
WINDOWS = {
    "qwen2-window": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "mistral-window": dict(sliding_window=6),
}
CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen2-window": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral-window": MistralConfig,
    "gpt2": GPT2Config,
    "mixtral": MixtralConfig,
}
FAMILIES = tuple(name for name in CONFIGS if name != "mixtral")  # those whose two paths are compared in float64

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_config(name: str, vocab_size: int = VOCAB, **changes) -> PreTrainedConfig:
    """The configuration of a family with two small layers."""
    if name == "gpt2":
        shape = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
    else:
        shape = dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    if name == "qwen3":
        shape["head_dim"] = 8
    special = dict(bos_token_id=None, eos_token_id=0, pad_token_id=None)
    return CONFIGS[name](**{"vocab_size": vocab_size, **shape, **special, **WINDOWS.get(name, {}), **changes})


def tiny_model(
    name: str = "llama", settings: QuietStarSettings | None = None, dtype: torch.dtype = torch.float32, **changes
) -> PreTrainedModel:
    """A thinking model with random, peaked weights, in `eval()` mode."""
    model = QuietStarForCausalLM.from_config(tiny_config(name, **changes), settings, dtype=dtype)
    randomize(model)
    return model.eval()


def exact_model(name: str = "llama", settings: QuietStarSettings | None = None, **changes) -> PreTrainedModel:
    """A thinking model that computes in float64 throughout."""
    return exact(tiny_model(name, settings, torch.float64, attn_implementation="sdpa", **changes))


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """A model, whose norms then compute in float64 too."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_rms_norm, module)
    return model


def _rms_norm(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Transformers' formula, without its detour through float32."""
    return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights under which every part matters: peaked predictions, strong attention, open heads. Each parameter's
    depend on its name alone, not on what other parameters there are."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        if parameter.dim() >= 2:
            is_table = parameter.shape[0] >= parameter.shape[1] and "emb" in name or "wte" in name or "wpe" in name
            parameter.copy_(noise * (0.5 if is_table else 1.2 / parameter.shape[1] ** 0.5))
        elif name.endswith("_embedding"):
            parameter.copy_(0.5 * noise)
        elif "norm" in name or "ln_" in name:
            parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
        else:
            parameter.copy_(0.3 * noise)


def mixed_text(vocab_size: int = VOCAB, seed: int = 0) -> Text:
    """Five rows of 14: full, padded right, padded left, three packed documents, and one with masked labels."""
    ids = torch.randint(vocab_size, (5, 14), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, :4] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    position_ids[3] = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5])
    labels = ids.clone()
    labels[4, :5] = labels[4, 9] = -100
    return Text.from_batch(ids, mask, labels, position_ids)


def every_fourth(token_ids: torch.Tensor) -> torch.Tensor:
    """Ends a thought at a token id that four divides."""
    return token_ids[:, -1] % 4 == 0


def sampling(**changes) -> SamplingSettings:
    """Two thoughts of up to four tokens a position, some of which end early."""
    return SamplingSettings(
        **{"thought_length": 4, "num_thoughts": 2, "min_thought_length": 2, "stop": every_fourth, **changes}
    )


def generators(text: Text, seed: int = 0, step: int = 0) -> list[torch.Generator]:
    """One for each row."""
    return seeded_generators(seed, step, list(range(len(text.input_ids))))


def positions_of(text: Text, amount: int | float | str = "all", seed: int = 0) -> Positions:
    """Thought positions, drawn with a fixed seed."""
    return choose_positions(text, amount, generators(text, seed))


def think(
    model: PreTrainedModel,
    text: Text,
    path: BranchPath | None = None,
    positions: Positions | None = None,
    settings: SamplingSettings | None = None,
    seed: int = 1,
) -> Thoughts:
    """Thoughts sampled with a fixed seed."""
    path = path or SharedPrefix()
    positions = positions_of(text) if positions is None else positions
    settings = settings or sampling(suppressed=suppressed_tokens(model))
    with torch.no_grad():
        cache = path.read(model, text)
    return sample_thoughts(model, cache, positions, settings, uniforms(positions, settings, generators(text, seed)))


def sums(first: int = 20, second: int = 20) -> list[str]:
    """The corpus: "0 plus 0 is 0 .", and so on."""
    return [f"{a} plus {b} is {a + b} ." for a in range(first) for b in range(second)]


@functools.cache
def _byte_level_bpe() -> str:
    """The tokenizer as text: trained once on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sums(), trainer)
    return tokenizer.to_str()


def byte_tokenizer(**changes) -> PreTrainedTokenizerFast:
    """A new tokenizer of 300 tokens or fewer; no pad token unless `changes` give one."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_bpe()),
        eos_token="<eos>",
        **{"chat_template": CHAT_TEMPLATE, "model_max_length": 128, **changes},
    )


@torch.no_grad()
def divergence_by_hand(model, ids: torch.Tensor, thought: torch.Tensor) -> float:
    """KL in nats of the next token's distribution after a thought from the one without."""
    embed, heads = model.get_input_embeddings(), model.quietstar
    row = torch.cat([embed(ids), heads.start_embedding[None], embed(thought), heads.end_embedding[None]])
    without = model.base_model(input_ids=ids[None]).last_hidden_state[0, -1]
    thinking = model.base_model(inputs_embeds=row[None]).last_hidden_state[0, -1]
    weight = heads.mixing_head(without, thinking)
    base = model.lm_head(without).log_softmax(-1)
    mixed = (weight * model.lm_head(thinking) + (1 - weight) * model.lm_head(without)).log_softmax(-1)
    return float((base.exp() * (base - mixed)).sum())


class Casts(TorchDispatchMode):
    """Shapes of the tensors that were cast."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))
