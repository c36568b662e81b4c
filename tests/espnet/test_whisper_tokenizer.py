"""Whisper's tokens in ESPnet's classes, with the openai-whisper of PyPI."""

import copy
import pickle
import sys

import pytest
from espnet2.bin.whisper_export_vocabulary import export_vocabulary
from espnet2.text.whisper_token_id_converter import OpenAIWhisperTokenIDConverter
from espnet2.text.whisper_tokenizer import OpenAIWhisperTokenizer

from espnet_kv.errors import UserError
from espnet_kv.espnet.openai_whisper import whisper_for_espnet

whisper = pytest.importorskip("whisper", reason="openai-whisper is not installed")
KINDS = ("whisper_en", "whisper_multilingual")
TEXTS = ["Hello world", " it's 3,5 km  to\tthe\nend", "naïve Straße 東京 🎉", "a\u0301\u200d", ""]


def pair(kind: str, **options):
    with whisper_for_espnet():
        tokenizer = OpenAIWhisperTokenizer(kind, **options)
        return tokenizer, OpenAIWhisperTokenIDConverter(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back_and_ids_are_those_of_openai(kind):
    tokenizer, converter = pair(kind)
    own = whisper.tokenizer.get_tokenizer(kind == KINDS[1], language="en", task="transcribe")
    for text in TEXTS:
        tokens = tokenizer.text2tokens(text)
        ids = converter.tokens2ids(tokens)
        primer = list(own.sot_sequence_including_notimestamps[1:])
        assert ids == primer + own.encode(text)
        assert converter.ids2tokens(ids) == tokens  # without special tokens
        assert tokenizer.tokens2text(tokens) == text


def test_known_ids():
    """Of GPT-2's vocabulary, and as ESPnet's source lists them."""
    tokenizer, converter = pair("whisper_en")
    assert tokenizer.text2tokens("Hello world") == ["Hello", "Ġworld"]
    ids = converter.tokenizer.tokenizer.convert_tokens_to_ids
    assert ids(["Hello", "Ġworld"]) == [15496, 995]
    assert (ids("<|startoftranscript|>"), ids("<|endoftext|>")) == (50257, 50256)
    assert ids("<|0.00|>") == 50363 and ids("no such token") == 50256
    ids = pair("whisper_multilingual")[1].tokenizer.tokenizer.convert_tokens_to_ids
    assert (ids("<|startoftranscript|>"), ids("<|endoftext|>")) == (50258, 50257)
    assert (ids("<|en|>"), ids("<|transcribe|>"), ids("<|notimestamps|>")) == (50259, 50359, 50363)


@pytest.mark.parametrize(("kind", "count"), [(KINDS[0], 51864), (KINDS[1], 51865)])
def test_the_vocabulary_that_espnet_exports(kind, count, tmp_path):
    with whisper_for_espnet():
        export_vocabulary(str(tmp_path / "tokens.txt"), kind, log_level="ERROR")
    tokens = (tmp_path / "tokens.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(tokens) == count == pair(kind)[1].get_num_vocabulary_size()
    assert len(set(tokens)) == count
    assert tokens[-1] == "<|30.00|>"
    assert tokens.index("<|endoftext|>") == count - 1501 - 106 - 1


def test_special_tokens_in_a_text_are_found():
    tokenizer, converter = pair("whisper_multilingual", sot=True, speaker_change_symbol="<sc>")
    tokens = tokenizer.text2tokens("yes<sc> no<|1.00|>")
    assert tokens == ["yes", "<sc>", "Ġno", "<|1.00|>"]
    assert converter.tokens2ids(tokens)[-3:][::2] == [51865, 50414]
    assert tokenizer.tokens2text(tokens) == "yes<sc> no<|1.00|>"


def test_added_tokens_come_before_the_timestamps(tmp_path):
    """As with ESPnet's fork, in which timestamps are added last."""
    (tmp_path / "added.txt").write_text("<|slu|>\n<two words>\n")
    tokenizer, converter = pair(
        "whisper_multilingual", added_tokens_txt=str(tmp_path / "added.txt")
    )
    ids = converter.tokenizer.tokenizer.convert_tokens_to_ids
    assert [ids("<|slu|>"), ids("<two words>"), ids("<|0.00|>")] == [50364, 50365, 50366]
    tokens = tokenizer.text2tokens("a<two words> b")
    assert tokens == ["a", "<two words>", "Ġb"]
    assert tokenizer.tokens2text(tokens) == "a<two words> b"
    assert converter.ids2tokens([50364, 50366]) == ["<|slu|>"]
    assert len(pair("whisper_multilingual")[0].tokenizer.tokenizer.get_added_vocab()) == 1608


def test_tokenizers_are_sent_to_other_processes():
    tokenizer, _ = pair("whisper_en")
    tokenizer.text2tokens("used")
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.text2tokens("Hello world") == ["Hello", "Ġworld"]


def test_the_package_is_as_before():
    before = dict(vars(whisper)), dict(vars(whisper.audio)), dict(vars(whisper.tokenizer))
    with pytest.raises(ZeroDivisionError), whisper_for_espnet(), whisper_for_espnet():
        assert whisper.audio.N_MELS == 80
        raise ZeroDivisionError
    assert before == (vars(whisper), vars(whisper.audio), vars(whisper.tokenizer))


def test_a_tokenizer_that_has_the_methods_stays(monkeypatch):
    """ESPnet's fork: its tokenizers are Hugging Face's."""

    class Forked:
        tokenizer = "Hugging Face's"

    monkeypatch.setattr(whisper.tokenizer, "get_tokenizer", lambda *_, **__: Forked)
    monkeypatch.setattr(whisper.audio, "N_MELS", 81, raising=False)
    with whisper_for_espnet():
        assert whisper.tokenizer.get_tokenizer(True) is Forked
        assert whisper.audio.N_MELS == 81


@pytest.mark.parametrize("missing", ["whisper", "whisper.tokenizer"])
def test_without_openai_whisper_one_line_says_how_to_install_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="pip install") as caught, whisper_for_espnet():
        pass
    assert "espnet_kv[whisper]" in str(caught.value) and "\n" not in str(caught.value)
