"""The synth corpus: deterministic whatever the order, disjoint sets, one vocabulary."""

import importlib.metadata
import itertools
import json
import random

import numpy as np
import pytest
import soundfile

from espnet_kv.errors import UserError
from espnet_kv.recipe.corpora import acoustics, espeak, prepare, synth
from espnet_kv.recipe.corpora.grammar import Grammar
from espnet_kv.recipe.corpora.synth import SynthOptions, generate, plan, render
from espnet_kv.recipe.datadir import DataDir

TINY = SynthOptions(train=60, dev=2, test=2, seed=3)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("synth") / "LibriSpeech"
    generate(tree, TINY)
    return tree


def content(tree):
    return {file.relative_to(tree): file.read_bytes() for file in tree.rglob("*") if file.is_file()}


def words_of(utterances):
    return {word for utterance in utterances for word in utterance.words.split()}


def test_sets_share_words_but_no_sentence():
    utterances = plan(SynthOptions())
    assert len({utterance.words for utterance in utterances}) == len(utterances) == 2720
    assert len({utterance.id for utterance in utterances}) == len(utterances)
    train = [utterance for utterance in utterances if utterance.path.parts[0] == "train-clean-100"]
    others = [utterance for utterance in utterances if utterance not in train]
    assert len(train) == 2400
    assert words_of(others) <= words_of(train)
    assert 150 <= len(words_of(train)) <= 300
    assert all(3 <= len(utterance.words.split()) <= 8 for utterance in utterances)


def test_other_sets_have_voices_that_training_lacks():
    voices = {}
    for utterance in plan(SynthOptions()):
        voices.setdefault(utterance.path.parts[0], set()).add(utterance.voice)
    assert voices["dev-clean"] | voices["test-clean"] <= voices["train-clean-100"]
    assert not (voices["dev-other"] | voices["test-other"]) & voices["train-clean-100"]
    assert min(len(names) for names in voices.values()) >= 20


def test_word_order_says_who_does_what():
    grammar = Grammar(2)
    after: dict[str, set[str]] = {}
    for _ in range(500):
        for word, following in itertools.pairwise(grammar.sentence().split()):
            after.setdefault(word, set()).add(following)
    assert after["they"].isdisjoint({"is", "was", "walks", "eats"})
    assert after["she"].isdisjoint({"are", "were", "walk", "eat"})
    assert after["will"].isdisjoint({"ate", "eats", "walked", "sold"})
    assert after["twenty"].isdisjoint({"farmer", "apple", "dog"})


def test_samples_do_not_depend_on_what_was_spoken_before():
    utterances = random.Random(0).sample(plan(SynthOptions()), 8)
    first = {utterance.id: render(utterance) for utterance in utterances}
    for utterance in reversed(utterances):
        np.testing.assert_array_equal(render(utterance), first[utterance.id])


def test_two_processes_write_the_same_bytes(tree, tmp_path):
    generate(tmp_path / "tree", TINY, nj=2)
    assert content(tmp_path / "tree") == content(tree)


def test_the_audio_is_16_khz_mono_of_a_few_seconds(tree):
    for file in tree.rglob("*.flac"):
        samples, rate = soundfile.read(file)
        assert rate == 16000
        assert samples.ndim == 1
        assert 0.5 < len(samples) / rate < 5
        assert 0.2 < np.abs(samples).max() < 1


def test_a_finished_tree_is_left_alone_and_other_options_replace_it(tmp_path, monkeypatch):
    tree, options = tmp_path / "tree", SynthOptions(train=50, dev=1, test=1)
    monkeypatch.setattr(synth, "render", lambda utterance: np.zeros(160, np.int16))
    generate(tree, options)
    before = {file: file.stat().st_mtime_ns for file in tree.rglob("*")}
    generate(tree, options)
    assert {file: file.stat().st_mtime_ns for file in tree.rglob("*")} == before
    generate(tree, SynthOptions(train=50, dev=1, test=1, seed=1))
    assert json.loads((tree / "synth.json").read_text())["seed"] == 1
    assert len(list(tree.rglob("*.flac"))) == 54


def test_an_interrupted_run_leaves_no_tree_and_the_next_completes_it(tmp_path, monkeypatch):
    tree, options = tmp_path / "tree", SynthOptions(train=50, dev=1, test=1)
    calls = []

    def render(utterance):
        calls.append(utterance)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return np.zeros(160, np.int16)

    monkeypatch.setattr(synth, "render", render)
    with pytest.raises(KeyboardInterrupt):
        generate(tree, options)
    assert not tree.exists()
    generate(tree, options)
    assert len(list(tree.rglob("*.flac"))) == 54
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a synth corpus: move it away"):
        generate(tmp_path, TINY)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_missing_espeak_says_what_to_install(tmp_path, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match="pip install espeakng-loader"):
        generate(tmp_path / "tree", TINY)


def test_an_unknown_voice_is_named():
    with pytest.raises(UserError, match=r"with voice 'gmw/en-XX'.*pip install"):
        espeak.speak("hello", espeak.Voice("gmw/en-XX"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must not be negative"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SynthOptions(**options)


def test_too_few_training_sentences_are_refused():
    with pytest.raises(UserError, match="train=2: too few sentences"):
        plan(SynthOptions(train=2))


def test_prepare_makes_data_directories(tree, tmp_path):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "synth").symlink_to(tree.parent)
    prepare(
        "synth", tmp_path / "data", download_dir=downloads, synth=TINY,
        librispeech=tmp_path / "real speech, which synth does not want",
    )  # fmt: skip
    data = DataDir.read(tmp_path / "data" / "train_clean_100")
    assert len(data.wav_scp) == 60
    assert all(text == text.upper() for text in data.text.values())
    assert len(DataDir.read(tmp_path / "data" / "dev").wav_scp) == 4


def test_resampling_keeps_a_tone():
    def tone(rate):
        return np.sin(2 * np.pi * 1000 * np.arange(rate) / rate) * np.hanning(rate)

    resampled = acoustics.resample(tone(22050), 22050, 16000)
    assert resampled.shape == (16000,)
    np.testing.assert_allclose(resampled, tone(16000), atol=1e-3)


@pytest.mark.parametrize("kind", ["white", "pink", "hum"])
def test_noise_has_the_level_asked_for(kind):
    rng = np.random.default_rng(0)
    signal = np.sin(np.arange(16001) * 0.1)
    noisy = acoustics.add_noise(signal, kind, 10.0, 16000, rng)
    power = np.mean((noisy - signal) ** 2) / np.mean(signal**2)
    assert power == pytest.approx(0.1, rel=1e-6)


def test_reverberation_adds_a_decaying_tail():
    impulse = np.zeros(16000)
    impulse[100] = 1
    wet = acoustics.reverberate(impulse, 0.3, -10.0, 16000, np.random.default_rng(0))
    assert wet[100] == pytest.approx(1)
    assert np.sum(wet[101:] ** 2) == pytest.approx(0.1, rel=1e-6)
    assert np.sum(wet[132:2500] ** 2) > 10 * np.sum(wet[2500:] ** 2)
    np.testing.assert_allclose(wet[:100], 0, atol=1e-12)
