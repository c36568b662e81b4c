"""What a profile measures: bytes against arithmetic, lengths, searches, memory."""

import dataclasses
import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_encoders import ATTENTIONS, BLOCKS, FEATURES, attentions, build, encoders
from small_models import RATE, speech
from small_models import build as build_model
from streams import reachable
from torch.utils._python_dispatch import TorchDispatchMode

from espnet_kv.attention import ATTENTIONS as REGISTERED
from espnet_kv.attention.latent import MultiHeadLatentAttention
from espnet_kv.cache import Footprint
from espnet_kv.errors import UserError
from espnet_kv.espnet.register import CHOICES
from espnet_kv.profile import analytic, cache_bytes, growth, macs
from espnet_kv.profile.beam_search import Recognizer, measure_decoder, watch
from espnet_kv.profile.latency import Streamer, time_chunks, time_hour
from espnet_kv.profile.run import Options, attention_label, profile
from espnet_kv.profile.schema import Ratio
from espnet_kv.profile.sound import Sound, features
from espnet_kv.profile.subject import Source, Subject

CHUNK, LEFT = 4, 2
STREAMED = ATTENTIONS | {
    "mha-input": {"attention_type": "mha", "attention_conf": {"cache": "input"}}
}
dtypes = pytest.mark.parametrize("cache_dtype", ["fp32", "fp16", "bf16", "int8", "int4"])


def subject_of(encoder, name: str, attention: dict) -> Subject:
    """A subject as far as its cache is looked at."""
    model = SimpleNamespace(encoder=encoder, frontend=SimpleNamespace(output_size=lambda: FEATURES))
    args = SimpleNamespace(encoder=name, encoder_conf=attention)
    return Subject(Source(config={}), model, args, "cpu", CHUNK, LEFT)  # type: ignore[arg-type]


def tones() -> Sound:
    return Sound("tones", RATE, [speech(letters).numpy() for letters in ("AB", "BAA", "A")])


@pytest.fixture(scope="module")
def tone_subject(tmp_path_factory) -> Subject:
    """A model that recognizes tones, trained in name only."""
    torch.manual_seed(0)
    conf = {"self_attention_type": "mla", "self_attention_conf": {"kv_rank": 6}}
    model, args = build_model(
        tmp_path_factory.mktemp("model"), decoder="kv_transformer", decoder_conf=conf
    )
    return Subject(Source("config.yaml", "model.pth"), model, args, "cpu", CHUNK, LEFT)


