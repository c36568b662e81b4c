"""Stage 5: the token list of sentencepiece or of characters, in ESPnet's layout."""

import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece

from espnet_kv.errors import UserError
from espnet_kv.files import new_directory, write_text
from espnet_kv.recipe.kaldi import split_words

RESERVED = "\u2585"
"""Sentencepiece uses this character for unknown text and drops lines that contain it."""
BLANK, UNKNOWN, SPACE, SOS_EOS = "<blank>", "<unk>", "<space>", "<sos/eos>"


def train_bpe(
    lines: Iterable[str],
    out_dir: Path,
    nbpe: int,
    bpemode: str = "unigram",
    character_coverage: float = 1.0,
) -> None:
    """Train sentencepiece on transcripts; write bpe.model, bpe.vocab, tokens.txt, train.txt.

    tokens.txt holds <blank>, <unk>, the pieces and <sos/eos>, `nbpe` tokens in all. The output is
    deterministic. Lines of any length are used. Lines that sentencepiece normalises (full-width
    letters, ligatures, ...) cause a warning, because a model can produce only the normalised form.

    Args:
        lines: transcripts, without utterance ids.
        out_dir: ESPnet expects data/token_list/bpe_{bpemode}{nbpe}.
        bpemode: unigram or bpe.

    Raises:
        UserError: no text, an unknown mode, or `nbpe` too large or small for the text; a line
            contains RESERVED, or a piece has the name of one of ESPnet's tokens.
    """
    if bpemode not in ("unigram", "bpe"):
        raise UserError(f"bpemode {bpemode} is unknown: use unigram or bpe")
    text = _clean(lines)
    for line in text:
        if RESERVED in line:
            raise UserError(
                f"the character U+{ord(RESERVED):04X} ({RESERVED}) is reserved by sentencepiece; "
                f"remove it from the transcript {line[:60]!r}"
            )
    model = io.BytesIO()
    try:
        # Training from a file would write the file's name into the model.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=model,
            vocab_size=nbpe,
            model_type=bpemode,
            character_coverage=character_coverage,
            # In bytes; sentencepiece drops longer lines silently (default 4192).
            max_sentence_length=max(4192, 1 + max(len(line.encode()) for line in text)),
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, nbpe, len(text)) from error

    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(i) for i in ids]
    spoken = [p for i, p in zip(ids, pieces, strict=True) if not _is_special(processor, i)]
    for name in (BLANK, UNKNOWN, SPACE, SOS_EOS):
        if name in spoken:
            raise UserError(
                f"the text holds {name} so often that it became a piece, but ESPnet has a token "
                "of that name; write it differently in the transcripts"
            )
    changed = [line for line in text if split_words(processor.normalize(line)) != line]
    if changed:
        print(
            f"warning: {out_dir.name}: sentencepiece normalises {len(changed)} of {len(text)} "
            f"lines, so hypotheses will differ from these references (the first: "
            f"{changed[0][:60]!r} becomes {split_words(processor.normalize(changed[0]))[:60]!r})",
            file=sys.stderr,
            flush=True,
        )
    with new_directory(out_dir) as partial:
        (partial / "bpe.model").write_bytes(model.getvalue())
        write_text(
            partial / "bpe.vocab",
            "".join(f"{pieces[i]}\t{processor.get_score(i):g}\n" for i in ids),
        )
        write_text(partial / "train.txt", "".join(f"{line}\n" for line in text))
        _write_tokens(partial, [BLANK, UNKNOWN, *spoken, SOS_EOS])


def list_characters(lines: Iterable[str], out_dir: Path) -> None:
    """Write tokens.txt for token_type char: <blank> <unk> characters <sos/eos>.

    Characters, including <space>, are sorted by descending frequency, then by first occurrence:
    the order of espnet2.bin.tokenize_text, which asr.sh uses.

    Args:
        lines: transcripts, without utterance ids.
        out_dir: ESPnet expects data/token_list/char.

    Raises:
        UserError: no text.
    """
    counts = Counter(character for line in _clean(lines) for character in line)
    characters = [SPACE if one == " " else one for one, _ in counts.most_common()]
    with new_directory(out_dir) as partial:
        _write_tokens(partial, [BLANK, UNKNOWN, *characters, SOS_EOS])


def piece_tokenizer(model: Path) -> Callable[[str], list[str]]:
    """The function text -> pieces of a bpe.model, for the token error rate.

    Raises:
        UserError: the model is missing or damaged.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{model} is not a sentencepiece model: run stage 5 again") from error
    return lambda text: processor.encode(text, out_type=str)


def _clean(lines: Iterable[str]) -> list[str]:
    text = [split_words(line) for line in lines]
    text = [line for line in text if line]
    if not text:
        raise UserError("there is no text to make tokens from: every transcript is empty")
    return text


def _is_special(processor: sentencepiece.SentencePieceProcessor, i: int) -> bool:
    return processor.is_unknown(i) or processor.is_control(i)


def _write_tokens(directory: Path, tokens: list[str]) -> None:
    write_text(directory / "tokens.txt", "".join(f"{token}\n" for token in tokens))


def _explained(error: RuntimeError, nbpe: int, lines: int) -> UserError:
    """Turn sentencepiece's error about the vocabulary size into advice."""
    if found := re.search(r"value <= (\d+)", str(error)):
        return UserError(
            f"nbpe {nbpe} is too large for this text ({lines} lines): "
            f"the largest possible value is {found[1]}"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return UserError(
            f"nbpe {nbpe} is too small for the characters of this text: "
            f"use at least {found[1]} or lower the character coverage"
        )
    return UserError(f"sentencepiece cannot train with nbpe {nbpe}: {error}")
