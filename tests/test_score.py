"""A scored part of the completion: what rewards look at, where it comes from in data, and what stays of the whole talk."""

import functools
import math
import re
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.cli import main
from trl_quietstar.data.batches import TextCollator
from trl_quietstar.data.prepare import prepare_texts
from trl_quietstar.data.score import FindScore, last_match
from trl_quietstar.evaluation.anti_theater import SUMS, text_sums
from trl_quietstar.evaluation.inspection import inspect_texts
from trl_quietstar.learning.experience import experience_of, flat, unflat
from trl_quietstar.learning.metrics import BatchResult, run_metrics
from trl_quietstar.learning.objective import LossInputs
from trl_quietstar.learning.rewards import REWARD_TYPES, WEIGHTINGS, talk_weights, thought_rewards
from trl_quietstar.text.batch import Positions, Text, Thoughts, talk_after
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .pages import embedded
from .tiny import byte_tokenizer, exact_model, sampling
from .tokenizers import KINDS
from .training import assert_same_state, log_of, logged, saved_model, tiny_args, tiny_trainer


PROMPT, LENGTHS = 3, (10, 7, 9)
SCORED = torch.zeros(3, 10, dtype=torch.bool)
SCORED[0, 6:8] = SCORED[1, 2:5] = True  # a part within the completion; one that begins in the prompt; none
AT = Positions(torch.tensor([[2, 5, 7], [2, 4, 0], [2, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]]).bool())
M = 7


@functools.cache
def token_ids() -> torch.Tensor:
    """At random, but for some that the model itself would say without thoughts: right predictions, which thoughts may spoil."""
    ids = torch.randint(1, 97, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    model = exact_model()
    with torch.no_grad():
        for at in (4, 6, 9):
            ids[:, at] = model(ids[:, :at]).logits[:, -1].argmax(-1)
    return ids


def batch(scored: torch.Tensor | None = SCORED) -> Text:
    """Three prompts with completions of unequal length."""
    ids = token_ids()
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return Text.from_batch(ids, mask, ids.masked_fill(torch.arange(max(LENGTHS)) < PROMPT, -100), score_mask=scored)


def thoughts() -> Thoughts:
    """Two thoughts of up to three tokens at each position."""
    ids = torch.randint(1, 97, (3, 3, 2, 3), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([[[3, 1]], [[2, 3]], [[1, 2]]])[..., None].expand(3, 3, 2, 1)
    mask = (torch.arange(3) < lengths) & AT.mask[..., None, None]
    return Thoughts(AT, ids * mask, mask)


def judged(folder, text: Text, path=None, **options) -> BatchResult:
    """What the thoughts earn, with their scores."""
    args = tiny_args(folder, talk_length=M, **options)
    scores = score(exact_model(), ScoreRequest(text, thoughts(), M, path or SharedPrefix()))
    experience = experience_of(text, scores, None, args, sampling())
    zero = torch.zeros(())
    return BatchResult(text, scores, experience, zero, {})


def measured(batch: BatchResult, args) -> dict[str, float]:
    """The mean of each metric that is defined."""
    metrics = {name: pair for name, pair in run_metrics(batch, args).items() if pair is not None}
    return {
        name: float((x.detach().double() * mask).sum() / mask.sum())
        for name, (x, mask) in metrics.items()
        if mask.any()
    }


# What rewards look at


def test_the_scored_part_of_a_talk():
    """Tokens of the talk that are labels and scored; by default all that are labels."""
    text = batch()
    talk = talk_after(text, AT, M)
    for b, j in AT.mask.nonzero().tolist():
        places = [int(AT.index[b, j]) + 1 + m for m in range(M)]
        wanted = [PROMPT <= at < LENGTHS[b] and bool(SCORED[b, at]) for at in places]
        assert talk.score_mask[b, j].tolist() == wanted
    assert not talk.score_mask[~AT.mask].any()
    assert torch.equal(text.rows(torch.tensor([2, 0])).score_mask, SCORED[[2, 0]])
    plain = talk_after(batch(None), AT, M)
    assert torch.equal(plain.score_mask, plain.target_mask)
    assert all(torch.equal(getattr(talk, name), getattr(plain, name)) for name in ("token_ids", "target_mask"))


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()], ids=["shared", "replay"])
def test_a_reward_is_by_hand(path, tmp_path):
    """The probability of the scored tokens after a thought, less that without it, by ordinary forwards; to 1e-9."""
    model, text = exact_model(), batch()
    options = dict(reward_type="sequence_probability", reward_prediction="thought", nll_weighting="share")
    scores = score(model, ScoreRequest(text, thoughts(), M, path, prediction="thought"))
    experience = experience_of(text, scores, None, tiny_args(tmp_path, talk_length=M, **options), sampling())
    b, j, at, own = 0, 1, 5, [6, 7]
    embed, heads, ids = model.get_input_embeddings(), model.quietstar, text.input_ids[b]

    def probability(*before: torch.Tensor) -> float:
        rows = torch.cat([embed(ids[: at + 1]), *before, embed(ids[at + 1 : own[-1]])])
        logps = model.lm_head(model.base_model(inputs_embeds=rows[None]).last_hidden_state[0]).log_softmax(-1)
        ahead = len(rows) - own[-1]  # what the branch has more than the text
        return math.exp(sum(logps[ahead + place - 1, ids[place]].item() for place in own))

    with_ = []
    for g in range(2):
        own_thought = thoughts().token_ids[b, j, g][thoughts().mask[b, j, g]]
        with_.append(probability(heads.start_embedding[None], embed(own_thought), heads.end_embedding[None]))
    rewards = [x - probability() for x in with_]
    assert experience.rewards[b, j].tolist() == pytest.approx(rewards, abs=1e-9)
    shares = [2 * x / sum(with_) for x in with_]
    assert experience.talk_weights[b, j].tolist() == pytest.approx(shares, abs=1e-9)


