"""Which causal language models of Transformers learn to think here, and on which path.

    python -m tests.conformance --output docs/models.md   # every type (a quarter of an hour on two cores)
    python -m tests.conformance llama gemma3_text         # some of them, printed

Each type that Transformers maps to a causal LM is built tiny, with random peaked weights, and has to pass five steps: the
start-up check of the paths (against replay, and replay against the model's own forward), a training step that moves its
weights, saving and reloading with equal scores, plain loading, and a LoRA step that moves the adapter.

A type that the generic shrinking does not fit has one entry in `EXCEPTIONS`: fields of its configuration.
"""

import argparse
import signal
import sys
import tempfile
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarREINFORCETrainer
from trl_quietstar.branches.cached_replay import CachedReplay
from trl_quietstar.branches.masked_prefix import MaskedPrefix
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.thinking.check import path_difference

from .tiny import byte_tokenizer


VOCAB = 320
LARGEST = 200e6  # parameters
LEAST_MOVED = 4  # tensors, by a training step; an adapter on two projections of one layer has as many
SECONDS = 90  # for one type
PATH_NAMES = {
    SharedPrefix: "shared prefix",
    MaskedPrefix: "shared prefix (mask)",
    CachedReplay: "cached replay",
    Replay: "replay",
}
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "qk_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "mamba_d_ssm": 64,
    "sliding_window": 6,
    "rotary_dim": 4,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    "is_decoder": True,
}
DECODER = dict(is_encoder_decoder=False, is_decoder=True)
MLA = dict(num_key_value_heads=4)
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
# fields of a type's configuration where shrinking each by its name does not fit
EXCEPTIONS: dict[str, dict] = {
    "bamba": dict(attn_layer_indices=[1]),
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart"), DECODER),
    **dict.fromkeys(("mvp", "pegasus", "plbart", "whisper"), DECODER),
    "prophetnet": {**DECODER, "num_decoder_layers": 2, "num_decoder_attention_heads": 4},
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), MLA),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"), MLA),
    **dict.fromkeys(("llama4", "llama4_text"), dict(attention_chunk_size=6, no_rope_layers=[1, 0])),
    "zamba": dict(
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        attention_hidden_size=64,
        attention_head_dim=16,
        mamba_dt_rank=4,
    ),
    "cohere_compass_text": dict(
        rope_parameters=dict.fromkeys(
            ("full_attention", "sliding_attention"), dict(rope_type="default", rope_theta=1e4)
        ),
        layer_types=["sliding_attention", "full_attention"],
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "qwen4_exp_text": dict(
        layer_types=["linear_attention", "indexed_attention"],
        indexer_budget=8,
        indexer_compress_ratio=2,
        indexer_head_dim=8,
        indexer_kv_heads=1,
        indexer_n_heads=2,
    ),
    "dots3_note": dict(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_layer_types=["dense"] * 2,
            adapter_in_dim=32,
            adapter_out_dim=32,
        ),
        audio_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            downsample_hidden_size=16,
            adapter_input_size=32,
            adapter_out_dim=32,
        ),
    ),
    "deepseek_v2": {**MLA, "num_experts_per_tok": 2},
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "bailing_hybrid": {**MLA, **HYBRID},
    "kimi_linear": {**MLA, **HYBRID, "linear_head_dim": 8, "linear_num_heads": 4},
    "nemotron_h": dict(layers_block_type=["linear_attention", "full_attention"], n_groups=1),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"], lru_width=32, attention_window_size=6),
    "electra": dict(embedding_size=32),
    "gemma3n_text": dict(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        laurel_rank=8,
        hidden_size_per_layer_input=8,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma4_text": dict(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma4_unified_text": dict(num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"]),
    # ids that the texts of this suite do not hold
    **dict.fromkeys(("gemma4", "gemma4_unified"), dict(image_token_id=0, video_token_id=0, audio_token_id=0)),
    "flint": dict(mlp_only_layers=[0]),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=6),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), dict(head_dim=8, num_key_value_heads=2)),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), dict(layer_types=["conv", "full_attention"])),
    "mamba2": dict(num_heads=8, n_groups=1),
    "nemotron": dict(num_key_value_heads=2, head_dim=8),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), HYBRID),
    "reformer": dict(is_decoder=True, axial_pos_embds=False, attention_head_size=8),
    "xlm": dict(causal=True),
    "xmod": dict(default_language="en_XX"),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"], n_mamba_heads=4),
    "zaya": dict(num_experts_per_tok=1),
}
# PEFT refuses the output projection of Mamba, and cannot wrap routers that return a tuple
LORA_TARGETS = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1"), ["in_proj"]),
    "nemotron_h": ["in_proj", "q_proj", "v_proj"],
    **dict.fromkeys(("llama4", "llama4_text", "phimoe"), ["q_proj", "v_proj"]),
}
# why a type cannot learn to think, where the error does not say
REASONS = {
    "blt": "cuts bytes into patches by the bytes themselves; a learned embedding is none",
    "cpmant": "its forward takes token ids only; a learned embedding has none",
    "deepseek_v4": "routes tokens by their ids in its first layers (`hash_moe`); a learned embedding has none",
    "emu3": "Transformers maps its text config to no causal LM, so that a saved one loads by `Emu3ForCausalLM` only",
    "gemma3n": "needs timm even for text; its text model alone is `gemma3n_text`",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "a draft model, which reads the keys and values of the model it drafts for",
    ),
    "mllama": "Transformers maps its text config to no causal LM, so that a saved one loads by `MllamaForCausalLM` only",
    **dict.fromkeys(("musicgen", "musicgen_melody"), "reads and writes several audio codes a step, not one token"),
    "prophetnet": "its head reads several streams of hidden states, one for each of the next tokens",
    "xlnet": "reads in both directions",
    "youtu": "trains, but Transformers clears the padding token's embedding when it loads this type",
}
DOZEN = (
    *("llama", "qwen3", "gemma3_text", "gpt2", "mistral", "mixtral", "deepseek_v3", "gpt_oss", "olmo2", "opt"),
    *("bloom", "mamba", "gpt_neo", "qwen3_next", "roberta", "minicpm3", "llama4_text"),
)


