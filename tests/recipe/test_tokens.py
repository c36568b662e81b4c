"""Token lists: what ESPnet reads, sizes that fit, the same bytes each time."""

import io
import re
from pathlib import Path

import pytest
import sentencepiece

from espnet_kv.errors import UserError
from espnet_kv.recipe.tokens import list_characters, piece_tokenizer, train_bpe

SUBJECTS = ["THE CAT", "A DOG", "MY OLD FRIEND", "THE QUEEN", "NO SAILOR"]
VERBS = ["SAW", "FED", "DIDN'T WANT", "CALLED", "REMEMBERED"]
LINES = [f"{a} {v} {b}" for a in SUBJECTS for v in VERBS for b in SUBJECTS]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("bpemode", ["unigram", "bpe"])
def test_bpe_layout_and_size(tmp_path: Path, bpemode: str):
    out = tmp_path / f"bpe_{bpemode}36"
    train_bpe(LINES, out, 36, bpemode)
    assert content(out).keys() == {"bpe.model", "bpe.vocab", "tokens.txt", "train.txt"}
    tokens = (out / "tokens.txt").read_text().splitlines()
    assert len(tokens) == len(set(tokens)) == 36
    assert tokens[:2] == ["<blank>", "<unk>"] and tokens[-1] == "<sos/eos>"
    assert (out / "train.txt").read_text().splitlines() == LINES
    vocab = [line.split("\t")[0] for line in (out / "bpe.vocab").read_text().splitlines()]
    assert vocab == ["<unk>", "<s>", "</s>", *tokens[2:-1]]


def test_bpe_is_what_spm_train_makes(tmp_path: Path):
    train_bpe(LINES, tmp_path / "bpe", 36)
    prefix = tmp_path / "spm"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "bpe" / "train.txt"),
        model_prefix=str(prefix),
        vocab_size=36,
        character_coverage=1.0,
        minloglevel=2,
    )
    assert (tmp_path / "bpe" / "bpe.vocab").read_text() == prefix.with_suffix(".vocab").read_text()


def test_bpe_is_deterministic_wherever_it_is_written(tmp_path: Path):
    train_bpe(LINES, tmp_path / "one", 36)
    train_bpe(iter(LINES), tmp_path / "elsewhere" / "two", 36)
    first = content(tmp_path / "one")
    assert first == content(tmp_path / "elsewhere" / "two")
    train_bpe(LINES, tmp_path / "one", 36)
    assert first == content(tmp_path / "one")


@pytest.mark.parametrize("bpemode", ["unigram", "bpe"])
def test_the_largest_size_named_is_possible(tmp_path: Path, bpemode: str):
    with pytest.raises(UserError, match="nbpe 5000 is too large") as refusal:
        train_bpe(LINES, tmp_path / "bpe", 5000, bpemode)
    assert not (tmp_path / "bpe").exists()
    largest = int(re.search(r"largest possible value is (\d+)", str(refusal.value))[1])
    train_bpe(LINES, tmp_path / "bpe", largest, bpemode)
    with pytest.raises(UserError, match=f"is {largest}$"):
        train_bpe(LINES, tmp_path / "bpe", largest + 1, bpemode)


def test_bpe_refuses_what_cannot_be(tmp_path: Path):
    with pytest.raises(UserError, match=r"nbpe 5 is too small.*at least \d+"):
        train_bpe(LINES, tmp_path / "bpe", 5)
    with pytest.raises(UserError, match="use unigram or bpe"):
        train_bpe(LINES, tmp_path / "bpe", 36, "wordpiece")
    for lines in ([], ["", "  "]):
        with pytest.raises(UserError, match="no text"):
            train_bpe(lines, tmp_path / "bpe", 36)
        with pytest.raises(UserError, match="no text"):
            list_characters(lines, tmp_path / "char")
    (tmp_path / "bpe.model").write_bytes(b"damaged")
    for model in ("bpe.model", "missing.model"):
        with pytest.raises(UserError, match="stage 5"):
            piece_tokenizer(tmp_path / model)


def test_characters(tmp_path: Path):
    list_characters(["BAA  B", "A\tC É"], tmp_path / "char")
    tokens = (tmp_path / "char" / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert tokens == ["<blank>", "<unk>", "A", "<space>", "B", "C", "É", "<sos/eos>"]


@pytest.mark.parametrize("token_type", ["bpe", "char"])
def test_espnet_reads_the_tokens(tmp_path: Path, token_type: str):
    from espnet2.text.build_tokenizer import build_tokenizer
    from espnet2.text.token_id_converter import TokenIDConverter

    if token_type == "bpe":
        train_bpe(LINES, tmp_path, 36)
        tokenizer = build_tokenizer("bpe", bpemodel=str(tmp_path / "bpe.model"))
        assert tokenizer.text2tokens(LINES[7]) == piece_tokenizer(tmp_path / "bpe.model")(LINES[7])
    else:
        list_characters(LINES, tmp_path)
        tokenizer = build_tokenizer("char")
    converter = TokenIDConverter(str(tmp_path / "tokens.txt"))
    for line in LINES:
        ids = converter.tokens2ids(tokenizer.text2tokens(line))
        assert converter.unk_id not in ids
        assert tokenizer.tokens2text(converter.ids2tokens(ids)) == line


def test_sentencepiece_still_says_what_is_parsed():
    """The advice on sizes is read from this message; a new release may word it anew."""
    with pytest.raises(RuntimeError, match=r"Please set it to a value <= \d+"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=io.BytesIO(), vocab_size=5000, minloglevel=2
        )