@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_rewards_are_those_of_the_scored_tokens_alone(reward_type, tmp_path):
    """As if no other token were a label; and a talk without a scored token earns 0."""
    text = batch()
    alone = replace(text, labels=text.labels.masked_fill(~SCORED, -100))
    ours, oracle = (judged(tmp_path, x, reward_type=reward_type).experience for x in (text, alone))
    torch.testing.assert_close(ours.rewards, oracle.rewards, rtol=0, atol=1e-12)
    whole = judged(tmp_path, batch(None), reward_type=reward_type).experience
    if reward_type != "binary":  # which may be 0 in both cases
        assert (ours.rewards != whole.rewards).any()
    assert not ours.rewards[0, 2].any() and not ours.rewards[2].any()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_of_the_reader_are_those_of_the_scored_tokens(weighting, tmp_path):
    """By the probability of these tokens; the NLLs themselves stay of the whole talk."""
    ours = judged(tmp_path, batch(), nll_weighting=weighting)
    whole = judged(tmp_path, batch(None), nll_weighting=weighting)
    mask = talk_after(batch(), AT, M).score_mask[:, :, None]
    wanted = talk_weights(ours.scores.talk_logps, mask, ours.experience.rewards, weighting)
    if wanted is None:
        assert ours.experience.talk_weights is None
    else:
        assert torch.equal(ours.experience.talk_weights, wanted)
        assert not torch.equal(wanted, whole.experience.talk_weights)
    args = tiny_args(tmp_path)
    numbers = [LossInputs.of(batch(None), x.scores, x.experience, args) for x in (ours, whole)]
    for name in ("talk_mask", "talk_logps", "reader_logps", "text_mask", "text_logps"):
        assert torch.equal(*(getattr(x, name) for x in numbers))