@dataclass
class Row:
    """What became of a type: its path and largest difference from replay, or the step that failed and why."""

    model_type: str
    path: str = ""
    difference: float | None = None
    failed: str = ""
    note: str = ""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The type's configuration with every size it names made small, in its text part too."""
    return _shrunk(CONFIG_MAPPING[model_type], EXCEPTIONS.get(model_type, {}))


def _shrunk(config_class: type[PreTrainedConfig], changes: dict) -> PreTrainedConfig:
    """A configuration with the sizes of `SMALL` where the class has them, and with changes."""
    default = config_class()
    given = default.to_dict()
    given |= {alias: given.get(name) for alias, name in default.attribute_map.items()}
    fields = {name: value for name, value in SMALL.items() if name.endswith("token_id") or given.get(name) is not None}
    parts = {name: type(getattr(default, name, None)) for name in config_class.sub_configs}
    parts = {
        name: _shrunk(part, EXCEPTIONS.get(part.model_type, {}))
        for name, part in parts.items()
        if issubclass(part, PreTrainedConfig) and name not in changes
    }
    return config_class(**{**fields, **parts, **changes})


@torch.no_grad()
def tiny_model(model_type: str) -> PreTrainedModel:
    """A thinking model with weights under which attention and order matter, each from its name alone."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny_config(model_type)).parameters())
    if size > LARGEST:
        raise ValueError(f"not small enough: {size / 1e6:,.0f} million parameters after shrinking")
    torch.manual_seed(0)
    model = QuietStarForCausalLM.from_config(tiny_config(model_type))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.is_floating_point():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            table = parameter.shape[0] >= VOCAB
            scale = 0.5 if table else parameter.shape[1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def examine(model_type: str, folder: Path) -> Row:
    """Takes a type through every step, and stops at the first that fails."""
    row = Row(model_type)
    step = "build"
    try:
        model = tiny_model(model_type)
        row.note = type(model).__name__.removeprefix("QuietStar")
        step = "check"
        trainer = _trainer(model, folder)
        row.path = PATH_NAMES[type(trainer.path)]
        row.difference = path_difference(model, trainer.path)
        step = "train"
        _check_training(trainer)
        step = "reload"
        trainer.save_model(str(folder / "saved"))
        _check_reload(trainer, folder / "saved")
        step = "plain load"
        _check_plain_load(model, folder / "saved")
        step = "LoRA"
        adapter = LoraConfig(r=2, target_modules=LORA_TARGETS.get(model_type, "all-linear"), task_type="CAUSAL_LM")
        _check_training(_trainer(tiny_model(model_type), folder, adapter))
    except Exception as error:  # whatever a family may raise is what the table is there to say
        row.failed, row.note = (
            step,
            REASONS.get(model_type, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"),
        )
        if "-v" in sys.argv:
            traceback.print_exc()
    return row


def _trainer(model: PreTrainedModel, folder: Path, adapter: LoraConfig | None = None) -> QuietStarREINFORCETrainer:
    """Two steps on texts of twelve tokens, and as many texts to evaluate on."""
    options = dict(thought_length=3, talk_length=2, thought_positions=3, value_head_hidden_size=256, max_steps=2)
    options |= dict(learning_rate=1e-3, per_device_train_batch_size=2, per_device_eval_batch_size=2, use_cpu=True)
    options |= dict(
        save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False, preflight_thoughts=None
    )
    ids = torch.randint(1, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return QuietStarREINFORCETrainer(
        model,
        QuietStarConfig(str(folder), logging_strategy="no", **options),
        train_dataset=Dataset.from_dict({"input_ids": ids[:4]}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[4:]}),
        processing_class=byte_tokenizer(),
        peft_config=adapter,
    )


def _check_training(trainer: QuietStarREINFORCETrainer) -> None:
    """Weights move, all stay finite."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = [name for name, old in before.items() if not torch.equal(old, after[name])]
    broken = [name for name in before if not after[name].isfinite().all()]
    if broken:
        raise AssertionError(f"not finite after training: {broken[:3]}")
    layers = [name for name in moved if "quietstar." not in name and ".vision" not in name]
    if len(layers) < LEAST_MOVED:
        raise AssertionError(f"only {len(layers)} parameters of the language model moved")


