"""Thoughts that vLLM draws, by TRL's own client: a stand-in for its server generates with the weights that it was sent."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from trl_quietstar.learning.experience import StepPart
from trl_quietstar.model.adapters import base_of
from trl_quietstar.text.batch import Positions, Text
from trl_quietstar.text.positions import positions_at
from trl_quietstar.thinking.drawing import SamplingSettings, thought_end
from trl_quietstar.thinking.sampling import ThoughtSampler
from trl_quietstar.training.checks import check_engine_options
from trl_quietstar.training.rollouts import cut, prefixes

from .engines import Run
from .rollout_server import _LLM, Engine, Server, stand_in, turns_with_vllm
from .servers import free_port
from .tiny import byte_tokenizer, exact, generators, mixed_text, randomize
from .training import (
    LORA,
    Gradients,
    assert_same_state,
    log_of,
    logged,
    plain_model,
    saved_model,
    tiny_args,
    tiny_trainer,
)


TOKENIZER = byte_tokenizer()
TEXT = dict(thought_format="text", thought_start_text=" plus", thought_end_text="1", thought_prompt="0 plus ")
ASKED = dict(
    **TEXT,
    thought_positions="prompt_end",
    talk_length="completion",
    reward_prediction="thought",
    advantage_baseline="leave_one_out",
    thought_length=6,
    top_k=1,
)
MODES = dict(use_vllm=True, vllm_mode="server", vllm_server_timeout=0.0)


def data(count: int = 16) -> Dataset:
    """Questions with answers of unequal lengths."""
    pairs = [(i % 7, i % 5 * 9) for i in range(count)]
    return Dataset.from_dict(
        {"prompt": [f"{a} plus {b} is" for a, b in pairs], "completion": [f" {a + b} ." for a, b in pairs]}
    )


@pytest.fixture
def serve(monkeypatch):
    """Starts a server whose model has other weights than any that is trained; returns it and the options to train by it."""
    stand_in(monkeypatch)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # TRL sets them for `colocate`; they are taken out again
        monkeypatch.delenv(name)
    servers = []

    def start(dtype: torch.dtype = torch.float32, fixed: list[int] | None = None):
        model = plain_model().to(dtype)
        randomize(model, seed=5)
        server = Server(Engine(exact(model) if dtype == torch.float64 else model, TOKENIZER, fixed))
        servers.append(server)
        return server, dict(**MODES, vllm_server_base_url=server.url, vllm_group_port=free_port())

    yield start
    for server in servers:
        server.shutdown()


def exact_plain():
    """A plain model that computes in float64 throughout."""
    return exact(plain_model().to(torch.float64))


def sent(server: Server) -> dict[str, torch.Tensor]:
    return dict(server.engine.model.named_parameters())


def test_training_is_that_by_our_own_thoughts(serve, tmp_path):
    """Thoughts of the most likely tokens are the ones that we draw, at every step, and gradients and weights are those of our own
    thoughts by replay to 1e-9: the server draws with the weights of each step."""
    server, by_server = serve(torch.float64)
    runs = []
    for options in (by_server, dict(thought_path="replay", single_pass=False)):
        gradients = Gradients()
        trainer = tiny_trainer(
            tmp_path, exact_plain(), data(), callbacks=[gradients], learning_rate=3e-2, **{**ASKED, **options}
        )
        thoughts = []
        sample = trainer.thinker.sample
        trainer.thinker.sample = lambda *args, sample=sample, thoughts=thoughts: (
            thoughts.append(sample(*args)) or thoughts[-1]
        )
        trainer.train()
        runs.append((trainer, gradients.steps, thoughts))
    (ours, mine, drawn), (oracle, theirs, expected) = runs
    assert server.engine.syncs == 3 and len(drawn) == len(expected) == 3
    for one, other in zip(drawn, expected, strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.mask, other.mask)
    for step, other in zip(mine, theirs, strict=True):
        assert step.keys() == other.keys()
        for name, gradient in other.items():
            torch.testing.assert_close(step[name], gradient, rtol=1e-9, atol=1e-9, msg=name)
    for name, entry in logged(oracle)[-1].items():
        if name.startswith("rl/") and "second" not in name and entry is not None:
            assert logged(ours)[-1][name] == pytest.approx(entry, rel=1e-7, abs=1e-9), name


def test_thoughts_are_of_the_weights_that_were_sent(serve, tmp_path):
    """At another step other weights are sent, and draw the thoughts that we would draw; until then the old ones draw."""
    _, by_server = serve()
    trainer = tiny_trainer(tmp_path, None, data(), **{**ASKED, **by_server})
    thinker, rows, words = trainer.thinker, list(range(6)), []
    thinker.begin_run()
    text = thinker.text(trainer.data_collator([trainer.train_dataset[i] for i in rows]))
    for step, seed in ((0, 7), (0, 8), (1, 8)):
        randomize(trainer.model, seed)
        words.append(thinker.texts(thinker.sample(text, StepPart(rows, step=step, training=True))))
    ours = thinker.texts(thinker.sample(text, StepPart(rows, training=False)))
    assert words[0] == words[1] != words[2] == ours


def test_weights_are_sent_once_a_step(serve, tmp_path):
    """Before the first thoughts of each optimizer step, all of the plain model's and none of the heads'; a second run sends its own."""
    server, by_server = serve()
    trainer = tiny_trainer(
        tmp_path, None, data(), **{**ASKED, **by_server}, gradient_accumulation_steps=2, max_steps=1
    )
    trainer.train()
    assert server.engine.syncs == 1 and len(server.engine.prompts) == 2 * 4 * 2  # batches, rows, thoughts
    before = {name: value.clone() for name, value in sent(server).items()}
    trainer.train()  # from step 0 again, where the weights are not those of the first run
    assert server.engine.syncs == 2
    changed = [name for name, value in sent(server).items() if not torch.equal(value, before[name])]
    assert len(changed) > 10
    own = dict(base_of(trainer.model).named_parameters())
    assert set(sent(server)) == {name for name in own if not name.startswith("quietstar.")}


def test_what_is_asked(serve, tmp_path):
    """The text up to the end of its prompt, the prompt of a thought, and its start, each `num_thoughts` times; by the sampling settings
    of the curriculum's stage."""
    server, by_server = serve()
    stages = {"1": {"thought_length": 2, "temperature": 0.5, "num_thoughts": 3}}
    drawn = dict(top_k=7, top_p=0.9, min_p=0.1, thought_suppress_tokens=[5])
    tiny_trainer(tmp_path, None, data(4), **{**ASKED, **by_server, **drawn}, curriculum=stages, max_steps=2).train()
    own = dict(top_k=7, top_p=0.9, min_p=0.1, logit_bias={"5": -100.0}, stop=["1"], stop_token_ids=[0])
    for asked, stage in ((server.engine.asked[0], (6, 1.0, 2)), (server.engine.asked[-1], (2, 0.5, 3))):
        assert {name: asked[name] for name in own} == own
        assert (asked["max_tokens"], asked["temperature"], asked["n"]) == stage
    del server.engine.prompts[4 * 2 :]  # of the first step
    opening = TOKENIZER("0 plus ")["input_ids"] + TOKENIZER(" plus")["input_ids"]
    expected = [TOKENIZER(prompt)["input_ids"] + opening for prompt in data(4)["prompt"] for _ in range(2)]
    assert sorted(server.engine.prompts) == sorted(expected)