def test_metrics_are_of_the_scored_tokens(tmp_path):
    """Exact match and accuracy over talks that have scored tokens, useful thoughts over all; the NLLs are of the whole talk."""
    args = tiny_args(tmp_path, useful_gain=0.0)
    ours = judged(tmp_path, batch(), useful_gain=0.0)
    scores, experience = ours.scores, ours.experience
    found, whole = measured(ours, args), measured(judged(tmp_path, batch(None)), args)
    thoughts_ = [(b, j, g) for b, j in AT.mask.nonzero().tolist() for g in range(2)]
    scored = {x: [m for m in range(M) if experience.score_mask[x[0], x[1], 0, m]] for x in thoughts_}
    assert len([x for x in thoughts_ if scored[x]]) == 6 < len(thoughts_) == 14
    exact = [all(scores.talk_correct[x][scored[x]]) for x in thoughts_ if scored[x]]
    right = [bool(correct) for x in thoughts_ for correct in scores.talk_correct[x][scored[x]]]
    gains = [(scores.reader_logps[x] - experience.logps_without[x[0], x[1], 0])[scored[x]].sum() for x in thoughts_]
    assert found["exact_match_with"] == pytest.approx(sum(exact) / 6)
    assert found["accuracy_with"] == pytest.approx(sum(right) / len(right))
    assert found["useful_thoughts"] == pytest.approx(sum(gain > 0 for gain in gains) / 14)
    for name in ("nll_with", "nll_without", "reader_nll", "mixing_weight"):
        assert found[name] == whole[name]
    assert "exact_match_with" not in measured(judged(tmp_path, batch(torch.zeros_like(SCORED))), args)


def test_experience_is_kept_and_read_again(tmp_path):
    """With its scored tokens; a file from before there were any has all talk tokens scored."""
    experience = judged(tmp_path, batch()).experience
    state = flat([experience])
    assert torch.equal(unflat(dict(state))[0].score_mask, experience.score_mask)
    del state["0.score_mask"]
    assert torch.equal(unflat(state)[0].score_mask, experience.talk_mask)


# Evaluation


def test_validation_of_thoughts_is_of_the_scored_tokens():
    """Each condition's sums are over them, and over thoughts that have any."""
    text = batch()
    alone = replace(text, labels=text.labels.masked_fill(~SCORED, -100))
    ours, oracle, whole = (
        dict(
            zip(
                SUMS,
                text_sums(exact_model(), x, thoughts(), M, SharedPrefix(), "mixed", torch.Generator()).T,
                strict=True,
            )
        )
        for x in (text, alone, batch(None))
    )
    assert ours["thoughts"].tolist() == [4, 2, 0] and whole["thoughts"].tolist() == [6, 4, 4]
    assert ours["tokens"].tolist() == [8, 4, 0]
    for name in (
        "tokens",
        "correctness",
        "correctness_squared",
        *(x for x in SUMS if x.startswith(("nll_", "correct_"))),
    ):
        torch.testing.assert_close(ours[name], oracle[name], rtol=1e-9, atol=1e-12)
    assert not torch.equal(ours["nll_real"], whole["nll_real"])


def test_a_page_shows_the_gain_in_scored_tokens():
    """While it gives the NLL of each token of the talk."""
    text = batch()
    scores = score(exact_model(), ScoreRequest(text, thoughts(), M, SharedPrefix()))
    token = inspect_texts(byte_tokenizer(), text, thoughts(), scores)[0]["tokens"][5]
    first = token["thoughts"][0]
    gains = scores.talk_logps[0, 1, 0, :2] - scores.text_logps[0, 5:7]
    assert first["gain"] == pytest.approx(float(gains.detach().mean()), abs=1e-5)
    assert len([nll for nll in first["nll_with"] if nll is not None]) == 4


def test_inspect_scores_by_a_pattern(tmp_path):
    """The gain of each thought is that in the tokens that it finds; a pattern that finds nothing is refused."""
    model, page, name = saved_model(tmp_path / "model"), tmp_path / "page.html", tmp_path / "text.txt"
    name.write_text("3 plus 4 is 7 .")
    flags = ["--model", model, "--text", str(name), "--output", str(page), "--use_cpu", "--talk_length", "completion"]
    assert main(["inspect", *flags, "--thought_length", "2", "--score_pattern", r"is (\d)"]) == 0
    (text,) = embedded(page.read_text("utf-8"))["texts"]
    (at,) = [i for i, token in enumerate(text["tokens"]) if token["piece"] == " 7"]
    for i, token in enumerate(text["tokens"][:-1]):
        for thought in token["thoughts"]:
            wanted = text["tokens"][at]["nll_without"] - thought["nll_with"][at - i - 1] if i < at else 0
            assert thought["gain"] == pytest.approx(wanted, abs=2e-5)
    for pattern, more in (("x", []), (r"is (\d)", ["--max_length", "3"])):
        with pytest.raises(ValueError, match="`score_pattern` .* has no match within the"):
            main(["inspect", *flags, "--score_pattern", pattern, *more])


