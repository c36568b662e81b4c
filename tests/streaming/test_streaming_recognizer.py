"""The recognizer in pieces against ESPnet's model on the whole, and its segments and refusals."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import CHUNKS, FRAME, RATE, TOKENS, build, save, speech

from espnet_kv.errors import UserError
from espnet_kv.streaming.ctc import build_search
from espnet_kv.streaming.frontend import TooShortError
from espnet_kv.streaming.recognizer import StreamingRecognizer
from espnet_kv.streaming.transcript import Hypothesis

MODELS = {
    "conformer-mla": {},
    "conformer-mha": {"encoder_conf": {"attention_type": "mha", "attention_conf": {}}},
    "conformer-linear": {"encoder_conf": {"attention_type": "linear", "attention_conf": {}}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: build(tmp_path_factory.mktemp(name), **conf) for name, conf in MODELS.items()}


@pytest.fixture
def recognizer(models):
    """Makes a recognizer over a copy of one of MODELS."""

    def make(name: str = "conformer-mla", **options) -> StreamingRecognizer:
        model, args = models[name]
        return StreamingRecognizer(
            asr_model=copy.deepcopy(model), asr_train_args=args, **{"ctc_weight": 0.9} | options
        )

    return make


def in_pieces(recognizer: StreamingRecognizer, audio: torch.Tensor, sizes: list[int]):
    bounds = [0, *itertools.accumulate(sizes)]
    bounds = [bound for bound in bounds if bound < len(audio)] + [len(audio)]
    for start, stop in itertools.pairwise(bounds[:-1]):
        recognizer(audio[start:stop], is_final=False)
    return recognizer(audio[bounds[-2] :], is_final=True)


def summary(results) -> list[tuple]:
    return [(text, token, ids, hypothesis.score) for text, token, ids, hypothesis in results]


def assert_same(got, expected) -> None:
    assert [row[:3] for row in summary(got)] == [row[:3] for row in summary(expected)]
    scores = [row[3] for row in summary(expected)]
    assert [row[3] for row in summary(got)] == pytest.approx(scores, abs=1e-3)


class TestAgainstTheWhole:
    @pytest.mark.parametrize("name", MODELS)
    def test_it_recognizes(self, recognizer, name):
        stream = recognizer(name)
        for letters in ("ABBA", "B", "AAAB"):
            ((text, token, token_int, _),) = stream(speech(letters))
            assert (text, token) == (letters, list(letters))
            assert token_int == [TOKENS.index(letter) for letter in letters]

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("weight", [1.0, 0.6], ids=["ctc", "rescored"])
    @pytest.mark.parametrize("beam_size", [1, 5], ids=["greedy", "beam"])
    def test_it_is_espnets_model_searched_at_once(
        self, models, recognizer, name, weight, beam_size
    ):
        model, _ = models[name]
        audio = speech("ABBAB")
        stream = recognizer(name, beam_size=beam_size, ctc_weight=weight, nbest=5, penalty=0.3)
        got = in_pieces(stream, audio, [1000] * 60)

        with torch.no_grad():
            encoded, _ = model.encode(audio[None], torch.tensor([len(audio)]))
            log_probs = model.ctc.log_softmax(encoded)[0]
            search = build_search(beam_size)
            search.advance(log_probs)
            expected = []
            for tokens, ctc, *_ in search.nbest(beam_size):
                ids = torch.tensor([tokens])
                nll = model.nll(
                    encoded, torch.tensor([encoded.size(1)]), ids, torch.tensor([len(tokens)])
                )
                attention = 0.0 if weight == 1 else (1 - weight) * -float(nll)
                expected.append((weight * ctc + attention + 0.3 * len(tokens), tokens))
        expected.sort(reverse=True)
        assert [ids for _, _, ids, _ in got] == [tokens for _, tokens in expected]
        scores = [score for score, _ in expected]
        assert [result[3].score for result in got] == pytest.approx(scores, abs=1e-3)

    @pytest.mark.parametrize("chunk_size", [1, 3, 16, 40])
    @pytest.mark.parametrize("left_chunks", [0, 2, -1])
    def test_a_model_takes_any_chunks(self, models, recognizer, chunk_size, left_chunks):
        """The log-probabilities it searches are those of one pass under these chunks' mask."""
        model = copy.deepcopy(models["conformer-mla"][0])
        model.encoder.chunk_size, model.encoder.left_chunks = chunk_size, left_chunks
        audio = speech("ABBAB")
        with torch.no_grad():
            encoded, _ = model.encode(audio[None], torch.tensor([len(audio)]))
            search = build_search(10)
            search.advance(model.ctc.log_softmax(encoded)[0])
        options = {"chunk_size": chunk_size, "left_chunks": left_chunks, "ctc_weight": 1.0}
        got = in_pieces(recognizer(nbest=3, **options), audio, [900] * 60)
        assert [ids for _, _, ids, _ in got] == [
            hypothesis.tokens for hypothesis in search.nbest(3)
        ]
        scores = [hypothesis.score for hypothesis in search.nbest(3)]
        assert [result[3].score for result in got] == pytest.approx(scores, abs=1e-3)

    def test_two_recognizers_of_one_model_keep_their_chunks(self, models):
        """They take turns, stream after stream, and the model stays as it is."""
        model, args = models["conformer-mla"]
        own = model.encoder.chunk_size, model.encoder.left_chunks
        chosen = [(4, 2), (16, 0)]
        both = [
            StreamingRecognizer(
                asr_model=model, asr_train_args=args, chunk_size=size, left_chunks=left, beam_size=3
            )
            for size, left in chosen
        ]
        audio = speech("ABBAB")
        alone = [in_pieces(one, audio, [900] * 60) for one in both]
        first, second = ([] for _ in both)
        for piece in [*audio.split(900), None]:
            for one, found in zip(both, (first, second), strict=True):
                last = piece is None
                found[:] = one(audio[:0] if piece is None else piece, is_final=last)
        for found, expected in zip((first, second), alone, strict=True):
            assert [r[2] for r in found] == [r[2] for r in expected]
            assert found[0][3].score == pytest.approx(expected[0][3].score, abs=1e-4)
        assert [(one._state.chunk_size, one._state.left_chunks) for one in both] == chosen
        assert (model.encoder.chunk_size, model.encoder.left_chunks) == own

    @given(sizes=st.lists(st.sampled_from([0, 1, 37, 160, 999, 2560, 20000]), max_size=30))
    @settings(
        max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @pytest.mark.parametrize("pause_ms", [0, 200], ids=["whole", "segments"])
    def test_any_pieces_give_the_same(self, recognizer, pause_ms, sizes):
        stream = recognizer(endpoint_silence_ms=pause_ms, nbest=3)
        audio = speech("AB_BA")
        assert_same(in_pieces(stream, audio, sizes), stream(audio))

    @pytest.mark.parametrize("cache_dtype", ["fp16", "int8"])
    def test_a_smaller_cache_takes_fewer_bytes(self, recognizer, cache_dtype):
        full, small = recognizer(), recognizer(cache_dtype=cache_dtype)
        audio = speech("ABBA")
        for stream in (full, small):
            stream(audio, is_final=False)
        assert small.partial[0] == full.partial[0] == "ABBA"
        assert small.nbytes_by_kind()["attention"] < full.nbytes_by_kind()["attention"]

    def test_half_and_double_precision(self, recognizer):
        for dtype in ("float16", "bfloat16", "float64"):
            assert recognizer(dtype=dtype)(speech("ABA"))[0][0] == "ABA"

    def test_integers_of_a_numpy_file_must_be_scaled(self, recognizer):
        stream = recognizer()
        with pytest.raises(UserError, match="int16"):
            stream(np.zeros(1000, np.int16))
        assert stream(speech("AB").numpy())[0][0] == "AB"

    def test_a_very_long_piece_is_taken_in_parts(self, recognizer, monkeypatch):
        stream = recognizer()
        expected = stream(speech("ABAB"))
        monkeypatch.setattr("espnet_kv.streaming.recognizer.LONGEST_PIECE_SECONDS", 1)
        sizes = []
        frontend = stream.frontend
        stream.frontend = lambda piece, final: sizes.append(len(piece)) or frontend(piece, final)
        stream.frontend.reset = frontend.reset
        stream.frontend.nbytes = 0
        monkeypatch.setattr(type(stream), "sample_rate", RATE)
        assert_same(stream(speech("ABAB")), expected)
        assert max(sizes) == RATE and len(sizes) > 2


class TestResults:
    def test_words_come_while_the_audio_comes(self, recognizer):
        stream = recognizer()
        audio = speech("ABB")
        texts = [stream(piece, is_final=False)[0][0] for piece in audio[:-1].split(FRAME)]
        assert texts[0] == "" and texts[-1] == "ABB"
        assert "A" in texts and "AB" in texts
        assert stream(audio[-1:], is_final=True)[0][0] == "ABB"

    def test_after_the_last_piece_the_next_stream_begins(self, recognizer):
        stream = recognizer()
        first = stream(speech("AB"))
        stream(speech("BBB"), is_final=False)
        stream.reset()
        assert_same(stream(speech("AB")), first)

    def test_hypotheses_are_espnets(self, recognizer):
        (*_, hypothesis), second = recognizer(nbest=2)(speech("AB"))
        assert isinstance(hypothesis, Hypothesis)
        assert hypothesis.yseq.tolist() == [4, 2, 3, 4]  # sos A B eos
        scores = hypothesis.scores
        assert hypothesis.score == pytest.approx(0.9 * scores["ctc"] + 0.1 * scores["decoder"])
        assert hypothesis.score > second[3].score

    def test_a_penalty_changes_the_order(self, recognizer):
        audio = speech("ABAB")
        lengths = {len(ids) for _, _, ids, _ in recognizer(nbest=10)(audio)}
        assert len(lengths) > 1
        for penalty, expected in ((-50.0, min(lengths)), (50.0, max(lengths))):
            assert len(recognizer(penalty=penalty)(audio)[0][2]) == expected

    def test_ctc_alone_holds_no_encoder_output(self, recognizer):
        held = {}
        for weight in (1.0, 0.9):
            stream = recognizer(ctc_weight=weight)
            stream(speech("ABAB"), is_final=False)
            held[weight] = stream.nbytes_by_kind()
        frames = len(speech("ABAB")) // FRAME
        assert held[1.0]["encoder_out"] == 0
        assert 4 * 32 * (frames - 8) < held[0.9]["encoder_out"] <= 4 * 32 * frames
        assert held[1.0]["attention"] > 0

    def test_a_model_without_decoder_uses_ctc_alone(self, tmp_path):
        model, args = build(tmp_path, model_conf={"ctc_weight": 1.0})
        stream = StreamingRecognizer(asr_model=model, asr_train_args=args, ctc_weight=0.5)
        assert stream(speech("AB"))[0][0] == "AB"
        assert stream.decoder.ctc_weight == 1.0


class TestSegments:
    def test_a_pause_ends_one_and_its_words_are_final(self, recognizer):
        stream = recognizer(endpoint_silence_ms=600)
        audio = speech("AB__BA_")  # a pause within, of 0.3 s, ends nothing; 1.7 s do
        ended, held = [], []
        for piece in audio.split(700):
            ended += stream.accept(piece)
            held.append(stream.nbytes_by_kind()["encoder_out"])
        assert [results[0][0] for results in ended] == ["AB", "BA"]
        assert stream.partial[0] == ""
        assert stream.accept(audio[:0], is_final=True) == []
        assert max(held) < 4 * 32 * len(audio) / FRAME / 2  # dropped at every pause

    def test_the_text_of_the_stream_is_that_of_its_segments(self, recognizer):
        stream = recognizer(endpoint_silence_ms=600, nbest=2)
        results = in_pieces(stream, speech("AB__BA_"), [800] * 200)
        first, second = results
        assert first[0] == "ABBA"
        assert first[3].score > second[3].score and second[2][:2] == first[2][:2]

    def test_words_do_not_change_once_they_are_final(self, recognizer):
        stream = recognizer(endpoint_silence_ms=600)
        texts = [stream(p, is_final=False)[0][0] for p in speech("AB__BA_").split(500)]
        after = texts[texts.index("ABB") :]
        assert all(text.startswith("AB") for text in after)

    def test_what_one_piece_ended_is_dropped_too(self, recognizer):
        stream = recognizer(endpoint_silence_ms=600)
        audio = speech("AB__BA")
        stream.accept(audio)
        assert 0 < stream.nbytes_by_kind()["encoder_out"] < 4 * 32 * len(audio) / FRAME / 2

    def test_silence_is_no_segment(self, recognizer, monkeypatch):
        assert recognizer().accept(speech("_____"), is_final=True) == []
        assert recognizer()(speech("_____"))[0][:3] == ("", [], [])
        # and the decoder, which would rather write something, is not asked about it
        stream = recognizer(endpoint_silence_ms=300)
        monkeypatch.setattr(stream.decoder, "_attention_scores", lambda *_: pytest.fail("rescored"))
        assert stream.accept(speech("_____"), is_final=True) == []

    def test_without_pauses_the_longest_duration_ends_them(self, recognizer):
        stream = recognizer(max_segment_seconds=1.5)
        audio = speech("ABABABAB")
        ended = stream.accept(audio) + stream.accept(audio[:0], is_final=True)
        assert "".join(results[0][0] for results in ended) == "ABABABAB"
        assert 3 <= len(ended) <= 6

    def test_a_tone_that_is_cut_is_written_once(self, recognizer):
        stream = recognizer(max_segment_seconds=1.0, ctc_weight=1.0)
        ended = stream.accept(speech("A", seconds=5.0), is_final=True)
        assert "".join(results[0][0] for results in ended) == "A"

    def test_hours_take_no_more_memory_than_minutes(self, recognizer):
        stream = recognizer(endpoint_silence_ms=500, left_chunks=2)
        audio = speech("ABBA_BA__B_")
        most = []
        for _ in range(6):
            for piece in audio.split(4000):
                stream.accept(piece)
            most.append(dict(stream.peak_nbytes))
        assert most[1] == most[-1]
        assert stream.partial[2] == [] and not stream._segments


class TestRefusals:
    @pytest.fixture
    def options(self, tmp_path) -> dict:
        save(tmp_path)
        return {
            "asr_train_config": tmp_path / "config.yaml",
            "asr_model_file": tmp_path / "model.pth",
        }

    def refused(self, said: str, **options) -> None:
        with pytest.raises(UserError, match=said) as caught:
            StreamingRecognizer(**options)
        assert "\n" not in str(caught.value)

    def changed(self, options: dict, **changes) -> dict:
        config = yaml.safe_load(options["asr_train_config"].read_text())
        for key, value in changes.items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        options["asr_train_config"].write_text(yaml.safe_dump(config))
        return options

    def test_files_load(self, options):
        assert StreamingRecognizer(**options, ctc_weight=1.0)(speech("AB"))[0][0] == "AB"

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"beam_size": 0}, "beam_size 0: allowed: whole numbers from 1 to 10000"),
            ({"beam_size": 2.5}, "beam_size 2.5"),
            ({"ctc_weight": 1.5}, "ctc_weight 1.5: allowed: 0 to 1"),
            ({"ctc_weight": math.nan}, "ctc_weight nan: a finite number is needed"),
            ({"penalty": math.inf}, "penalty inf: a finite number is needed"),
            ({"endpoint_silence_ms": -1}, "endpoint_silence_ms -1: allowed: 0 or more"),
            ({"max_segment_seconds": math.inf}, "max_segment_seconds inf: a finite number"),
            ({"token_type": "bpe"}, "token_type bpe: the model has char tokens; leave it out"),
            ({"chunk_size": 0}, "chunk_size 0: allowed: 1 or more encoder frames"),
            ({"left_chunks": -2}, "left_chunks -2: allowed: -1"),
            ({"cache_dtype": "int3"}, "int3"),
            ({"dtype": "int8"}, "dtype int8: unknown"),
        ],
        ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
    )
    def test_options(self, options, wrong, said):
        self.refused(said, **options, **wrong)

    def test_a_tokenizer_that_is_not_there(self, options):
        self.changed(options, token_type="bpe", bpemodel="no.model")
        self.refused("no.model does not exist.*give bpemodel", **options)
        self.refused("other.model does not exist", **options, bpemodel="other.model")

    def test_a_model_without_chunks_needs_a_chunk_size(self, options):
        self.changed(options, encoder_conf={"chunk_size": 0})
        self.refused("give chunk_size", **options)
        assert StreamingRecognizer(**options, **CHUNKS, ctc_weight=1)(speech("B"))[0][0] == "B"

    def test_what_looks_ahead(self, tmp_path):
        model, args = build(tmp_path, encoder_conf={"causal": False})
        self.refused("causal", asr_model=model, asr_train_args=args)

    def test_espnets_own_encoders(self, tmp_path):
        changes = {"encoder": "transformer", "encoder_conf": None}
        model, args = build(tmp_path, **changes)
        self.refused("encoder: transformer does not stream", asr_model=model, asr_train_args=args)

    def test_a_model_without_ctc(self, tmp_path, models):
        model, args = models["conformer-mla"]
        model = copy.deepcopy(model)
        model.ctc = None
        self.refused("trained no CTC", asr_model=model, asr_train_args=args)

    def test_volume_normalisation(self, options):
        self.changed(options, speech_volume_normalize=0.5)
        self.refused("speech_volume_normalize needs the whole utterance", **options)

    def test_missing_and_damaged_files(self, options, tmp_path):
        nothing = tmp_path / "nothing"
        self.refused("nothing does not exist", **options | {"asr_model_file": nothing})
        self.refused("nothing does not exist", **options | {"asr_train_config": nothing})
        nothing.write_text("x")
        self.refused("nothing is not a model file", **options | {"asr_model_file": nothing})
        for text in ("x", "a: [", "beam_size: 3"):
            nothing.write_text(text)
            self.refused("nothing is not a config.yaml", **options | {"asr_train_config": nothing})

    def test_statistics_are_those_of_the_checkpoint(self, options, tmp_path):
        (tmp_path / "feats_stats.npz").unlink()
        assert StreamingRecognizer(**options, ctc_weight=1.0)(speech("AB"))[0][0] == "AB"

    def test_a_checkpoint_of_another_model(self, options):
        self.changed(options, encoder_conf={"attention_conf": {"kv_rank": 4}})
        self.refused("model.pth: .*linear_kv_down", **options)

    def test_a_stream_that_is_too_short_is_forgotten(self, recognizer):
        stream = recognizer()
        with pytest.raises(TooShortError):
            stream(torch.zeros(50))
        assert stream(speech("AB"))[0][0] == "AB"
        assert stream(torch.zeros(300))[0][:3] == ("", [], [])  # features, but no encoder frame