class TestCache:
    @encoders
    @pytest.mark.parametrize("attention", STREAMED.values(), ids=STREAMED)
    @dtypes
    def test_what_a_stream_holds_is_what_arithmetic_says(self, name, attention, cache_dtype):
        encoder = build(name, causal=True, **attention)
        expected = cache_bytes.arithmetic(subject_of(encoder, name, attention))
        xs, marks = torch.randn(210, FEATURES), [5, 40, 97, 210]
        for left in (LEFT, 0, -1):
            for held, mark in zip(
                cache_bytes.hold(encoder, xs, marks, CHUNK, left, cache_dtype), marks, strict=True
            ):
                assert held.bytes == expected.bytes(mark, left, cache_dtype)
                assert held.frames == expected.frames(mark)
                for kind in ("attention", "conv"):
                    assert sum(getattr(layer, kind) for layer in held.layers) == held.bytes[kind]
                assert len(held.layers) == BLOCKS

    @encoders
    @pytest.mark.parametrize("attention", STREAMED.values(), ids=STREAMED)
    @pytest.mark.parametrize("left", [LEFT, -1], ids=["bounded", "unbounded"])
    def test_allocated_bytes_are_those_of_the_storage_behind_the_stream(
        self, name, attention, left, monkeypatch
    ):
        encoder = build(name, causal=True, **attention)
        states = []
        make = encoder.init_state
        monkeypatch.setattr(
            encoder, "init_state", lambda **own: states.append(make(**own)) or states[-1]
        )
        (held,) = cache_bytes.hold(encoder, torch.randn(210, FEATURES), [210], CHUNK, left, "int8")
        (state,) = states
        tables = state.tables.tables if state.tables else ()
        shared = {t.untyped_storage().data_ptr() for t in tables if t is not None}
        own = [tensor for key, tensor in reachable(state).items() if key not in shared]
        assert sum(held.allocated.values()) == sum(t.untyped_storage().nbytes() for t in own)
        assert held.allocated.keys() == held.bytes.keys()
        assert all(held.allocated[kind] >= count for kind, count in held.bytes.items())
        for kind in ("attention", "conv"):
            layers = [getattr(layer.allocated, kind) for layer in held.layers]
            assert sum(layers) == held.allocated[kind]

    def test_room_for_the_next_chunk_is_allocated(self):
        """Two chunks are held in a ring of three; sums need no room."""
        for kind, times in (("mha", 3 / 2), ("linear", 1)):
            encoder = build("kv_conformer", causal=True, attention_type=kind)
            (held,) = cache_bytes.hold(encoder, torch.randn(210, FEATURES), [210], CHUNK, LEFT)
            assert held.allocated["attention"] == times * held.bytes["attention"]
            assert held.allocated["conv"] == held.bytes["conv"]

    def test_position_tables_stand_apart(self, tone_subject):
        """(H, N+C-1, d_k) = 32 numbers for each of 12 + 4 - 1 distances, in two layers."""
        xs = features(tone_subject, tones().clip(4))
        position = cache_bytes.measure(tone_subject, xs, [4], "int8").position
        assert position == 2 * 15 * 32 * 4

    def test_compression_is_of_allocated_bytes(self, tone_subject):
        """A ring has slack, sums have none: by bytes held linear attention would win less."""
        xs = features(tone_subject, tones().clip(4))
        own = cache_bytes.measure(tone_subject, xs, [4], "fp32").lengths[-1]
        without_slack = own.bounded.model_copy(update={"allocated": own.bounded.bytes})
        own = own.model_copy(update={"bounded": without_slack})
        assert cache_bytes.compare(tone_subject, xs, own, "fp32")["mha"].bounded == 8 * 3 / 2

    def test_every_encoder_has_its_formula(self):
        names = {name.removeprefix("kv_") for name in CHOICES["encoder_choices"]}
        assert names - {"whisper"} <= set(analytic.CONVOLUTIONS)  # Whisper does not stream

    def test_figures_of_the_readme(self):
        """Numbers a layer and frame at D = 256, 4 heads; linear in all."""
        for kind, conf, per_frame, constant in (
            ("mha", {}, 512, 0),
            ("gqa", {"num_kv_heads": 2}, 256, 0),
            ("mla", {"kv_rank": 64}, 64, 0),
            ("linear", {}, 0, 16640),
        ):
            (found,) = analytic.footprints(kind, conf, 4, 256, layers=1)
            assert found.frame_bytes("fp32") == 4 * per_frame
            assert found.constant_bytes("fp32") == 4 * constant

    def test_options_of_each_layer(self):
        found = analytic.footprints("mla", {"kv_rank": [8, 5]}, 4, 256, layers=2)
        assert [footprint.frame_bytes("fp32") for footprint in found] == [32, 20]

    @attentions
    def test_long_chunks_leave_behind_what_short_ones_do(self, attention, monkeypatch):
        encoder = build("kv_conformer", causal=True, **attention)
        xs, marks = torch.randn(400, FEATURES), [30, 333, 400]
        held = {}
        for longest in (CHUNK, 32):
            monkeypatch.setattr(cache_bytes, "LONG_CHUNK", longest)
            held[longest] = cache_bytes.hold(encoder, xs, marks, CHUNK, -1)
        assert held[CHUNK] == held[32]
        assert held[CHUNK][0].frames < held[CHUNK][-1].frames

    def test_the_encoders_own_chunks_come_back(self):
        encoder = build("kv_conformer", causal=True, chunk_size=3, left_chunks=1)
        cache_bytes.hold(encoder, torch.randn(50, FEATURES), [50], CHUNK, -1)
        assert (encoder.chunk_size, encoder.left_chunks) == (3, 1)

    def test_a_disagreement_names_both_figures(self, tone_subject, monkeypatch):
        wrong = property(lambda self: Footprint(frame=[(1, 7)]))
        monkeypatch.setattr(MultiHeadLatentAttention, "footprint", wrong)
        xs = features(tone_subject, tones().clip(2))
        with pytest.raises(cache_bytes.MismatchError, match=r"fp32, bounded, 2 s.*512 bytes.*448"):
            cache_bytes.measure(tone_subject, xs, [2], "fp32")

    def test_growth_per_frame_and_compression(self, tone_subject):
        """Rank 8 and 32 numbers, 2 layers: 2 x 32 over 8 against mha, 32 over 8 against input."""
        seconds = [1, 2, 4]
        xs = features(tone_subject, tones().clip(4))
        measured = cache_bytes.measure(tone_subject, xs, seconds, "fp32")
        assert measured.attention_bytes_per_frame == 2 * 8 * 4
        assert measured.attention_bytes_per_second == pytest.approx(2 * 8 * 4 * 25)
        conv = 4 * 32 * 4
        allocated = {"attention": 12 * 8 * 4, "conv": conv}  # the ring has room for a chunk more
        layer = {"attention": 8 * 8 * 4, "conv": conv, "allocated": allocated}
        assert [one.model_dump() for one in measured.layers] == [layer] * 2
        ratios = cache_bytes.compare(tone_subject, xs, measured.lengths[-1], "fp32")
        assert ratios == {
            "mha": Ratio(bounded=8, unbounded=8),
            "input": Ratio(bounded=4, unbounded=4),
        }

    def test_linear_attention_stays_as_it_is(self):
        encoder = build("kv_conformer", causal=True, attention_type="linear")
        held = cache_bytes.hold(encoder, torch.randn(300, FEATURES), [100, 300], CHUNK, -1)
        assert cache_bytes._slope(*held) == 0
        assert held[0].bytes["attention"] == held[1].bytes["attention"] > 0