def test_inspect_takes_written_thoughts_out(tmp_path, capsys):
    """As training does, the prompt left alone; the page says how many."""
    model, page = saved_model(tmp_path / "model"), tmp_path / "page.html"
    texts = {"plain": "is 7 .", "written": "<3+4=>is <7>7 .", "prompt": "3 <plus> 4 "}
    for name, words in texts.items():
        (tmp_path / name).write_text(words)
    flags = [
        "--model",
        model,
        "--prompt",
        str(tmp_path / "prompt"),
        "--output",
        str(page),
        "--use_cpu",
        "--thought_length",
        "2",
    ]
    shown = []
    for name, more in (("plain", []), ("written", ["--thought_pattern", "<(.*?)>"])):
        assert main(["inspect", *flags, "--text", str(tmp_path / name), *more]) == 0
        shown.append(embedded(page.read_text("utf-8"))["texts"])
    assert shown[0] == shown[1] and "Written thoughts taken out: 2." in capsys.readouterr().out


# In data


def prepare(rows, folder, tokenizer=None, name="train", **options):
    """What becomes of rows ahead of training."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    args = tiny_args(folder, **{"max_length": None, **options})
    return prepare_texts(data, tokenizer, args, name, len(tokenizer), args.packing)


def stream(rows: list[dict]) -> IterableDataset:
    """The rows as a stream."""
    return IterableDataset.from_generator(lambda: iter(rows))


def scored(row: dict, tokenizer=None) -> str:
    """The scored tokens of a row as text."""
    ids = [token for token, mask in zip(row["input_ids"], row["score_mask"], strict=True) if mask]
    return (tokenizer or byte_tokenizer()).decode(ids)


def bare(text: str) -> str:
    """Without spaces, which tokenizers decode as they like."""
    return re.sub("[ ▁]", "", text)


# in the style of GSM8K
PROBLEM = {
    "prompt": "A crate holds 6 rows of 8 jars. 5 jars break. How many are whole?\n",
    "completion": "There are 6*8 = <<6*8=48>>48 jars.\nOf these 48-5 = <<48-5=43>>43 are whole.\n#### 43",
}
FINAL = dict(score_pattern="#### (.*)")
TALK = [{"role": "user", "content": "3 plus 4 is"}, {"role": "assistant", "content": "3 and 4 , so 7 ."}]


def test_a_final_answer(tmp_path):
    """GSM8K's, by a pattern or a column, whose last occurrence counts: rows and labels are those without a score."""
    (plain,) = prepare([PROBLEM], tmp_path)
    assert "score_mask" not in plain
    for row, options in (
        (PROBLEM, FINAL),
        ({**PROBLEM, "score": "43"}, {}),
        (PROBLEM, dict(score_pattern=r"43(?!.*43)")),
    ):
        for data in ([row], stream([row])):
            (found,) = prepare(data, tmp_path, **options)
            assert scored(found) == " 43" and sum(found["score_mask"][-4:]) == sum(found["score_mask"])
            assert all(found[name] == plain[name] for name in ("input_ids", "labels"))


