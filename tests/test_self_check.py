"""The start-up check: the fast path where it is exact, replay where it is not, never a silent mistake."""

import logging
import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    GPTNeoConfig,
    MambaConfig,
    MptConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.branches import interface
from trl_quietstar.branches.attention import BranchReading
from trl_quietstar.branches.cached_replay import CachedReplay
from trl_quietstar.branches.masked_prefix import MaskedPrefix
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix, SharedPrefixCache
from trl_quietstar.thinking.check import TOLERANCES, choose_path, path_difference
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .conformance import tiny_model as family_model
from .tiny import FAMILIES, exact_model, mixed_text, randomize, sampling, think, tiny_model
from .training import saved_model, tiny_trainer


SILENTLY_WRONG = {
    "gpt_neo": lambda **size: GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=5,
        max_position_embeddings=128,
        **size,
    ),
    "mpt": lambda **size: MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=128, **size),
    "mamba": lambda **size: MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **size),
    "bloom": lambda **size: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **size),
}


def stubborn_model(name: str, vocab_size: int = 97, seeded: bool = True):
    """A model whose attention, or recurrence, does not take the mask it is given."""
    config = SILENTLY_WRONG[name](vocab_size=vocab_size, eos_token_id=0, bos_token_id=0, pad_token_id=0)
    model = QuietStarForCausalLM.from_config(config, QuietStarSettings(value_head_hidden_size=16)).eval()
    if seeded:
        randomize_matrices(model)
    return model


