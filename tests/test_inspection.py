"""The data behind the report: pieces that are the text, numbers that are the scores, and a page that stays inert."""

import html
import io
import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.cli import main
from trl_quietstar.evaluation.inspection import ShownScores, inspect_texts, summarize, token_pieces
from trl_quietstar.evaluation.page import render_page
from trl_quietstar.learning.rewards import masked_mean
from trl_quietstar.text.batch import Text, talk_after
from trl_quietstar.thinking.drawing import uniforms
from trl_quietstar.thinking.likelihood import think_in_chunks
from trl_quietstar.thinking.scoring import ScoreRequest, at_talk, score, score_thoughts

from .pages import HOSTILE, embedded, hostile_texts
from .tiny import byte_tokenizer, generators, mixed_text, positions_of, sampling, think, tiny_model
from .training import saved_model, text_data, tiny_trainer


WORDS = "one two 東京 naïve 🙂👩‍👩‍👧 Ελλάδα"


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Leading spaces are part of a token, and unknown characters are bytes, as in Llama 2's tokenizer."""
    vocabulary = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁one", "▁two", "▁", "t", "w", "o", "n", "e"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(backend)


def whole_words() -> PreTrainedTokenizerFast:
    """Tokens without spaces, which the decoder puts between them."""
    backend = Tokenizer(models.WordLevel({"one": 0, "two": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(backend)


def word_pieces() -> PreTrainedTokenizerFast:
    """Continuations are marked, as in BERT's tokenizer."""
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "one": 1, "tw": 2, "##o": 3, "##ne": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return wrapped(backend)


TOKENIZERS = {"bytes": byte_tokenizer, "spaces": sentencepiece_like, "words": whole_words, "pieces": word_pieces}


# Pieces


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_text(name):
    """One a token, and together what the tokenizer decodes."""
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(WORDS)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ["bytes", "spaces"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_pieces_of_any_text(name, text):
    """Whatever is in it, tokenizers that keep everything give it back."""
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text)["input_ids"]
    assert "".join(token_pieces(tokenizer, ids)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ["bytes", "spaces"])
def test_a_character_of_several_tokens_comes_whole(name):
    """Its last token holds it, those before it nothing: no replacement character is ever shown."""
    tokenizer = TOKENIZERS[name]()
    pieces = token_pieces(tokenizer, tokenizer("東")["input_ids"])
    assert pieces[-3:] == ["", "", "東"]


def test_a_text_cut_within_a_character():
    """What is left of it is shown as what it is."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("a東")["input_ids"][:-1]
    assert token_pieces(tokenizer, ids)[0] == "a" and "".join(token_pieces(tokenizer, ids)) == tokenizer.decode(ids)


# Numbers


@pytest.fixture(scope="module")
def measured():
    """A batch with padding, packed documents and masked labels, its thoughts and their scores."""
    model, text = tiny_model(vocab_size=300), mixed_text(vocab_size=300)
    thoughts = think(model, text)
    with torch.no_grad():
        return text, thoughts, score(model, ScoreRequest(text, thoughts, 3, SharedPrefix()))


def test_every_document_is_a_text(measured):
    """Padding is gone, packed documents are apart, and the tokens are all there."""
    texts = inspect_texts(byte_tokenizer(), *measured)
    assert [len(text["tokens"]) for text in texts] == [14, 9, 10, 5, 3, 6, 14]


def test_numbers_are_the_scores(measured):
    """Gains, weights and negative log-likelihoods stand at their tokens."""
    text, thoughts, scores = measured
    texts = inspect_texts(byte_tokenizer(), *measured)
    starts = {(0, 1): 0, (1, 1): 1, (2, 1): 2, (3, 1): 3, (3, 2): 4, (3, 3): 5, (4, 1): 6}
    mask = talk_after(text, thoughts.positions, 3).target_mask[:, :, None]
    without = at_talk(scores.text_logps, thoughts, 3)
    gains = masked_mean(scores.talk_logps - without, mask, dim=-1)
    weights = masked_mean(scores.mixing_weights, mask, dim=-1)
    seen = 0
    for b, j in thoughts.positions.mask.nonzero().tolist():
        at = int(thoughts.positions.index[b, j])
        tokens = texts[starts[b, int(text.document_ids[b, at])]]["tokens"]
        token, following = (tokens[int(text.position_ids[b, at]) + k] for k in (0, 1))
        for g, thought in enumerate(token["thoughts"]):
            assert thought["gain"] == pytest.approx(float(gains[b, j, g]), abs=1e-5)
            assert thought["weight"] == pytest.approx(float(weights[b, j, g]), abs=1e-5)
            read = [None if nll is None else -nll for nll in thought["nll_with"]]
            counted = mask[b, j, 0, : len(read)].tolist()
            assert [x is not None for x in read] == counted
            kept = scores.talk_logps[b, j, g, : len(read)][mask[b, j, 0, : len(read)]]
            assert [x for x in read if x is not None] == pytest.approx(kept.tolist(), abs=1e-5)
        assert following["nll_without"] == pytest.approx(-float(scores.text_logps[b, at]), abs=1e-5)
        assert following["nll_with"] == token["thoughts"][0]["nll_with"][0]
        seen += len(token["thoughts"])
    assert seen == 2 * int(thoughts.positions.mask.sum()) > 0
    assert sum(len(token["thoughts"]) for text in texts for token in text["tokens"]) == seen


def test_what_is_not_predicted_has_no_number(measured):
    """First tokens, and tokens that are no label."""
    texts = inspect_texts(byte_tokenizer(), *measured)
    assert all(text["tokens"][0]["nll_without"] is None for text in texts)
    assert [i for i, token in enumerate(texts[6]["tokens"]) if token["nll_without"] is None] == [0, 1, 2, 3, 4, 9]


def test_the_summary_is_over_every_thought(measured):
    """Means over the same talk tokens with and without; as the training metrics are taken."""
    text, thoughts, scores = measured
    summary = summarize(inspect_texts(byte_tokenizer(), *measured))
    mask = talk_after(text, thoughts.positions, 3).target_mask[:, :, None].expand_as(scores.talk_logps)
    without = at_talk(scores.text_logps, thoughts, 3).expand_as(scores.talk_logps)
    assert summary["nll_with"] == pytest.approx(-float(scores.talk_logps[mask].mean()), abs=1e-4)
    assert summary["nll_without"] == pytest.approx(-float(without[mask].mean()), abs=1e-4)
    assert (summary["texts"], summary["thoughts"]) == (7, 2 * int(thoughts.positions.mask.sum()))


def test_the_summary_orders_thoughts(measured):
    """The most helpful first, the most harmful first, one a position, and each found where it says it stands."""
    texts = inspect_texts(byte_tokenizer(), *measured)
    summary = summarize(texts)
    thinking = [token["thoughts"] for text in texts for token in text["tokens"] if token["thoughts"]]
    best = sorted((max(thought["gain"] for thought in thoughts) for thoughts in thinking), reverse=True)
    worst = sorted(min(thought["gain"] for thought in thoughts) for thoughts in thinking)
    assert [x["gain"] for x in summary["helped"]] == best[:5]
    assert [x["gain"] for x in summary["hurt"]] == worst[:5]
    for excerpt in summary["helped"] + summary["hurt"]:
        tokens = texts[excerpt["text"]]["tokens"]
        thoughts = [thought["text"] for thought in tokens[excerpt["token"]]["thoughts"]]
        assert excerpt["thought"] in thoughts
        assert excerpt["context"].endswith(tokens[excerpt["token"]]["piece"])
        assert excerpt["next"].startswith(tokens[excerpt["token"] + 1]["piece"])


def test_only_what_helped_is_called_helpful(measured):
    """Where every thought hurts, none is listed as helpful."""
    text, thoughts, scores = measured
    worse = scores._replace(talk_logps=scores.talk_logps - 50)
    summary = summarize(inspect_texts(byte_tokenizer(), text, thoughts, worse))
    assert summary["helped"] == [] and len(summary["hurt"]) == 5


def test_a_diverged_model_is_still_shown(measured):
    """NaN becomes nothing, and the page is written."""
    text, thoughts, scores = measured
    diverged = scores._replace(talk_logps=scores.talk_logps * math.nan)
    texts = inspect_texts(byte_tokenizer(), text, thoughts, diverged)
    assert summarize(texts)["nll_with"] is None and summarize(texts)["helped"] == []
    assert "undefined" in render_page("Thoughts", texts)


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()], ids=["shared prefix", "replay"])
def test_chunks_change_nothing(path, monkeypatch):
    """A few positions at a time give the thoughts and scores of all at once."""
    model, text = tiny_model(), mixed_text()
    results = []
    for tokens in (100_000, 250):
        monkeypatch.setattr("trl_quietstar.thinking.likelihood.CPU_TOKENS", tokens)
        results.append(
            think_in_chunks(
                model,
                path,
                text,
                positions_of(text),
                sampling(),
                uniforms(positions_of(text), sampling(), generators(text)),
                3,
                "mixed",
            )
        )
    (whole, whole_scores), (parts, part_scores) = results
    assert torch.equal(whole.token_ids[whole.mask], parts.token_ids[parts.mask])
    assert torch.equal(whole.mask, parts.mask)
    for name in ("talk_logps", "mixing_weights"):
        torch.testing.assert_close(getattr(whole_scores, name), getattr(part_scores, name), rtol=1e-4, atol=1e-4)


# The page


def test_hostile_text_stays_text():
    """In the text, in tokens, in thoughts, in the title and in notes: nothing of it is markup, and all of it is kept."""
    page = render_page(HOSTILE, hostile_texts(), [HOSTILE])
    assert "<img" not in page and "<!--" not in page and "\u2028" not in embedded_source(page)
    assert page.count("</script>") == 2
    assert page.count(html.escape(HOSTILE)) == 3  # title, heading, note
    data = embedded(page)
    assert data["texts"] == hostile_texts()
    assert data["helped"][0]["thought"] == HOSTILE


def embedded_source(page: str) -> str:
    return page[page.index('id="data"') :]


def test_the_page_refers_to_nothing():
    """No address but its own anchors: it works from a mail attachment, offline."""
    page = render_page("Thoughts", hostile_texts())
    head = page[: page.index('id="data"')]
    assert not re.findall(r"(?:https?:)?//\w", head)
    assert re.findall(r'(?:src|href)="([^"]*)"', head) == ["data:,"]
    assert "default-src 'none'" in head and "unsafe" not in head


def test_plots_of_the_history():
    """What was logged is drawn with its steps; what was not, is not."""
    history = [
        {"step": 1, "rl/reward": 0.1, "rl/nll_with": 2.0, "rl/nll_without": 2.1},
        {"step": 2, "eval_reward": 0.3},
        {"step": 3, "rl/reward": 0.2, "rl/nll_with": 1.5, "rl/nll_without": 1.9, "rl/entropy": None},
    ]
    page = render_page("Thoughts", hostile_texts(), history=history)
    assert "training from 0.1 to 0.2; held-out from 0.3 to 0.3" in page
    assert "training, with from 2 to 1.5" in page and "step 3: 1.9" in page
    assert "Entropy" not in page[page.index("</header>") : page.index('id="data"')]
    assert '<section class="charts"' not in render_page("Thoughts", hostile_texts())


# The command


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


def inspect(model: str, text: Path | str, output: Path, *flags: str) -> dict:
    """`trl-quietstar inspect`; the page's data."""
    flags = ("--use_cpu", "--thought_length", "3", *flags)
    assert main(["inspect", "--model", model, "--text", str(text), "--output", str(output), *flags]) == 0
    return embedded(output.read_text("utf-8"))


def test_the_command_writes_a_page(model_folder, tmp_path, capsys, monkeypatch):
    """Three thoughts after every token but the last, deterministic, and nothing else is written."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("3 plus 4 is 7 — 東京.", "utf-8")
    data = inspect(model_folder, "text.txt", tmp_path / "page.html")
    (text,) = data["texts"]
    assert "".join(token["piece"] for token in text["tokens"]) == "3 plus 4 is 7 — 東京."
    assert [len(token["thoughts"]) for token in text["tokens"]] == [3] * (len(text["tokens"]) - 1) + [0]
    assert inspect(model_folder, "text.txt", tmp_path / "again.html") == data
    assert inspect(model_folder, "text.txt", tmp_path / "other.html", "--seed", "1") != data
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "page.html", "again.html", "other.html"}
    assert "Wrote" in capsys.readouterr().out


def test_an_untrained_model_is_said_to_be_one(model_folder, tmp_path, capsys):
    """On the page and on standard error; a trained one is not, and thinks by its saved lengths."""
    trainer = tiny_trainer(tmp_path / "out", model=model_folder, max_steps=1, thought_length=2)
    trainer.train()
    trainer.save_model()
    (tmp_path / "text.txt").write_text("3 plus 4 is 7 .")
    inspect(model_folder, tmp_path / "text.txt", tmp_path / "plain.html")
    assert "never trained to think" in capsys.readouterr().err
    assert "never trained to think" in (tmp_path / "plain.html").read_text()
    command = ["inspect", "--model", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), "--use_cpu"]
    assert main([*command, "--output", str(tmp_path / "trained.html")]) == 0
    assert "never trained" not in capsys.readouterr().err
    page = (tmp_path / "trained.html").read_text()
    assert "never trained" not in page and "up to 2 tokens" in page


def test_a_long_text_is_cut_and_said_to_be(model_folder, tmp_path):
    """`--max_length` says how much is shown, and the page says how much is not."""
    (tmp_path / "text.txt").write_text("3 plus 4 is 7 . " * 20)
    data = inspect(model_folder, tmp_path / "text.txt", tmp_path / "page.html", "--max_length", "16")
    assert len(data["texts"][0]["tokens"]) == 16
    assert "of which the first 16 are shown" in (tmp_path / "page.html").read_text()


def test_a_text_longer_than_the_model(model_folder, tmp_path):
    """Refused, with the length that fits."""
    (tmp_path / "text.txt").write_text("3 plus 4 is 7 . " * 40)
    with pytest.raises(ValueError, match=r"lower `max_length` to 124"):
        inspect(model_folder, tmp_path / "text.txt", tmp_path / "page.html")


def test_standard_input(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é plus".encode())))
    (text,) = inspect(model_folder, "-", tmp_path / "page.html")["texts"]
    assert "".join(token["piece"] for token in text["tokens"]) == "é plus"


@pytest.mark.parametrize(
    "content, message", [(b"\xff\xfe\xff", "not UTF-8"), (b" \n", "empty"), (b"3", "fewer than two tokens")]
)
def test_a_text_that_cannot_be_shown(content, message, model_folder, tmp_path):
    """The message names the file and what is wrong with it."""
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"text\.txt.*{message}"):
        inspect(model_folder, tmp_path / "text.txt", tmp_path / "page.html")


@pytest.mark.parametrize("missing", ["model", "text"])
def test_a_missing_argument(missing):
    given = {"model": ["--text", "x"], "text": ["--model", "x"]}[missing]
    with pytest.raises(ValueError, match=f"`{missing}` is missing"):
        main(["inspect", *given])


# Training


def test_training_writes_a_report_at_each_evaluation(tmp_path):
    """Of the first evaluation batch, with plots up to and with that evaluation; off by default."""
    options = dict(evaluation=text_data(6, 300), eval_strategy="steps", eval_steps=1, max_steps=2)
    options["per_device_eval_batch_size"] = 4
    trainer = tiny_trainer(tmp_path, report_thoughts=True, **options)
    trainer.evaluate()
    trainer.train()
    reports = tmp_path / "reports"
    assert {path.name for path in reports.iterdir()} == {"step-0.html", "step-1.html", "step-2.html"}
    page = (reports / "step-2.html").read_text("utf-8")
    texts = embedded(page)["texts"]
    assert len(texts) == 4
    shown = "".join(token["piece"] for token in texts[0]["tokens"])
    assert shown.startswith(text_data(6, 300)["text"][0])
    measured = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert f"held-out from {measured[0]:.3g} to {measured[-1]:.3g}" in page
    tiny_trainer(tmp_path / "off", **options).train()
    assert not (tmp_path / "off/reports").exists()


def test_several_evaluation_sets_have_a_report_each(tmp_path):
    evaluation = {"sums": text_data(4, 300), "more": text_data(4, 320)}
    tiny_trainer(tmp_path, report_thoughts=True, evaluation=evaluation).evaluate()
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {"step-0-sums.html", "step-0-more.html"}


def test_wandb_receives_the_thoughts_of_an_evaluation(tmp_path, monkeypatch):
    """As a table, beside those of training."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = tiny_trainer(
        tmp_path / "out", report_to="wandb", report_thoughts=True, evaluation=text_data(4, 300), max_steps=1
    )
    try:
        trainer.evaluate()
        summary, folder = dict(wandb.run.summary), Path(wandb.run.dir).parent
    finally:
        wandb.finish()
    assert summary["eval_thoughts"]["_type"] == "table-file" and summary["eval_thoughts"]["nrows"] == 5
    # what `wandb sync` would upload names the page; W&B's own process may still be writing it
    deadline = time.monotonic() + 60
    while not any(b"step-0.html" in records(file.read_bytes()) for file in folder.glob("*.wandb")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def records(log: bytes) -> bytes:
    """What W&B's log of a run holds: it is LevelDB's, whose blocks of 32 KiB cut records anywhere and begin each piece with 7 bytes."""
    held, at = b"", 7  # after the file's own header
    while at + 7 <= len(log):
        room = 2**15 - at % 2**15
        length = int.from_bytes(log[at + 4 : at + 6], "little")
        held += log[at + 7 : at + 7 + length] if room >= 7 else b""
        at += 7 + length if room >= 7 else room
    return held


def test_records_are_read_over_the_ends_of_blocks():
    """A record that a block cuts is whole again, and the rest of a block that has no room for a piece is skipped."""

    def piece(data: bytes) -> bytes:
        return bytes(4) + len(data).to_bytes(2, "little") + b"\1" + data

    first = piece(bytes(2**15 - 7 - 7 - 7 - 3)) + piece(b"ste")
    assert records(b":W&B\0\0\0" + first + piece(b"p-0.html")).endswith(b"step-0.html")
    assert records(b":W&B\0\0\0" + piece(bytes(2**15 - 7 - 7 - 5)) + bytes(5) + piece(b"step")).endswith(b"step")


def test_text_of_one_row_has_no_batch_effects():
    """A text alone and the same text padded in a batch are shown alike."""
    model = tiny_model(vocab_size=300)
    ids = torch.randint(300, (1, 8), generator=torch.Generator().manual_seed(3))
    alone = Text.from_batch(ids)
    padded = Text.from_batch(torch.cat([ids, ids], 1), torch.tensor([[1] * 8 + [0] * 8]))
    shown = []
    for text in (alone, padded):
        arguments = (
            positions_of(text),
            sampling(),
            uniforms(positions_of(text), sampling(), generators(text)),
            3,
            "mixed",
        )
        thoughts, said = think_in_chunks(model, SharedPrefix(), text, *arguments)
        with torch.no_grad():
            text_logps = score_thoughts(model, text, thoughts, SharedPrefix()).text_logps
        scores = ShownScores(said.talk_logps, said.mixing_weights, text_logps)
        shown.append(inspect_texts(byte_tokenizer(), text, thoughts, scores))
    first, second = ([token["piece"] for token in texts[0]["tokens"]] for texts in shown)
    assert first == second
    gains = [[x["gain"] for token in texts[0]["tokens"] for x in token["thoughts"]] for texts in shown]
    assert gains[0] == pytest.approx(gains[1], abs=1e-4)