def test_thoughts_are_taken_out_first(tmp_path):
    """So that a score is looked for in the text without them, and its tokens are those of that text."""
    taken = dict(thought_pattern="<<(.*?)>>", min_thought_length=1, thought_length=40)
    clean = {**PROBLEM, "completion": re.sub("<<.*?>>", "", PROBLEM["completion"])}
    for rows, options in (([PROBLEM], FINAL), ([{**PROBLEM, "score": "43 are whole"}], {})):
        (found,) = prepare(rows, tmp_path, **taken, **options)
        (alone,) = prepare([{**rows[0], **clean}], tmp_path, **options)
        assert len(found["written_at"]) == 2
        assert all(found[name] == alone[name] for name in ("input_ids", "labels", "score_mask"))
    with pytest.raises(ValueError, match="'6\\*8=48'.* in 'score', which does not occur in 'There are 6\\*8 = 48"):
        prepare([{**PROBLEM, "score": "6*8=48"}], tmp_path, **taken)
    # the whole worked solution becomes the thought: the answer alone is left to read
    whole = dict(thought_pattern=r"(.+)\n(?=#### )", min_thought_length=1, thought_length=100)
    (found,) = prepare([PROBLEM], tmp_path, **whole, **FINAL)
    decode = byte_tokenizer().decode
    assert decode(found["input_ids"]) == PROBLEM["prompt"] + "#### 43<eos>" and scored(found) == " 43"
    assert decode(found["written_ids"][0]) == PROBLEM["completion"].removesuffix("\n#### 43") + "<eos>"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_score(kind, tmp_path):
    """The fewest that hold it, whatever the tokenizer."""
    tokenizer = KINDS[kind](tmp_path)
    if kind == "BOS":  # and a token of its own after each text
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=ids
        )
    text = " 12 plus 104 is 116 and 7 plus 2 is 9 ."
    for score_ in ("116", " 116", "104 is 116", "6 and", "plus 2 is 9", "9 .", "lus 2", " 12"):
        row = {"prompt": "3 plus 4 is", "completion": text, "score": score_}
        (found,) = prepare([row], tmp_path, tokenizer)
        mask, ids = found["score_mask"], found["input_ids"]
        first, end = mask.index(1), len(mask) - mask[::-1].index(1)
        assert all(mask[first:end]) and all(label != -100 for label in found["labels"][first:end])
        own, *fewer = (
            bare(tokenizer.decode(part)) for part in (ids[first:end], ids[first + 1 : end], ids[first : end - 1])
        )
        assert bare(score_) in own
        if bare(score_) == score_:  # a space may be a token
            assert not any(score_ in part for part in fewer)
        if score_ not in ("lus 2", "6 and"):  # which end within a token
            after = tokenizer.decode(ids[end:], skip_special_tokens=True)
            assert bare(after) == bare(text[text.rindex(score_) + len(score_) :])


