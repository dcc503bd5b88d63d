"""Tokenizers of every kind that open models use, small ones."""

import string
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from .tiny import byte_tokenizer, sums


def sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A unigram model with byte fallback, as Llama 2 and Gemma have: trained, written and loaded as a `.model` file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(sums()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=280, byte_fallback=True, minloglevel=2
    )
    return LlamaTokenizer.from_pretrained(folder)


def with_bos(folder: Path) -> PreTrainedTokenizerFast:
    """Every text begins with a token of its own."""
    tokenizer = byte_tokenizer(bos_token="<bos>")
    bos = (("<bos>", tokenizer.convert_tokens_to_ids("<bos>")),)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=list(bos)
    )
    return tokenizer


def characters(folder: Path) -> PreTrainedTokenizerFast:
    """One token a character, an unknown token, and neither BOS, EOS nor padding."""
    letters = sorted(set("".join(sums()) + string.ascii_letters) - {" "}) + ["▁"]
    vocabulary = {token: index for index, token in enumerate(["<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = {
    "byte-level BPE": lambda folder: byte_tokenizer(),
    "left padding": lambda folder: byte_tokenizer(pad_token="<pad>", padding_side="left"),
    "BOS": with_bos,
    "characters": characters,
    "sentencepiece": sentencepiece_tokenizer,
}
