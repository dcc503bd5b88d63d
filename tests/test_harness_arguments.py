"""lm-eval's own model and the thinking one take the same arguments: each is followed, or refused by its name."""

import inspect
import json

import pytest
import torch


pytest.importorskip("lm_eval", reason="needs `pip install trl-quietstar[eval]`")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.evaluation.harness import OF_LOADING, REFUSED, QuietStarLM
from trl_quietstar.model.adapters import base_of
from trl_quietstar.thinking.when import Thinking

from .tiny import byte_tokenizer
from .training import saved_model, tiny_trainer


TEXT = " ".join(f"{a} plus {a + 3} is {2 * a + 3} ." for a in range(20))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A plain model of 48 positions."""
    return saved_model(tmp_path_factory.mktemp("base"), max_position_embeddings=48)


@pytest.fixture(scope="module")
def thinker(base, tmp_path_factory) -> str:
    """The same with heads, whose thoughts change what it says."""
    folder = tmp_path_factory.mktemp("thinker")
    model = QuietStarForCausalLM.from_pretrained(base, QuietStarSettings(3))
    with torch.no_grad():
        model.quietstar.mixing_head.bias.fill_(1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    """A plain adapter of the base, without heads, that matters."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return str(folder)


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    """Requests of lm-eval."""
    return [Instance(kind, {}, pair, i, task_name="task", doc_id=i) for i, pair in enumerate(arguments)]


CHOICES = [(f"{a} plus 4 is", f" {a + b} .") for a in range(4) for b in (3, 4)]


def read(lm) -> float:
    """Log-likelihood of a text of several windows."""
    return lm.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,)))[0]


def scored(lm) -> list[float]:
    """Log-likelihoods of choices."""
    return [total for total, _ in lm.loglikelihood(asked("loglikelihood", *CHOICES))]


def written(lm) -> list[str]:
    """Generated text."""
    options = {"until": ["."], "max_gen_toks": 6}
    return lm.generate_until(asked("generate_until", *((c, options) for c, _ in CHOICES[:3])))


def test_every_token_of_a_long_text_is_read_once(thinker):
    """Where no thought is written, windows of any length give what lm-eval's own model gives for them."""
    silent = Thinking("adaptive", threshold=1.0)  # no prediction is that uncertain
    for size in (7, 20, 40):
        ours = QuietStarLM(thinker, think=silent, max_length=size, batch_size=3)
        assert ours.max_length == size
        assert read(ours) == pytest.approx(read(HFLM(thinker, device="cpu", max_length=size)), rel=1e-5)
    thinking = QuietStarLM(thinker)
    assert thinking.max_length == 48 - 3 - 2  # a thought fits before the last token
    assert read(thinking) != pytest.approx(read(QuietStarLM(thinker, think=silent, max_length=43)), rel=1e-3)
    assert QuietStarLM(thinker, max_length=48).max_length == 43
    windows = []
    score = thinking._score
    thinking._score = lambda requests: windows.extend(requests) or score(requests)
    read(thinking)
    assert [token for *_, continuation in windows for token in continuation] == byte_tokenizer()(TEXT)["input_ids"]


def test_a_continuation_that_does_not_fit_is_refused(thinker):
    """lm-eval stops there too; a part of it would pass for the whole."""
    with pytest.raises(
        ValueError, match="A continuation has .* tokens, and with a thought the model scores 43 at most"
    ):
        QuietStarLM(thinker).loglikelihood(asked("loglikelihood", ("1", TEXT)))


# values of lm-eval's arguments under which a plain model gives something else, or the same where nothing should change
FOLLOWED = {
    "tokenizer": None, "truncation": True, "logits_cache": False, "max_length": 30, "device": "cpu", "dtype": "float64",
    "softmax_dtype": "float32", "mixed_precision_dtype": "bfloat16", "batch_size": 2, "max_batch_size": 3,
    "trust_remote_code": False, "use_fast_tokenizer": True, "add_bos_token": True, "prefix_token_id": 5, "revision": "main",
    "subfolder": "", "peft": None, "think_end_token": "plus", "chat_template_args": {"a": 1}, "enable_thinking": False,
    "max_memory_per_gpu": "1GiB", "max_cpu_memory": "1GiB", "offload_folder": "nowhere", "backend": "causal",
    "pretrained": None,
}  # fmt: skip