class TestLabel:
    @pytest.mark.parametrize(
        ("kind", "conf", "label"),
        [
            ("mha", {}, "mha"),
            ("mha", {"cache": "input"}, "mha input"),
            ("mla", {"kv_rank": [8, 12]}, "mla r8-12"),
            ("mla", {"kv_rank": [12, 8]}, "mla r8-12"),
            ("linear", {"decay": [0.5, 0.25]}, "linear decay 0.25-0.5"),
            ("linear", {"decay": [None, 0.25]}, "linear, linear decay 0.25"),
        ],
    )
    def test_layers_share_a_label(self, kind, conf, label):
        encoder = build("kv_conformer", attention_type=kind, attention_conf=conf)
        assert attention_label(encoder) == label

    def test_a_decoder_has_two(self, tone_subject):
        decoder = tone_subject.model.decoder
        assert [attention_label(decoder, cross) for cross in (False, True)] == ["mla r6", "mha"]


class TestSound:
    def test_a_clip_repeats_the_utterances(self):
        sound = Sound("x", 10, [np.arange(3, dtype=np.float32), np.full(2, 9, np.float32)])
        assert sound.clip(1.2).tolist() == [0, 1, 2, 9, 9, 0, 1, 2, 9, 9, 0, 1]
        assert sound.seconds == 0.5

    def test_noise_is_the_same_for_a_seed(self):
        one, same, other = (Sound.noise(3, 100, seed) for seed in (0, 0, 1))
        assert [len(x) for x in one.utterances] == [200, 900, 1600]
        assert torch.equal(one.clip(5), same.clip(5)) and not torch.equal(
            one.clip(5), other.clip(5)
        )

    @pytest.mark.parametrize("seconds", [0.02, 0.5, 12.3])
    def test_the_features_of_a_length_are_those_heard(self, tone_subject, seconds):
        xs = features(tone_subject, tones().clip(seconds))
        assert cache_bytes.marks_of(tone_subject, [seconds]) == [len(xs)]