@torch.no_grad()
def randomize_matrices(model) -> None:
    """As `randomize`, but for recurrent parameters, whose signs matter."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "A_log" not in name:
            parameter.mul_(0.4 / parameter.std().clamp(min=1e-3))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fast_path_is_chosen_where_it_is_exact(name, caplog):
    """Every common family runs by shared prefix, without a warning, well within the tolerance."""
    model = tiny_model(name)
    with caplog.at_level(logging.WARNING, "trl_quietstar"):
        assert isinstance(choose_path(model), SharedPrefix)
    assert not caplog.records
    assert path_difference(model, SharedPrefix()) < TOLERANCES[torch.float32] / 5


@pytest.mark.parametrize("name", ["gpt_neo", "mpt", "mamba"])
def test_replay_is_chosen_where_masks_are_ignored(name, caplog):
    """A model that ignores the mask falls back to replay, and the warning gives the measured difference."""
    model = stubborn_model(name)
    with caplog.at_level(logging.WARNING, "trl_quietstar"):
        assert isinstance(choose_path(model), Replay)
    (record,) = (record for record in caplog.records if record.name.startswith("trl_quietstar"))
    assert "replay" in record.getMessage()
    measured = re.search(r"differs from ordinary forwards by (\S+) relative|fails with \w+Error", record.getMessage())
    assert measured, record.getMessage()
    if measured[1]:
        assert float(measured[1]) > TOLERANCES[torch.float32]


def test_the_warning_gives_the_difference_of_gpt_neo(caplog):
    """The number in the warning is the one the check measures."""
    model = stubborn_model("gpt_neo")
    with caplog.at_level(logging.WARNING, "trl_quietstar"):
        choose_path(model)
    assert f"{path_difference(model, MaskedPrefix()):.1e}" in caplog.text


@pytest.mark.parametrize("name", ["gpt_neo", "bloom"])
def test_a_path_asked_for_by_name_is_never_wrong(name):
    """`thought_path="shared_prefix"` is an error where it is not exact, not a wrong number."""
    with pytest.raises(ValueError, match=r"not exact on this model.*thought_path='auto'"):
        choose_path(stubborn_model(name), "shared_prefix")


def test_replay_can_be_asked_for():
    """`thought_path="replay"` is taken also where the shared prefix would do."""
    assert isinstance(choose_path(tiny_model(), "replay"), Replay)


@pytest.mark.parametrize("wanted", ["auto", "replay"])
def test_a_model_that_reads_both_ways_is_refused(wanted):
    """A causal LM head on an encoder: replay would run, and be silently wrong."""
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    model = QuietStarForCausalLM.from_config(BertConfig(**shape, is_decoder=False))
    randomize(model)
    with pytest.raises(ValueError, match=r"QuietStarBert\w+ cannot think.*left to right.*is_decoder=True"):
        choose_path(model, wanted)


def test_the_check_leaves_the_model_as_it_was():
    """Training mode, weights, gradients and the random state survive the check."""
    model = tiny_model().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    choose_path(model)
    assert model.training
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


class EarlyAnchor(SharedPrefix):
    """Branches miss the last token of their text."""

    def encode(self, model, text, branches, batch_size=None, cache=None):
        return super().encode(model, text, replace(branches, anchors=(branches.anchors - 1).clamp(min=0)))


class LeakingDocuments(SharedPrefix):
    """Packed documents see each other."""

    def encode(self, model, text, branches, batch_size=None, cache=None):
        return super().encode(model, replace(text, document_ids=text.attention_mask.long()), branches)


class CountedGaps(SharedPrefix):
    """Slots after a thought that ended early keep their old positions and see what it left out."""

    def encode(self, model, text, branches, batch_size=None, cache=None):
        return super().encode(model, text, replace(branches, mask=torch.ones_like(branches.mask)))


class WiderWindow(MaskedPrefix):
    """Sliding windows are one token too wide."""

    def encode(self, model, text, branches, batch_size=None, cache=None):
        model.config.sliding_window += 1
        try:
            return super().encode(model, text, branches)
        finally:
            model.config.sliding_window -= 1


class WiderBranchWindow(SharedPrefix):
    """The same for branches alone."""

    def encode(self, model, text, branches, batch_size=None, cache=None):
        attend = BranchReading.attend
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                BranchReading,
                "attend",
                lambda *args, sliding_window, **kwargs: attend(*args, sliding_window=sliding_window + 1, **kwargs),
            )
            return super().encode(model, text, branches)


class WholeDocument(SharedPrefix):
    """Branches see the token after their anchor."""

    class Cache(SharedPrefixCache):
        def seen_text(self, anchors, *rest):
            last = (anchors + 1).clamp(max=self.text.input_ids.shape[1] - 1)
            return replace(super().seen_text(anchors, *rest), last=last)

    def read(self, model, text):
        return self.Cache(model, text)


class WiderChunk(MaskedPrefix):
    """Chunks of attention begin one token late."""

    def encode(self, model, text, branches, batch_size=None, cache=None):
        model.config.attention_chunk_size += 1
        try:
            return super().encode(model, text, branches)
        finally:
            model.config.attention_chunk_size -= 1


class LateCache(SharedPrefix):
    """Thoughts are sampled as if after the token before; scoring is right."""

    class Cache(SharedPrefixCache):
        def extend(self, anchors, embeds):
            return super().extend((anchors - 1).clamp(min=0), embeds)

    def read(self, model, text):
        return self.Cache(model, text)


@pytest.mark.parametrize(
    "wrong", [EarlyAnchor, LeakingDocuments, CountedGaps, WiderWindow, WiderBranchWindow, WholeDocument, LateCache]
)
def test_the_check_sees_small_mistakes(wrong):
    """Being off by one token anywhere, in scoring or in sampling, exceeds the tolerance by far."""
    assert path_difference(tiny_model("mistral-window"), wrong()) > 10 * TOLERANCES[torch.float32]


def test_the_check_sees_a_wrong_chunk():
    """Llama 4 attends within chunks, cut by true position."""
    model = family_model("llama4_text")
    assert path_difference(model, MaskedPrefix()) < TOLERANCES[torch.float32] / 10
    assert path_difference(model, WiderChunk()) > 10 * TOLERANCES[torch.float32]


class NotANumber(SharedPrefix):
    """One branch overflows."""

    def encode(self, model, text, branches, batch_size=None, cache=None):
        encoded = super().encode(model, text, branches)
        return replace(encoded, branches=encoded.branches.index_fill(1, torch.tensor([0]), torch.nan))


def test_the_check_sees_overflow():
    """NaN anywhere is not agreement."""
    assert math.isnan(path_difference(tiny_model(), NotANumber()))


@pytest.mark.parametrize("name", ["gpt_neo", "mpt"])
def test_replay_is_right_on_such_models(name):
    """By replay the thought's log-probability is that of an ordinary forward."""
    model, text = stubborn_model(name), mixed_text()
    thoughts = think(model, text, Replay(), settings=sampling(min_thought_length=None, stop=None))
    embed = model.get_input_embeddings()
    with torch.no_grad():
        scores = score(model, ScoreRequest(text, thoughts, 3, Replay()))
        for at in (2, 9):
            tokens = thoughts.token_ids[0, at, 0]
            row = torch.cat(
                [embed(text.input_ids[0, : at + 1]), model.quietstar.start_embedding[None], embed(tokens[:-1])]
            )
            logits = model(inputs_embeds=row[None]).logits[0, at + 1 :]
            logps = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(scores.thought_logps[0, at, 0], logps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt_neo", "mamba"])
def test_such_models_train(name, tmp_path):
    """The trainer takes a model that needs replay, and its steps are finite."""
    model = stubborn_model(name, vocab_size=300, seeded=False)
    trainer = tiny_trainer(tmp_path, model, max_steps=1, value_head_hidden_size=16)
    assert isinstance(trainer.path, Replay)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


def test_float64_meets_its_own_tolerance():
    """In float64 the paths agree to 1e-9, and the check asks for that."""
    assert path_difference(exact_model(), SharedPrefix()) < TOLERANCES[torch.float64]


def attention_without_masks(module, query, key, value, attention_mask, **kwargs):
    """What flash attention computes, in whose kernels no mask is known but that of padding."""
    assert attention_mask is None or attention_mask.dim() == 2, "flash attention takes no such mask"
    if attention_mask is not None:
        attention_mask = attention_mask.bool()[:, None, None].expand(-1, -1, key.shape[2], -1).tril()
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def test_flash_attention_gives_way_to_sdpa(monkeypatch, caplog):
    """A model that was loaded with it thinks by the fast path, and says by what it attends."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attention_without_masks)
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"  # as where its kernels are installed
    ids = torch.arange(12)[None] % 7
    before = model(input_ids=ids).logits
    with caplog.at_level(logging.WARNING, "trl_quietstar"):
        assert type(choose_path(model)) is SharedPrefix
    (record,) = (record for record in caplog.records if record.name.startswith("trl_quietstar"))
    assert "attends by `sdpa` instead of `flash_attention_2`" in record.getMessage()
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_an_attention_without_masks_stays_where_nothing_branches(monkeypatch):
    """Replay needs none, and leaves the model's attention alone; so does a path that was only tried."""
    name = "paged_in_this_test"
    monkeypatch.setitem(AttentionInterface._global_mapping, name, attention_without_masks)
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, name, lambda *args, attention_mask=None, **kwargs: attention_mask)
    model = tiny_model("llama", attn_implementation=name)
    assert interface.enable(model) and model.config._attn_implementation == "quietstar_sdpa"
    interface.disable(model)
    assert model.config._attn_implementation == name
    assert isinstance(choose_path(model, "replay"), (Replay, CachedReplay))
    assert model.config._attn_implementation == name


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=["cuda", "mps", "cpu", "fault"],
)
def test_faults_of_the_device_are_raised(error):
    """They say nothing about a path, and training would end in them too."""
    model = tiny_model("llama")

    def fails(*args, **kwargs):
        raise error

    model.model.layers[1].mlp.register_forward_hook(fails)
    with pytest.raises(type(error)) as raised:
        choose_path(model)
    assert raised.value is error


def test_a_model_on_several_devices_is_refused(tmp_path):
    """By the name of the argument that put it there, in the trainer and wherever it thinks."""
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    folder = saved_model(tmp_path / "model", tie_word_embeddings=False)
    options = dict(device_map={**places, "lm_head": "cpu"}, offload_folder=str(tmp_path / "disk"))
    for model in (AutoModelForCausalLM.from_pretrained(folder, **options), folder):
        with pytest.raises(ValueError, match="`device_map` spread the model over cpu, disk"):
            tiny_trainer(tmp_path / "out", model, model_init_kwargs=options if model is folder else None)
    with pytest.raises(ValueError, match="`device_map` spread the model over cpu, disk"):
        QuietStarForCausalLM.from_pretrained(folder, **options).log_likelihoods(torch.tensor([[1, 2, 3]]))