def test_every_argument_of_lm_evals_model_is_followed_or_refused(thinker, adapter):
    """Without thoughts the numbers are those of lm-eval's own model with the same argument."""
    known = {name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")}
    assert known - set(FOLLOWED) - set(REFUSED) == set()
    assert set(OF_LOADING) <= known
    values = {**FOLLOWED, "tokenizer": AutoTokenizer.from_pretrained(thinker, padding_side="left"), "peft": adapter}
    for name, value in values.items():
        if name in ("pretrained", "backend"):
            continue
        ours, theirs = (
            QuietStarLM(thinker, think="never", **{name: value}),
            HFLM(thinker, **{"device": "cpu", name: value}),
        )
        assert scored(ours) == pytest.approx(scored(theirs), rel=1e-6), name
        assert written(ours) == written(theirs), name
    for name in REFUSED:
        with pytest.raises(ValueError, match=f"`{name}='x'` does not go with a thinking model; leave it out"):
            QuietStarLM(thinker, **{name: "x"})
    with pytest.raises(ValueError, match="`backend='seq2seq'` does not go"):
        QuietStarLM(thinker, backend="seq2seq")
    with pytest.raises(TypeError, match="no_such_key"):
        QuietStarLM(thinker, no_such_key=1)


def test_an_adapter_is_put_on_the_model(thinker, adapter, base, tmp_path):
    """With the model's heads where it has none, and with its own."""
    ours = QuietStarLM(thinker, peft=adapter)
    by_hand = QuietStarForCausalLM.from_pretrained(thinker)
    heads, by_hand.quietstar = by_hand.quietstar, None
    adapted = PeftModel.from_pretrained(by_hand, adapter)
    by_hand.quietstar = heads
    expected = scored(QuietStarLM(adapted.eval(), tokenizer=byte_tokenizer()))
    assert scored(ours) == pytest.approx(expected, rel=1e-6)
    assert scored(ours) != pytest.approx(scored(QuietStarLM(thinker)), rel=1e-3)

    trainer = tiny_trainer(
        tmp_path,
        model=base,
        max_steps=1,
        max_length=20,
        learning_rate=0.1,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    trainer.train()
    trainer.save_model()
    with_heads = QuietStarLM(base, peft=str(tmp_path))
    assert with_heads.thinker.quietstar_settings == base_of(trainer.model).quietstar_settings
    assert scored(with_heads) == pytest.approx(scored(QuietStarLM(str(tmp_path))), rel=1e-6)


def test_a_loaded_model_is_taken_as_it_is(thinker):
    """And what would have to be known before it was loaded is refused; so is a model without heads."""
    model = QuietStarForCausalLM.from_pretrained(thinker)
    assert scored(QuietStarLM(model, tokenizer=byte_tokenizer())) == pytest.approx(
        scored(QuietStarLM(thinker)), rel=1e-6
    )
    with pytest.raises(ValueError, match="`dtype='float16'` does not go with a model that is loaded already"):
        QuietStarLM(model, tokenizer=byte_tokenizer(), dtype="float16")
    with pytest.raises(ValueError, match="LlamaForCausalLM, without heads; load it with `QuietStarForCausalLM"):
        QuietStarLM(AutoModelForCausalLM.from_pretrained(thinker), tokenizer=byte_tokenizer())


@pytest.mark.parametrize("batch_size", ["auto:2", pytest.param("auto", marks=pytest.mark.slow)])
def test_batches_are_as_large_as_fit(batch_size, thinker, monkeypatch):
    """Where memory does not hold a batch, smaller ones; the numbers are those of one by one."""
    lm, sizes = QuietStarLM(thinker, batch_size=batch_size, max_batch_size=8), []
    score = lm._score

    def short_of_memory(requests):
        sizes.append(len(requests))
        if len(requests) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(requests)

    monkeypatch.setattr(lm, "_score", short_of_memory)
    assert scored(lm) == pytest.approx(scored(QuietStarLM(thinker)), rel=1e-4)
    assert max(sizes) > 3 and sizes[-1] <= 3


def test_the_cache_holds_texts_and_choices(thinker, tmp_path):
    """`use_cache` with rolling tasks as with others; what is there is not scored again."""
    pytest.importorskip("sqlitedict")
    lm = QuietStarLM(thinker)
    expected = read(lm), scored(lm), written(lm)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    assert (read(cached), scored(cached), written(cached)) == expected
    lm._score = lm._model_generate = None
    assert (read(cached), scored(cached), written(cached)) == expected


def test_the_models_own_way_to_think_is_the_default(thinker, tmp_path):
    """As the `quietstar` entry says; an argument of lm-eval's command line wins."""
    model = QuietStarForCausalLM.from_pretrained(thinker)
    model.config.quietstar |= {"thought_positions": "prompt_end", "talk_length": "completion"}
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quietstar"]["thought_positions"] == "prompt_end"
    once, always = (
        QuietStarLM(str(tmp_path)),
        QuietStarLM.create_from_arg_string(f"pretrained={tmp_path},think=always"),
    )
    assert once.thinking.mode == "prompt_end" and always.thinking == Thinking()
    tokenizer = byte_tokenizer()
    for (context, continuation), total in zip(CHOICES, scored(once), strict=True):
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        wanted = (torch.arange(ids.shape[1]) >= len(tokenizer(context)["input_ids"])).long()[None]
        assert total == pytest.approx(float(model.eval().log_likelihoods(ids, None, wanted)[0].sum()), rel=1e-5)
    assert scored(once) != pytest.approx(scored(always), rel=1e-3)