def _check_reload(trainer: QuietStarREINFORCETrainer, folder: Path) -> None:
    """The saved model evaluates as the trained one."""
    expected = trainer.evaluate()["eval_nll_with"]
    again = _trainer(QuietStarForCausalLM.from_pretrained(folder), folder)
    again.thinker.path = trainer.path
    found = again.evaluate()["eval_nll_with"]
    if abs(found - expected) > 1e-4:
        raise AssertionError(f"NLL {found} after reloading, {expected} before")


def _check_plain_load(model: PreTrainedModel, folder: Path) -> None:
    """The base class loads it whole."""
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {name: sorted(keys)[:3] for name, keys in info.items() if keys}
    if wrong:
        raise AssertionError(f"plain loading reports {wrong}")
    ids = torch.arange(1, 10)[None]
    with torch.no_grad():
        if not torch.allclose(plain.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-4):
            raise AssertionError("the plainly loaded model predicts otherwise")


HEADER = """# Models

Each model type that Transformers {version} maps to a causal LM, with the way in which it runs here. Look for the `model_type` of your model's
`config.json`. {summary}

    python -m tests.conformance --output docs/models.md

makes this page. It takes a tiny model of each type with random weights through the start-up check, a training step, saving and
reloading, plain loading with `AutoModelForCausalLM`, and a LoRA step.

- [How a model runs](#how-a-model-runs)
- [If your model is not on the list](#if-your-model-is-not-on-the-list)
- [The models](#the-models)

## How a model runs

| path | what it does |
| --- | --- |
| shared prefix | the fast path: the text is read once, and every thought attends to it and to itself |
| shared prefix (mask) | the same result for families whose attention does not use Transformers' interface: text and thoughts run in one forward, and a mask tells them apart |
| cached replay | sampling and generation by ordinary cached decoding, on copies of the family's own cache, so no token is read twice. Scoring runs each thought as an ordinary sequence, because these families update their states in place and scoring needs gradients |
| replay | everything runs as ordinary sequences, because even the cache is not exact |

The difference is between this path and ordinary forwards, in sampling and in scoring. It is the largest difference of any log-probability or
value, relative to the largest magnitude. The limit is 1e-4. The trainer makes the same check on your own model when it starts, and
refuses a model that even replay cannot score.

## If your model is not on the list

Train it: the start-up check chooses a path or refuses the model with a reason. A family that needs an exception gets one entry:

| exception | place |
| --- | --- |
| its tiny configuration does not build | `EXCEPTIONS` in `tests/conformance.py` |
| its positions do not begin at 0 | `POSITIONS_AFTER_PADDING` in `trl_quietstar/model/family.py` |
| it scales or caps its logits after the head under a name of its own | `SCALES` or `SOFTCAPS` in `trl_quietstar/model/family.py` |

## The models
"""


def _too_slow(*_) -> None:
    """What the alarm calls."""
    raise TimeoutError(f"not small enough: takes more than {SECONDS} s")


def table(rows: list[Row]) -> str:
    """Markdown, with the counts first."""
    passed = [row for row in rows if not row.failed]
    shared, cached = ([row for row in passed if row.path.startswith(x)] for x in ("shared prefix", "cached replay"))
    summary = (
        f"Of {len(rows)} model types {len(passed)} pass every step, {len(shared)} of them on the shared prefix and "
        f"{len(cached)} by cached replay."
    )
    version = ".".join(transformers_version.split(".")[:2])
    lines = [
        HEADER.format(version=version, summary=summary).rstrip(),
        "",
        "| model type | path | difference from replay | LoRA | notes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        difference = "" if row.difference is None else f"{row.difference:.0e}"
        lora = "no" if row.failed else "yes"
        note = f"**{row.failed}**: {row.note.replace('|', '/')}" if row.failed else f"`{row.note}`"
        lines.append(f"| {row.model_type} | {row.path} | {difference} | {lora} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("-v", action="store_true", help="print the traceback of each failure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _too_slow)
    rows = []
    for model_type in arguments.types:
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(examine(model_type, Path(folder)))
        print(rows[-1], flush=True)
    if arguments.output:
        arguments.output.write_text(table(rows))


if __name__ == "__main__":
    main()