def test_tokens_of_a_score_after_line_breaks(tmp_path):
    """Two line breaks are one token at the end of a text, and two before a word, as in GPT-2: they are no part of the score."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["a\n\n"] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert [len(tokenizer(text)["input_ids"]) for text in ("\n\n", "\n\n7")] == [1, 3]
    for more, options in (({"score": "7"}, {}), ({}, dict(score_pattern="(7)"))):
        (found,) = prepare([{"prompt": "3", "completion": " so\n\n7", **more}], tmp_path, tokenizer, **options)
        assert sum(found["score_mask"]) == found["score_mask"][-1] == 1


def test_the_last_match_counts():
    """Its group 1, or all of it; a match with nothing in it is none."""
    text = "a #### 1\nb #### 22\nc"
    for pattern, found in (("#### (.*)", "22"), ("####.*", "#### 22"), ("c(x)?", None), ("#### (3)", None)):
        place = last_match(text, pattern)
        assert (place and text[slice(*place)]) == found
    assert last_match("#### ", "#### (.*)") is None


def test_the_assistants_last_turn(tmp_path):
    """Of messages in any form; a score in another turn is none."""
    talk = [TALK[0], {"role": "assistant", "content": "7 , surely"}, *TALK]
    turned = [{"from": m["role"], "value": m["content"]} for m in talk]
    forms = ({"messages": talk}, {"conversations": turned}, {"prompt": talk[:1], "completion": talk[1:]})
    for row in forms:
        for more, options in (({"score": "7"}, {}), ({}, dict(score_pattern="so (.*) ")), ({"score": "so 7"}, {})):
            for data in ([{**row, **more}], stream([{**row, **more}])):
                (found,) = prepare(data, tmp_path, assistant_only_loss="messages" in row, **options)
                assert scored(found) == ("so 7" if more.get("score") == "so 7" else " 7")
                assert found["score_mask"][-10:].count(1) == found["score_mask"].count(1)
        with pytest.raises(ValueError, match="Row 0 of the train dataset has 'surely'.* does not occur in '3 and 4"):
            prepare([{**row, "score": "surely"}], tmp_path)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [5, 12, 20, 100])
def test_cut_texts_keep_what_is_scored_in_them(mode, max_length, tmp_path):
    """The mask is cut with its tokens, at either end, with written thoughts and without."""
    row = {"text": "3 plus 4[so] is 7 . 104 plus 12[hm] is 116 . 3 plus 4[so] is 7 ."}
    taken = dict(thought_pattern=r"\[(.*?)\]", min_thought_length=1)
    for options in ({}, taken):
        (whole,) = prepare([row], tmp_path, score_pattern=r"\d+ plus 12.*116", **options)
        length = len(whole["input_ids"])
        kept = slice(max(length - max_length, 0), None) if mode == "keep_end" else slice(max_length)
        found = list(
            prepare(
                stream([row]),
                tmp_path,
                score_pattern=r"\d+ plus 12.*116",
                max_length=max_length,
                truncation_mode=mode,
                **options,
            )
        )
        for name in ("input_ids", "labels", "score_mask"):
            assert found[0][name] == whole[name][kept]
    ids = {"input_ids": list(range(9)), "score_mask": [0, 1, 1, 0, 1, 0, 0, 0, 1]}
    (found,) = prepare([ids], tmp_path, max_length=4, truncation_mode=mode)
    assert found["score_mask"] == ([0, 0, 0, 1] if mode == "keep_end" else [0, 1, 1, 0])


def test_packed_rows_keep_their_masks(tmp_path):
    """Each text has the tokens, labels and mask that it has alone; without scores rows are packed as TRL packs them."""
    rows = [
        {"prompt": f"{a} plus {b} is", "completion": f" {b} and {a} , {a + b} ."} for a in range(5) for b in range(4)
    ]
    options = dict(score_pattern=r", (\d+)", shuffle_dataset=True)
    alone = prepare(rows, tmp_path, **options)
    for data in (rows, stream(rows)):
        found = list(prepare(data, tmp_path, packing=True, max_length=64, **options))
        texts, columns = [], ("input_ids", "labels", "score_mask")
        for row in found:
            end = 0
            for length in row["seq_lengths"]:
                texts.append(tuple(tuple(row[name][end : end + length]) for name in columns))
                end += length
        assert len(found) < len(rows) and sorted(texts) == sorted(
            tuple(tuple(row[name]) for name in columns) for row in alone
        )
    bare = prepare(rows, tmp_path, packing=True, max_length=64, shuffle_dataset=True)
    assert bare.column_names == ["input_ids", "labels", "seq_lengths"]


def test_rows_without_a_score(tmp_path, caplog):
    """None: all of the row is scored. No match: nothing is, and a warning counts such rows, as it does rows whose score is cut."""
    rows = [{"text": "3 plus 4 is 7 .", "score": None}, {"text": "3 plus 4 is 7 .", "score": "7"}]
    whole, part = prepare(rows, tmp_path)["score_mask"]
    assert set(whole) == {1} and sum(part) == 1
    rows = [{"text": f"{i} plus 4 is" + (f" #### {i + 4}" if i % 3 else "")} for i in range(9)]
    found = prepare(rows, tmp_path, **FINAL)
    assert [any(row["score_mask"]) for row in found] == [bool(i % 3) for i in range(9)]
    assert "3 of 9 rows of the train dataset have no token that is both scored and predicted" in caplog.text
    caplog.clear()
    list(prepare(stream(rows), tmp_path, name="streamed", **FINAL))
    assert caplog.text.count("Some rows of the streamed dataset have no token that is both scored") == 1


def test_batches_have_the_mask(tmp_path):
    """Padded with 0, and read into the text."""
    rows = prepare(
        [{"text": "3 plus 4 is 7 .", "score": "7"}, {"text": "1 plus 1 is 2 and on and on", "score": "2"}], tmp_path
    )
    batch_ = TextCollator(0)([rows[0], rows[1]])
    assert batch_["score_mask"].tolist()[1] == rows[1]["score_mask"]
    assert batch_["score_mask"][0, len(rows[0]["score_mask"]) :].tolist() == [0] * (
        len(rows[1]["score_mask"]) - len(rows[0]["score_mask"])
    )
    assert torch.equal(Text.from_batch(**batch_).score_mask, batch_["score_mask"].bool())


def test_a_column_of_numbers_is_another_column(tmp_path, caplog):
    """It is left alone, with a warning, and kept where columns are; also in a stream that begins without it."""
    rows = [{"prompt": "3 plus 4 is", "completion": " 7", "score": 7}]
    for data in (rows, stream(rows)):
        (found,) = prepare(data, tmp_path, remove_unused_columns=False)
        assert found["score"] == 7 and "score_mask" not in found
    assert "The column 'score' of the train dataset holds no strings, and is left alone" in caplog.text
    late = [{"text": "3 plus 4"}, {"text": "3 plus 4", "score": 0.5}]
    assert len(list(prepare(stream(late), tmp_path))) == 2
    with pytest.raises(ValueError, match="Row 1 of the train dataset has 'score', which the first row has not"):
        list(prepare(stream([late[0], {**late[1], "score": "4"}]), tmp_path))
    (found,) = prepare([{"text": "3 plus 4", "score": "4"}], tmp_path, remove_unused_columns=False)
    assert found["score"] == "4" and sum(found["score_mask"]) == 1


ROW = {"prompt": "3 plus 4 is", "completion": " 7 ."}
IDS = {"input_ids": [3, 4, 5, 6]}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [ROW | {"score": "7"}, ROW | {"score": "8"}],
            {},
            r"Row 1 of the train dataset has '8'.* in 'score', which does not",
        ),
        ([ROW | {"score": "3"}], {}, "Row 0 of the train dataset has '3'.*which does not occur in ' 7 .'"),
        ([ROW | {"score": ""}], {}, "Row 0 of the train dataset has ''"),
        ([ROW, ROW], FINAL, "Row 0 of the train dataset has no match of `score_pattern`.* and no other row has one"),
        ([ROW | {"score": "7"}], dict(score_pattern="7"), "has the column 'score', and `score_pattern` is set"),
        ([{"messages": TALK[:1], "score": "7"}], {}, "Row 0 .*which does not occur in ''"),
        ([IDS | {"score": "7"}], {}, "holds token ids, in which 'score' stands for nothing"),
        ([IDS], dict(score_pattern="7"), "holds token ids, in which `score_pattern` finds nothing"),
        ([ROW | {"score_mask": [0, 1]}], {}, "has a `score_mask` for each token, which needs `input_ids`"),
        ([IDS | {"score_mask": [0, 1]}], {}, "Row 0 .*2 `score_mask` and 4 `input_ids`"),
        ([IDS | {"score_mask": [0, 2, 0, 0]}], {}, "Row 0 .*2 .*in 'score_mask'; whole numbers from 0 to 1"),
        (
            [IDS | {"score_mask": [1, 0, 0, 0]}],
            {},
            "All 1 rows of the train dataset have no token that is both scored",
        ),
        (
            [IDS | {"score_mask": [0, 1, 0, 0], "labels": [-100, -100, 5, 6]}],
            {},
            "All 1 rows of the train dataset have no token that is both scored",
        ),
        ([PROBLEM], dict(**FINAL, max_length=110), "All 1 rows of the train dataset have no token.*or `max_length`"),
        ([{"score": "3 plus 4"}], dict(dataset_text_field="score"), "`dataset_text_field` is 'score'"),
    ],
    ids=str,
)
def test_bad_scores_are_refused(rows, options, message, tmp_path):
    """By the number of the row, before anything is computed; and in a stream when the row comes."""
    with pytest.raises(ValueError, match=message):
        prepare(rows, tmp_path, **options)
    if "and no other row" not in message and "All 1 rows" not in message:
        with pytest.raises(ValueError, match=message):
            list(prepare(stream(rows), tmp_path, **options))


def test_a_message_of_parts_is_refused():
    """Since a place in it is no place in a string."""
    talk = [TALK[0], {"role": "assistant", "content": [{"type": "text", "text": "7"}]}]
    step = FindScore("train", "messages", "text", True, byte_tokenizer(), None)
    with pytest.raises(
        ValueError, match="Row 3 of the train dataset has a score in a message of parts; give the content"
    ):
        step({"messages": talk, "score": "7"}, 3)


@pytest.mark.parametrize(
    ("pattern", "message"), [("(7", "which is no regular expression"), (r"\d*", "which matches the empty text")]
)
def test_bad_patterns_are_refused(pattern, message, tmp_path):
    """With the configuration."""
    with pytest.raises(ValueError, match=f"`score_pattern` is .*{message}"):
        tiny_args(tmp_path, score_pattern=pattern)


def test_a_stream_that_is_never_scored_ends(tmp_path, monkeypatch):
    """After thousands of rows in which nothing is."""
    monkeypatch.setattr("trl_quietstar.data.rows.MOST_UNUSABLE", 7)
    rows = [{"text": "3 plus 4 is #### 7"}, *[{"text": "3 plus 4 is 7"}] * 9]
    with pytest.raises(
        ValueError, match="7 rows of the train dataset, one after the other, have no token that is both"
    ):
        list(prepare(stream(rows), tmp_path, **FINAL))
    assert len(list(prepare(stream(rows[:8]), tmp_path, **FINAL))) == 8


# In training

ANSWERS = {
    "prompt": [f"{i} plus 1 is" for i in range(8)],
    "completion": [f" 1 more than {i} , so {i + 1} ." for i in range(8)],
}
NUMBERS = ("logps_with", "logps_without", "correct_with", "correct_without")
WHOLE = dict(thought_positions="prompt_end", talk_length="completion")


def trained(folder, data: dict, **options):
    """A trainer after two steps."""
    trainer = tiny_trainer(folder, data=Dataset.from_dict(data), **{**WHOLE, "max_steps": 2, **options})
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, dict(packing=True, max_length=48, thought_positions=2, talk_length=2)])
def test_rows_without_a_score_are_trained_as_ever(options, tmp_path):
    """Bit for bit: where all of a row is scored, and where no option or column says anything."""
    options = dict(nll_weighting="share", preflight_thoughts=8, seed=3, **options)
    bare = trained(tmp_path, ANSWERS, **options)
    ours = trained(tmp_path, {**ANSWERS, "score": [None] * 8}, **options)
    assert_same_state(ours.model, bare.model)
    assert log_of(ours) == log_of(bare)
    part = trained(tmp_path, ANSWERS, score_pattern=r"so (\d+)", **options)
    assert [entry["rl/reward"] for entry in logged(part)] != [entry["rl/reward"] for entry in logged(bare)]


def test_a_step_rewards_the_final_answer(tmp_path):
    """A reward function is given the answer's tokens, and the NLLs of the step are those of the whole completion."""
    seen = []

    def answer(mask, text, **scores):
        seen.append([text.input_ids[b, text.score_mask[b]].tolist() for b in range(len(mask))])
        assert mask.sum() == text.score_mask.sum() == len(mask)
        return thought_rewards(mask=mask, **{x: scores[x] for x in NUMBERS}, reward_type="probability")

    options = dict(max_steps=1, train_sampling_strategy="sequential", score_pattern=r"so (\d+)")
    own, ours = trained(tmp_path, ANSWERS, reward_functions=answer, **options), trained(tmp_path, ANSWERS, **options)
    bare = trained(tmp_path, ANSWERS, **{**options, "score_pattern": None})
    assert seen[0] == [byte_tokenizer()(f" {i + 1}")["input_ids"] for i in range(4)]
    (own,), (found,), (whole,) = logged(own), logged(ours), logged(bare)
    assert own["rl/reward"] == found["rl/reward"] != whole["rl/reward"]
    for name in ("rl/nll_with", "rl/reader_nll", "rl/nll_without"):
        assert found[name] == whole[name]


def test_a_model_is_evaluated_by_its_final_answers(tmp_path):
    """In the evaluation and in the validation of thoughts; and preflight looks at them."""
    data = Dataset.from_dict(ANSWERS)
    more = dict(score_pattern=r"so (\d+)", preflight_thoughts=16, useful_gain=0.0, max_steps=1)
    ours, bare = (tiny_trainer(tmp_path, data=data, evaluation=data, **{**WHOLE, **x}) for x in (more, {}))
    report = ours.validate_thoughts()
    assert report.thoughts == 16 and ours.evaluate()["eval_nll_with"] == bare.evaluate()["eval_nll_with"]
    assert ours.evaluate()["eval_reward"] != bare.evaluate()["eval_reward"]
    assert report.estimates["nll_real"] != bare.validate_thoughts().estimates["nll_real"]
    assert report.estimates["accuracy_real"].value == ours.evaluate()["eval_accuracy_with"]
    ours.train()
    (before,) = logged(ours, "preflight_useful_thoughts")
    assert 0 <= before["preflight_useful_thoughts"] <= 1
