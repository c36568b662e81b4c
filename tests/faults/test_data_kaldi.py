"""Kaldi files as users have them: other systems' line ends, marks, spaces and encodings."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from espnet_kv.errors import UserError
from espnet_kv.recipe.corpora import name_sources, prepare
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.format import format_audio
from espnet_kv.recipe.lengths import filter_lengths
from espnet_kv.recipe.lengths import shortest_seconds as seconds_for
from espnet_kv.recipe.tokens import list_characters, piece_tokenizer, train_bpe


def write(directory: Path, **files: str | bytes | None) -> Path:
    directory.mkdir(parents=True)
    whole = {
        "wav_scp": "u1 /a/u1.wav\nu2 /a/u2.wav\n",
        "text": "u1 ONE\nu2 TWO\n",
        "utt2spk": "u1 s\nu2 t\n",
    }
    for name, lines in (whole | files).items():
        if lines is not None:
            content = lines if isinstance(lines, bytes) else lines.encode()
            (directory / name.replace("_", ".", name == "wav_scp")).write_bytes(content)
    return directory


def train_largest(lines: list[str], out: Path, bpemode: str = "unigram") -> None:
    """Train with as many pieces as the text allows."""
    with pytest.raises(UserError, match="too large") as refusal:
        train_bpe(lines, out, 5000, bpemode)
    train_bpe(lines, out, int(re.search(r"value is (\d+)", str(refusal.value))[1]), bpemode)


CLEAN = DataDir(
    {"u1": "/a/u1.wav", "u2": "/a/u2.wav"}, {"u1": "ONE", "u2": "TWO"}, {"u1": "s", "u2": "t"}
)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: "\ufeff" + content,
        lambda content: content.replace("\n", "\r\n"),
        lambda content: content.replace("\n", "\r"),
        lambda content: content.replace(" ", "\t"),
        lambda content: content.replace(" ", "  \t ").replace("\n", " \t\n"),
        lambda content: content.replace(" ", "\u00a0"),
        lambda content: content.replace(" ", "\u3000"),
        lambda content: content.removesuffix("\n"),
        lambda content: content + "\n \n",
        lambda content: content.replace("\nu2", "\n\ufeffu2"),  # two files put together
    ],
    ids=[
        "byte order mark", "CRLF", "CR", "tabs", "many spaces", "NBSP", "ideographic space",
        "no last newline", "blank lines at the end", "mark in the middle",
    ],
)  # fmt: skip
def test_other_people_s_files_read_as_their_authors_meant_them(tmp_path, change):
    files = {
        "wav_scp": "u1 /a/u1.wav\nu2 /a/u2.wav\n",
        "text": "u1 ONE\nu2 TWO\n",
        "utt2spk": "u1 s\nu2 t\n",
    }
    data = DataDir.read(write(tmp_path / "d", **{k: change(v) for k, v in files.items()}))
    assert data == CLEAN


@pytest.mark.parametrize(
    "space", ["\u00a0", "\u3000", "\u2009", "\u200b", "\u2581", "\x1f", "\x85"]
)
def test_words_are_the_same_in_text_tokens_and_scoring(tmp_path, space):
    data = DataDir.read(write(tmp_path / "d", text=f"u1 ONE{space}TWO\nu2 THREE\n"))
    assert data.text["u1"] == "ONE TWO"
    data.write(tmp_path / "copy")
    line = (tmp_path / "copy" / "text").read_text().splitlines()[0]
    assert line.split(maxsplit=1) == ["u1", "ONE TWO"], "ESPnet splits lines like this"
    train_largest([f"ONE{space}TWO THREE"] * 3, tmp_path / "bpe")
    assert (tmp_path / "bpe" / "train.txt").read_text() == "ONE TWO THREE\n" * 3
    pieces = piece_tokenizer(tmp_path / "bpe" / "bpe.model")(data.text["u1"])
    assert "".join(pieces).replace("\u2581", " ").split() == ["ONE", "TWO"]
    list_characters([f"A{space}B"], tmp_path / "char")
    tokens = (tmp_path / "char" / "tokens.txt").read_text().splitlines()
    assert tokens == ["<blank>", "<unk>", "A", "<space>", "B", "<sos/eos>"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"text": "u1 ONE\nu2 T\x07WO\n"}, r"text:2: utterance u2 has the character U\+0007"),
        ({"wav_scp": "u1 /a/\0.wav\n"}, r"wav\.scp:1: .*U\+0000"),
        ({"text": "u1 caf\ufffd\n"}, r"text:1: .*U\+FFFD.*fix the encoding"),
        ({"wav_scp": "u\u200b1 /a.wav\n"}, r"wav\.scp:1: the id 'u\\u200b1' has an invisible"),
        (
            {"text": b"u1 ONE\nu2 caf\xe9\n"},
            r"text: not UTF-8 at byte 13 \(line 2\).*iconv -f LATIN1",
        ),
        ({"text": "u1 ONE\n".encode("utf-16")}, r"text: UTF-16, not UTF-8.*iconv -f UTF-16"),
        ({"wav_scp": "u1 a.wav\nu1 b.wav\n"}, r"wav\.scp:2: utterance u1 occurs twice"),
        ({"utt2spk": "u1 s\nu1 t\n"}, r"utt2spk:2: utterance u1 occurs twice"),
        ({"utt2spk": None}, r"utt2spk is missing, and so is spk2utt; .*of its own"),
        ({"utt2spk": None, "spk2utt": "s u1\nt u1 u2\n"}, r"spk2utt:2: utterance u1 occurs twice"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as caught:
        DataDir.read(write(tmp_path / "d", **files))
    assert "\n" not in str(caught.value)


def test_speakers_come_from_spk2utt_where_utt2spk_is_absent(tmp_path):
    assert DataDir.read(write(tmp_path / "d", utt2spk=None, spk2utt="s u1\nt u2\n")) == CLEAN


def test_a_file_that_is_a_directory_is_named(tmp_path):
    (write(tmp_path / "d", text=None) / "text").mkdir()
    with pytest.raises(UserError, match="text is a directory"):
        DataDir.read(tmp_path / "d")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """As speechocean762 comes: tabs, paths relative to the root, speakers no prefix of ids."""
    root = tmp_path / "corpus"
    (root / "WAVE").mkdir(parents=True)
    lines = []
    for number in range(6):
        samples = np.random.default_rng(number).uniform(-0.3, 0.3, 16000)
        soundfile.write(root / "WAVE" / f"9{number}.wav", samples, 16000, subtype="PCM_16")
        lines.append((f"9{number}", f"WAVE/9{number}.wav", f"WORD {number}", f"{5 - number:02d}"))
    for name, part in {"train": lines[:4], "test": lines[4:]}.items():
        files = ["".join(f"{line[0]}\t{line[column]}\n" for line in part) for column in (1, 2, 3)]
        write(root / name, wav_scp=files[0], text=files[1], utt2spk=files[2])
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return root


def test_relative_paths_count_from_the_data_directory_s_parent(elsewhere, capsys):
    data = DataDir.read(elsewhere / "train")
    assert data.wav_scp["90"] == f"{elsewhere}/WAVE/90.wav"
    DataDir.read(elsewhere / "train")  # is said once
    printed = capsys.readouterr().out
    assert f"4 relative paths count from {elsewhere}\n" in printed and printed.count("\n") == 1


def test_relative_paths_count_from_the_working_directory_first(elsewhere, monkeypatch, capsys):
    monkeypatch.chdir(elsewhere)
    assert DataDir.read(Path("train")).wav_scp["90"] == "WAVE/90.wav"
    assert capsys.readouterr().out == ""


def test_a_user_s_directories_are_brought_in_as_they_are(elsewhere, capsys):
    given = [elsewhere / "train", elsewhere / "test"]
    sources = name_sources(given, Path("data"))
    corpus = prepare("kaldi", Path("data"), download_dir=Path("no"), sources=sources)
    assert sorted(corpus.sets) == ["test", "train"]
    assert re.search(r"data/train: 4 utterances, 4 speakers", capsys.readouterr().out)
    format_audio(Path("data/train"), Path("dump/train"), keep_all=True)
    data = DataDir.read(Path("dump/train"))
    assert data.utt2spk == {"90": "05", "91": "04", "92": "03", "93": "02"}
    assert Path("dump/train/spk2utt").read_text().split()[::2] == ["02", "03", "04", "05"]
    prepare("kaldi", Path("data"), download_dir=Path("no"), sources=sources)  # again


def test_directories_inside_the_recipe_s_own_are_not_overwritten(elsewhere, tmp_path):
    (elsewhere / "train").rename(tmp_path / "train")
    sources = name_sources([tmp_path / "train"], tmp_path)
    assert list(sources) == [f"{tmp_path.name}_train"]
    before = (tmp_path / "train" / "wav.scp").read_text()
    (elsewhere / "WAVE").rename(tmp_path / "WAVE")
    prepare("kaldi", tmp_path, download_dir=tmp_path, sources=sources)
    assert (tmp_path / "train" / "wav.scp").read_text() == before
    with pytest.raises(UserError, match=r"exists and was not made .*another data_dir"):
        prepare("kaldi", tmp_path, download_dir=tmp_path, sources={"train": elsewhere / "test"})


def test_directories_of_one_name_are_told_apart(tmp_path):
    for path in ("a/test", "b/test", "a/train", "a/train_sp"):
        (tmp_path / path).mkdir(parents=True)
    paths = [tmp_path / path for path in ("a/train", "a/test", "b/test", "a/test", "a/train_sp")]
    assert list(name_sources(paths, tmp_path / "data")) == [
        "train", "test", "b_test", "a_train_sp",
    ]  # fmt: skip
    with pytest.raises(UserError, match="gone is not a data directory"):
        name_sources([tmp_path / "gone"], tmp_path)


def test_audio_that_is_nowhere_is_said_at_once(elsewhere):
    (elsewhere / "WAVE").rename(elsewhere / "moved")
    with pytest.raises(UserError, match=r"none of its 4 audio files exists.*relative paths count"):
        prepare("kaldi", Path("data"), download_dir=Path("n"), sources={"x": elsewhere / "train"})
    assert not Path("data").exists()


def test_a_test_set_that_shares_utterances_with_training_is_warned_of(elsewhere, capsys):
    write(elsewhere / "dev", **{
        "wav_scp": "x WAVE/90.wav\ny WAVE/95.wav\n", "text": "x A\ny B\n", "utt2spk": "x s\ny s\n"
    })  # fmt: skip
    sources = {"train": elsewhere / "train", "dev": elsewhere / "dev"}
    prepare("kaldi", Path("data"), download_dir=Path("no"), sources=sources)
    assert "warning: 1 of 2 utterances of dev are in train as well" in capsys.readouterr().err


# --- tokens and lengths


def test_a_line_too_long_for_sentencepiece_is_trained_on_all_the_same(tmp_path, capfd, monkeypatch):
    import sentencepiece

    long = " ".join(["ONCE UPON A TIME"] * 400) + " Z"
    lines = ["ONE TWO THREE"] * 20 + [long]
    train = sentencepiece.SentencePieceTrainer.train
    monkeypatch.setattr(
        sentencepiece.SentencePieceTrainer,
        "train",
        lambda **options: train(**options | {"minloglevel": 0}),
    )
    train_largest(lines, tmp_path / "bpe")
    assert "Loaded all 21 sentences" in capfd.readouterr().err
    assert "Z" in "".join((tmp_path / "bpe" / "tokens.txt").read_text().split())


def test_a_character_that_sentencepiece_leaves_out_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"U\+2585 .*reserved by sentencepiece.*'A▅B'"):
        train_bpe(["HELLO WORLD", "A▅B"], tmp_path / "bpe", 15)


def test_text_that_sentencepiece_normalises_is_warned_of(tmp_path, capsys):
    train_largest(["HELLO WORLD", "\uff21\uff22\uff23 LO"], tmp_path / "bpe")
    warning = capsys.readouterr().err
    assert (
        "normalises 1 of 2 lines" in warning
        and "'\uff21\uff22\uff23 LO' becomes 'ABC LO'" in warning
    )


@pytest.mark.parametrize("name", ["<unk>", "<blank>", "<space>", "<sos/eos>", "<s>"])
@pytest.mark.parametrize("token_type", ["unigram", "bpe", "char"])
def test_names_of_special_tokens_in_the_text_break_no_token_list(tmp_path, name, token_type):
    lines = [f"SAY {name} AND{name}{name} TO {word}" for word in ("ME", "YOU", "HIM")] * 5
    if token_type == "char":
        list_characters(lines, tmp_path / "t")
    else:
        train_largest(lines, tmp_path / "t", token_type)
    tokens = (tmp_path / "t" / "tokens.txt").read_text().splitlines()
    assert len(tokens) == len(set(tokens))


@pytest.mark.parametrize("layer", ["conv2d", "conv2d1", "conv2d2", "conv2d6", "conv2d8", "linear"])
def test_the_shortest_utterance_is_the_one_that_espnet_takes(layer):
    import torch
    from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
    from espnet2.asr.frontend.default import DefaultFrontend
    from espnet2.legacy.nets.pytorch_backend.transformer.subsampling import TooShortUttError

    frontend_conf = {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 24}
    config = {"frontend_conf": frontend_conf, "encoder_conf": {"input_layer": layer}}
    frontend = DefaultFrontend(**frontend_conf)
    encoder = ConformerEncoder(
        24, 8, attention_heads=2, linear_units=8, num_blocks=1, input_layer=layer,
        rel_pos_type="latest", pos_enc_layer_type="rel_pos",
        selfattention_layer_type="rel_selfattn",
    ).eval()  # fmt: skip

    def encode(samples: int) -> int:
        length = torch.tensor([samples])
        feats, lengths = frontend(torch.randn(1, samples), length)
        return encoder(feats, lengths)[1].item()

    least = round(seconds_for(config) * 16000)
    assert encode(least) >= 1
    with pytest.raises((TooShortUttError, RuntimeError)):
        encode(least - 1)


def test_the_least_length_is_in_seconds_at_any_rate_and_hop():
    config = {"frontend_conf": {"hop_length": 80}, "encoder_conf": {"input_layer": "conv2d8"}}
    assert seconds_for(config, 8000) == pytest.approx(14 * 80 / 8000)
    assert seconds_for({}) == pytest.approx(6 * 128 / 16000)
    assert seconds_for({"frontend": "s3prl"}) == pytest.approx(0.14)


def test_what_is_too_short_for_the_model_goes_and_is_counted(elsewhere, tmp_path):
    soundfile.write(elsewhere / "WAVE" / "90.wav", np.full(2000, 0.1), 16000)
    format_audio(elsewhere / "train", tmp_path / "org")
    filter_lengths(tmp_path / "org", tmp_path / "kept", 0, 20, shortest_seconds=0.14)
    dropped = (tmp_path / "kept" / "dropped").read_text()
    assert dropped == "90 too short: 0.12 s, the least is 0.14 s\n"
    assert len(DataDir.read(tmp_path / "kept").wav_scp) == 3


def test_a_damaged_count_of_samples_is_named(elsewhere, tmp_path):
    format_audio(elsewhere / "train", tmp_path / "org")
    (tmp_path / "org" / "utt2num_samples").write_text("90\n")
    with pytest.raises(UserError, match=r"utt2num_samples:1: no number.*format the audio again"):
        filter_lengths(tmp_path / "org", tmp_path / "kept", 0, 20)