def test_a_turn_that_asks_is_sent(serve, tmp_path):
    """In its place in the conversation, as the chat template renders it."""
    template = (
        "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    tokenizer, (server, by_server) = byte_tokenizer(chat_template=template), serve()
    rows = {"prompt": [[{"role": "user", "content": "3 plus 4"}]] * 4}
    rows["completion"] = [[{"role": "assistant", "content": " is 7"}]] * 4
    options = {**ASKED, **by_server, "thought_prompt_role": "system"}
    tiny_trainer(tmp_path, None, Dataset.from_dict(rows), tokenizer=tokenizer, **options, max_steps=1).train()
    turns = [*rows["prompt"][0], {"role": "system", "content": "0 plus "}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + " plus"
    assert server.engine.prompts == [tokenizer(expected)["input_ids"]] * 8


def test_sampled_thoughts(serve, tmp_path):
    """At temperature 1 the thoughts of a group differ, end by their string or at their length, and hold no suppressed token."""
    server, by_server = serve()
    suppressed = [5, 9, 17, 33]
    options = {**ASKED, **by_server, "top_k": 0, "thought_suppress_tokens": suppressed, "num_thoughts": 4}
    trainer = tiny_trainer(tmp_path, None, data(), **options, max_steps=2)
    thoughts, own = [], trainer.thinker.sample
    trainer.thinker.sample = lambda *args: thoughts.append(own(*args)) or thoughts[-1]
    trainer.train()
    assert all(entry["grad_norm"] > 0 for entry in logged(trainer)) and len(logged(trainer)) == 2
    said = set()
    for batch in thoughts:
        for tokens, mask in zip(batch.token_ids.flatten(0, 2), batch.mask.flatten(0, 2), strict=True):
            own_tokens = tokens[mask].tolist()
            said.add(tuple(own_tokens))
            text = TOKENIZER.decode(own_tokens)
            assert "1" not in TOKENIZER.decode(own_tokens[:-1]) and 0 not in own_tokens[:-1]
            assert "1" in text or own_tokens[-1] == 0 or len(own_tokens) == 6
            assert not set(own_tokens) & set(suppressed)
    assert len(said) > len(thoughts) * 4


def test_an_adapter_is_merged_and_taken_out_again(serve, tmp_path):
    """The server gets the merged weights under the names of the plain model, and the base stays what it was to the last bit."""
    server, by_server = serve()
    trainer = tiny_trainer(
        tmp_path, None, data(), **{**ASKED, **by_server}, peft_config=LoraConfig(**LORA), learning_rate=1e-2
    )
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    states = []
    trainer.thinker.begin_run()
    engine = trainer.thinker.rollouts.engine
    own = engine.sync_weights
    engine.sync_weights = lambda: states.append(copy.deepcopy(trainer.model)) or own()
    trainer.train()
    assert server.engine.syncs == len(states) == 3
    merged = states[-1].merge_and_unload()
    names = dict(merged.named_parameters())
    for name, value in sent(server).items():
        torch.testing.assert_close(value, names[name], rtol=0, atol=1e-7, msg=name)
    assert any(bool(p.any()) for name, p in trainer.model.named_parameters() if "lora_B" in name)
    for name, p in trainer.model.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name]), name