class TestSearch:
    def test_the_search_holds_what_arithmetic_says(self, tone_subject):
        recognizer = Recognizer(tone_subject, {"beam_size": 3, "ctc_weight": 0.5})
        found = measure_decoder(recognizer, speech("ABBA").numpy())
        assert found.bytes == found.analytic
        assert found.bytes.decoder_cross == found.frames * 2 * 32 * 4
        assert found.bytes.decoder_self % (6 * 4) == 0
        assert (found.bytes_per_token, found.bytes_per_frame) == (6 * 4, 2 * 32 * 4)
        assert found.hypotheses == 3 and found.tokens > 4
        assert found.allocated.decoder_cross == found.bytes.decoder_cross
        assert found.allocated.decoder_self > found.bytes.decoder_self

    @pytest.mark.parametrize("kind", REGISTERED)
    def test_every_attention_among_tokens_and_to_the_audio(self, kind, tmp_path):
        conf = {"num_blocks": 2, "self_attention_type": kind, "src_attention_type": kind}
        model, args = build_model(tmp_path, decoder="kv_transformer", decoder_conf=conf)
        subject = Subject(Source("config.yaml", "model.pth"), model, args, "cpu", CHUNK, LEFT)
        recognizer = Recognizer(subject, {"beam_size": 2, "ctc_weight": 0.5})
        found = measure_decoder(recognizer, speech("AB").numpy())
        assert found.bytes == found.analytic
        assert found.allocated.decoder_self >= found.bytes.decoder_self > 0
        assert found.allocated.decoder_cross >= found.bytes.decoder_cross > 0
        constant = kind == "linear"
        assert (found.bytes_per_token == 0) == (found.bytes_per_frame == 0) == constant

    @pytest.mark.parametrize("kind", REGISTERED)
    def test_allocated_bytes_are_those_of_the_storage_behind_the_search(self, kind, tmp_path):
        conf = {"num_blocks": 2, "self_attention_type": kind, "src_attention_type": kind}
        model, _ = build_model(tmp_path, decoder="kv_transformer", decoder_conf=conf)
        encoded = torch.randn(11, model.encoder.output_size())
        state = model.decoder.init_state(encoded)
        beam = [state] * 3
        with torch.no_grad():
            for length in range(1, 5):
                ys = torch.ones(len(beam), length, dtype=torch.long)
                _, beam = model.decoder.batch_score(ys, beam, encoded.expand(len(beam), -1, -1))
        search, kept = beam[0].search, [beam[1]]  # the others are dropped
        del state, beam
        gc.collect()
        own = [t for s in search.states for t in s.tensors]
        own += [x for hypothesis in kept for x in hypothesis.sums if x is not None]
        behind = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
        allocated, held = search.capacity_by_kind(), search.nbytes_by_kind()
        assert allocated["self"] == sum(behind.values()) >= held["self"] > 0
        assert allocated["cross"] >= held["cross"] > 0

    def test_the_decoder_is_left_as_it_was(self, tone_subject):
        decoder = tone_subject.model.decoder
        with watch(decoder):
            assert "batch_score" in vars(decoder)
        assert "batch_score" not in vars(decoder)

    def test_a_real_model_recognizes_what_it_should(self, tone_subject):
        recognizer = Recognizer(tone_subject, {"beam_size": 3, "ctc_weight": 1.0})
        ((text, *_),) = recognizer(speech("ABBA"))
        assert text == "ABBA"

    def test_a_beam_of_more_than_all_tokens(self, tone_subject):
        with pytest.raises(UserError, match=r"beam_size: 6 .* 5 tokens"):
            Recognizer(tone_subject, {"beam_size": 6})
        options = Options([3], [], repeats=1, hour=False, search={"beam_size": 6})
        with pytest.raises(UserError, match="beam_size: 6"):  # before anything is measured
            profile("tones", tone_subject, tones(), options, pytest.fail)

    def test_random_weights_emit_tokens_at_a_rate(self, tone_subject):
        bias = tone_subject.model.decoder.output_layer.bias.detach().clone()
        random = Subject(
            Source(config={}), tone_subject.model, tone_subject.args, "cpu", CHUNK, LEFT
        )
        try:
            recognizer = Recognizer(random, {"beam_size": 2, "ctc_weight": 0.3})
            for letters in ("A", "ABBA"):
                samples = speech(letters)
                ((_, _, tokens, _),) = recognizer(samples)
                assert len(tokens) == -(-3 * len(samples) // RATE)
        finally:
            with torch.no_grad():
                tone_subject.model.decoder.output_layer.bias.copy_(bias)


class TestStream:
    def test_first_tokens_wait_for_their_audio(self, tone_subject):
        """A tone begins after 0.3 s of silence, and a chunk of 160 ms has to be whole."""
        sound = Sound("A", RATE, [speech("A").numpy()])
        found = Streamer(tone_subject, {"beam_size": 2}).first_tokens(sound)
        assert found.p50 > 300

    def test_there_is_no_first_token_of_silence_or_of_random_weights(self, tone_subject):
        silence = Sound("-", RATE, [speech("_").numpy()])
        assert Streamer(tone_subject, {}).first_tokens(silence) is None
        random = Subject(
            Source(config={}), tone_subject.model, tone_subject.args, "cpu", CHUNK, LEFT
        )
        assert Streamer(random, {}).first_tokens(tones()) is None

    def test_chunks_and_minutes(self, tone_subject):
        fast = dataclasses.replace(tone_subject, chunk_size=32)
        found = time_chunks(fast, tones())
        assert 0 < found.p50 <= found.p95 <= found.p99
        rows = time_hour(fast, tones(), minutes=2)
        assert [row.minute for row in rows] == [1, 2]
        assert all(row.chunk_ms > 0 for row in rows)


def test_multiply_accumulates_grow_with_the_left_context_as_attention_does(tone_subject):
    """Two layers: q and the latents of rank 8, of 4 heads, twice, and the position term."""
    longer = dataclasses.replace(tone_subject, left_chunks=LEFT + 3)
    few, more = (macs.macs_per_second(s, tones()) for s in (tone_subject, longer))
    keys = 3 * CHUNK
    added = 2 * (2 * CHUNK * keys * 4 * 8 + CHUNK * keys * 32)
    assert (more - few) * tone_subject.chunk_seconds == pytest.approx(added)
    assert few > 0


class TestGrowth:
    @encoders
    def test_lengths_as_a_list_encode_the_same_without_squares(self, name):
        encoder, xs = build(name, causal=True), torch.randn(1, 90, FEATURES)
        with torch.no_grad(), growth._unwarned():
            one, other = encoder(xs, torch.tensor([90]))[0], encoder(xs, [90])[0]
        assert torch.equal(one, other)

    def test_the_whole_costs_no_square_of_its_features(self, tone_subject):
        """4000 features: a mask that ESPnet makes of a tensor of lengths takes 16 MB."""
        biggest = []

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                biggest.append(out.nbytes if isinstance(out, torch.Tensor) else 0)
                return out

        samples = tones().clip(40)
        with Sizes():
            growth.encode(tone_subject, samples, 40)
        assert 0 < max(biggest) < 4000**2

    def test_a_length_that_memory_does_not_suffice_for_stays_unmeasured(
        self, tone_subject, monkeypatch
    ):
        row = {"seconds": 1, "encode_ms": 2.0, "offline_bytes": 3}
        monkeypatch.setattr(growth, "_measure_apart", lambda task: iter([row]))
        said: list[str] = []
        task = growth.Task(tone_subject.source, tones(), [1, 9], CHUNK, LEFT)
        _, rows = growth.measure(task, tone_subject, said.append)
        assert rows == [row, {"seconds": 9}]
        assert said[0] == "1 s: encode_ms 2, offline_bytes 3"
        assert said[1:] == ["9 s: not enough memory to encode it in one go"]

    def test_the_memory_of_a_stream_is_bounded_and_its_own(self, tone_subject):
        rows = list(growth.stream(tone_subject, tones(), [3, 12]))
        first, last = (row["streaming_bytes"] for row in rows)
        assert first == last > tone_subject.init_state().capacity_bytes
        assert [row["seconds"] for row in rows] == [3, 12]

    def test_the_memory_of_the_whole_grows_and_is_the_same_again(self, tone_subject):
        short, again, long = (
            growth.encode(tone_subject, tones().clip(s), s)["offline_bytes"] for s in (2, 2, 8)
        )
        assert short == again < long