def test_a_run_goes_on_from_a_checkpoint(serve, tmp_path):
    """With thoughts of the most likely tokens, exactly: the weights of the checkpoint are sent before its first thoughts."""
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        server, by_server = serve()
        options = {**ASKED, **by_server, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = tiny_trainer(tmp_path, None, data(), **options)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
        assert server.engine.syncs == (4 if resume is None else 2)
    assert_same_state(runs[0].model, runs[1].model)
    assert log_of(runs[0], after=2) == log_of(runs[1], after=2)


def test_in_this_process(serve, tmp_path):
    """`colocate` trains as the server does: the same thoughts, the same log."""
    model, server_and_options = saved_model(tmp_path / "model"), serve()
    own = dict(use_vllm=True, vllm_max_model_length=64, vllm_gpu_memory_utilization=0.2)
    runs = [
        tiny_trainer(tmp_path, model, data(), **{**ASKED, **options}, max_steps=2)
        for options in (server_and_options[1], own)
    ]
    for trainer in runs:
        trainer.train()
    assert log_of(runs[0]) == log_of(runs[1])
    assert _LLM.last.options == {"max_model_len": 64, "gpu_memory_utilization": 0.2}
    assert _LLM.last.engine.syncs == 2
    plain = AutoModelForCausalLM.from_pretrained(model)
    assert any(
        not torch.equal(p, q) for p, q in zip(_LLM.last.engine.model.parameters(), plain.parameters(), strict=True)
    )


LORA_RUN = dict(peft_config=LoraConfig(**LORA), learning_rate=1e-2)


@pytest.mark.parametrize("changes", [{}, pytest.param(LORA_RUN, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_two_processes_are_one(changes, serve, tmp_path):
    """The main process asks for both, whose rows have unequal numbers of prompts; log and weights are those of one process, with whole
    weights and with sharded ones. These layers run equally often in groups of thoughts, of which both have as many."""
    runs, asked = {}, {}
    for engine in ("one", "ddp", "fsdp2"):
        server, by_server = serve()
        options = {**ASKED, **by_server, "thought_prompt": None, "branch_batch_size": 2, **changes}
        sources = dict(data=turns_with_vllm, evaluation=turns_with_vllm)
        runs[engine] = Run(engine, tmp_path / engine, max_steps=2, **sources, **options)
        assert server.engine.syncs == 2
        asked[engine] = {tuple(prompt) for prompt in server.engine.prompts}
    oracle = runs.pop("one")
    for engine, run in runs.items():
        assert run.type.startswith({"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}[engine])
        # the start alone, in place of prompts that one of them lacks
        assert (
            asked[engine] - asked["one"] == {tuple(TOKENIZER(" plus")["input_ids"])} and asked["one"] <= asked[engine]
        )
        for ours, expected in zip(run.history, oracle.history, strict=True):
            for name, value in expected.items():
                if name.startswith("rl/") and "second" not in name and value is not None:
                    assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        for name, weight in run.weights().items():
            torch.testing.assert_close(weight, oracle.weights()[name], rtol=0, atol=2e-6, msg=name)


# What comes back


def test_prefixes_are_those_of_a_positions_own_document():
    """Padded on either side, and packed."""
    ids = torch.arange(1, 19).view(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 0], [0, 0, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]])
    chosen = torch.zeros(3, 5, dtype=torch.bool)
    chosen[0, 2] = chosen[1, 2] = chosen[1, 4] = chosen[2, 1] = chosen[2, 4] = True
    found = prefixes(Text.from_batch(ids, mask, position_ids=position_ids), positions_at(chosen))
    assert found == [[1, 2, 3], [9], [9, 10, 11], [13, 14], [16, 17]]


def test_processes_have_as_many_positions():
    """Those that are added exist in no row: sharded layers run as often on one process as on the other."""
    text = mixed_text()
    own, padded = (
        ThoughtSampler(SamplingSettings(4), generators(text), "all", greatest=greatest).positions(text)
        for greatest in (int, lambda count: count + 2)
    )
    assert padded.index.shape[1] == own.index.shape[1] + 2
    assert torch.equal(padded.mask[:, :-2], own.mask) and not padded.mask[:, -2:].any()


def settings_of(**changes) -> SamplingSettings:
    stop = thought_end(TOKENIZER, "1")
    return SamplingSettings(**{"thought_length": 4, "num_thoughts": 2, "stop": stop, **changes})


ONE = TOKENIZER("1")["input_ids"][0]
PLACES = Positions(torch.tensor([[1, 3], [2, 0]]), torch.tensor([[True, True], [True, False]]))


def test_thoughts_are_cut_where_we_end_them():
    """After the string or EOS, though more came back, and at `thought_length`; none where there is no position."""
    written = [[5, ONE], [5, 6, 7, 8, 9], [5, 0, 7, 8], [ONE, ONE, 5], [5, 6, 7, ONE], [0]]
    thoughts = cut(written, PLACES, settings_of())
    found = [t[m].tolist() for t, m in zip(thoughts.token_ids.flatten(0, 2), thoughts.mask.flatten(0, 2), strict=True)]
    assert found == [[5, ONE], [5, 6, 7, 8], [5, 0], [ONE], [5, 6, 7, ONE], [0], [], []]
    assert torch.equal(thoughts.host_mask, thoughts.mask) and thoughts.mask.shape == (2, 2, 2, 4)
    nothing = Positions(PLACES.index, torch.zeros_like(PLACES.mask))
    assert not cut([], nothing, settings_of()).mask.any()


def test_a_thought_that_comes_back_too_short_is_refused():
    """The server ran out of room, say; we would have gone on."""
    with pytest.raises(
        RuntimeError, match=r"ended a thought after 3 tokens, .*`thought_length` \(4\); let it read more"
    ):
        cut([[5, ONE], [5, 6, 7], *[[ONE]] * 4], PLACES, settings_of())


@pytest.mark.parametrize("token", [5, len(TOKENIZER)])
def test_a_token_that_no_thought_may_hold_is_refused(token, serve, tmp_path):
    """By a server that does not follow `logit_bias`, or has another model."""
    _, by_server = serve(fixed=[3, token, ONE])
    trainer = tiny_trainer(tmp_path, None, data(), **{**ASKED, **by_server}, thought_suppress_tokens=[5])
    with pytest.raises(RuntimeError, match=f"drew the token {token}, which is in `thought_suppress_tokens` or beyond"):
        trainer.train()


# What is refused


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(thought_format="embeddings"), "`thought_format` is 'embeddings': a learned embedding is no token"),
        (dict(reward_prediction="mixed"), "`reward_prediction` is 'mixed': a plain model has no mixing head"),
        (dict(thought_positions="all"), "`thought_positions` is 'all': the model thinks inside its text"),
        (dict(thought_positions="none"), "`thought_positions` is 'none': the model never thinks"),
        (dict(curriculum={"2": {"thought_positions": 3}}), "`thought_positions` is 3: the model thinks inside"),
        (dict(min_thought_length=2), "`min_thought_length` is 2: before so many tokens"),
        (dict(single_pass=True), "`single_pass` is True: thoughts are not sampled in the forward"),
        (dict(temperature=0.005), "`temperature` is 0.005, and vLLM draws at 0.01 to 2"),
        (dict(temperature=2.5), "`temperature` is 2.5, and vLLM draws at 0.01 to 2"),
        (dict(vllm_mode="remote"), "`vllm_mode` is 'remote'; choose one of colocate, server"),
        (
            dict(vllm_gpu_memory_utilization=0.5),
            "`vllm_gpu_memory_utilization=0.5` is for thoughts that vLLM draws in the mode 'colocate'; set",
        ),
        (
            dict(use_vllm=False),
            "`vllm_mode='server'` is for thoughts that vLLM draws in the mode 'server'; set `use_vllm=True` and `vllm_mode='server'`",
        ),
        (
            dict(vllm_mode="colocate", vllm_server_base_url="http://localhost:1"),
            "`vllm_server_base_url='http://localhost:1'` is for thoughts that vLLM draws in the mode 'server'",
        ),
    ],
    ids=str,
)
def test_what_vllm_cannot_draw_is_refused(changes, says, tmp_path):
    """By the options, before anything is loaded."""
    with pytest.raises(ValueError, match=re.escape(says)):
        tiny_args(tmp_path, **{**ASKED, "use_vllm": True, "vllm_mode": "server", **changes})


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_vllm_must_be_installed(mode, tmp_path):
    """TRL's client imports it even where a server runs elsewhere."""
    with pytest.raises(ImportError, match=f"needs vLLM here, also with `vllm_mode='{mode}'`, and it is not installed"):
        tiny_trainer(tmp_path, None, data(), **ASKED, use_vllm=True, vllm_mode=mode)


def test_whole_weights_are_sent(serve, tmp_path):
    """Not those of a quantized model, which merging an adapter would round anew; nor those that ZeRO-3 has partitioned."""
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    _, by_server = serve()
    quantized = dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True), peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="would round the weights of a quantized one anew; load it without"):
        tiny_trainer(tmp_path, saved_model(tmp_path / "model"), data(), **{**ASKED, **by_server}, **quantized)
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    accelerator = SimpleNamespace(state=state, is_fsdp2=False)
    with pytest.raises(ValueError, match="not tried with weights that ZeRO-3 has partitioned; take DDP or FSDP2"):
        check_engine_options(tiny_args(tmp_path, **{**ASKED, **by_server}), accelerator, (None, None))


def test_weights_go_from_a_gpu(monkeypatch, serve, tmp_path):
    """A server takes weights by NCCL, which TRL's client says; and a server must be there."""
    _, by_server = serve()
    stand_in(monkeypatch, sends_from_cpu=False)
    trainer = tiny_trainer(tmp_path, None, data(), **{**ASKED, **by_server})
    with pytest.raises(ValueError, match="sends weights from a CUDA device, and this run is on 'cpu'"):
        trainer.train()
    away = {**by_server, "vllm_server_base_url": "http://127.0.0.1:9"}
    with pytest.raises(OSError, match="can't be reached at http://127.0.0.1:9 after 0.0 seconds"):
        tiny_trainer(tmp_path, None, data(), **{**ASKED, **away}).train()


def test_evaluation_draws_its_own_thoughts(serve, tmp_path):
    """By their keys, so that evaluations compare; no server is asked, nor looked for."""
    server, by_server = serve()
    options = dict(evaluation=data(8), **{**ASKED, "top_k": 0})
    ours = tiny_trainer(tmp_path, None, data(), **{**options, **by_server}).evaluate()
    own = tiny_trainer(tmp_path, None, data(), **options).evaluate()
    assert not server.engine.prompts
    same = [name for name in ours if "time" not in name and "second" not in name]
    assert len(same) > 8 and [ours[name] for name in same] == pytest.approx([own[name] for name in same], rel=1e-5)
