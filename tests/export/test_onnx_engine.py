"""A graph in the place of the encoder: the same text, and refusals of what does not fit."""

import copy
import functools
import sys

import pytest
import torch
from exports import PAIRS
from small_models import build, speech

onnx = pytest.importorskip("onnx", reason="the extra [serve] is not installed")
pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")

from espnet_kv.errors import UserError  # noqa: E402
from espnet_kv.export.graph import StreamingGraph  # noqa: E402
from espnet_kv.export.layouts import LAYOUTS  # noqa: E402
from espnet_kv.export.onnx_engine import OnnxEngine  # noqa: E402
from espnet_kv.export.onnx_file import write_onnx  # noqa: E402
from espnet_kv.streaming.engine import TorchEngine  # noqa: E402
from espnet_kv.streaming.recognizer import StreamingRecognizer  # noqa: E402

SIZES = (1000, 37, 8000, 1, 2560)


def recognize(recognizer: StreamingRecognizer, audio: torch.Tensor, size: int) -> list:
    *pieces, last = audio.split(size)
    for piece in pieces:
        recognizer(piece, is_final=False)
    return recognizer(last, is_final=True)


@pytest.fixture(scope="module")
def mla(exported):
    """A model, its arguments and its graph."""
    return exported()[:3]


class TestAgainstTorch:
    @pytest.mark.parametrize(("encoder", "attention"), PAIRS)
    def test_text_and_scores_are_the_same_in_any_pieces(self, exported, encoder, attention):
        model, args, graph, _ = exported(encoder, attention)
        search = {"beam_size": 5, "nbest": 3, "ctc_weight": 0.6, "penalty": 0.3}
        torchs, graphs = (
            StreamingRecognizer(asr_model=model, asr_train_args=args, **search, **engine)
            for engine in ({}, {"engine": functools.partial(OnnxEngine, graph)})
        )
        for letters, size in zip(("ABBA", "B", "AAB_AB", "BA", "_"), SIZES, strict=True):
            expected = recognize(torchs, speech(letters), 20000)
            found = recognize(graphs, speech(letters), max(size, 30))
            assert [r[:3] for r in found] == [r[:3] for r in expected]
            scores = [r[3].score for r in expected]
            assert [r[3].score for r in found] == pytest.approx(scores, abs=1e-3)
            assert found[0][0] == letters.replace("_", "")

    @pytest.fixture(scope="class")
    def engines(self, mla):
        model, _, path = mla
        return TorchEngine(model), OnnxEngine(path, model)

    @pytest.mark.parametrize("frames", range(1, 45))
    def test_a_stream_of_any_length(self, engines, frames):
        """Its last chunk may be of any size, or missing."""
        features = torch.randn(frames, 20)
        found = []
        for engine in engines:
            xs = features.clone()
            if engine.normalize is not None:
                xs = engine.normalize(xs[None], torch.tensor([frames]))[0][0].float()
            with torch.no_grad():
                first = engine.encode(xs[:17], engine.init_state(), False)
                rest = engine.encode(xs[17:], first[2], True)
            found.append([torch.cat(both) for both in zip(first[:2], rest[:2], strict=True)])
        for ours, expected in zip(*found, strict=True):
            assert len(ours) == max(0, (frames - 3) // 4)
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("model.int8.onnx", {}),
            ("model.onnx", {"cache_dtype": "int8", "int8": False}),
            ("model.onnx", {"cache_dtype": "bf16", "int8": False}),
            ("model.onnx", {"left_chunks": 0, "int8": False}),
            ("model.onnx", {"chunk_size": 1, "left_chunks": 3, "int8": False}),
        ],
    )
    def test_weights_and_caches_may_be_rounded_and_chunks_of_any_size(
        self, exported, name, options
    ):
        model, args, graph, _ = exported(**options)
        options = {key: value for key, value in options.items() if key != "int8"}
        stream = StreamingRecognizer(
            asr_model=model,
            asr_train_args=args,
            **options,  # what the graph was exported with may be said again
            engine=functools.partial(OnnxEngine, graph.with_name(name)),
        )
        expected = StreamingRecognizer(asr_model=model, asr_train_args=args, **options)
        for letters in ("ABBA", "BAB"):
            assert stream(speech(letters))[0][0] == expected(speech(letters))[0][0] == letters

    def test_bytes_are_those_of_the_graph_and_do_not_grow(self, mla):
        model, args, path = mla
        engine = functools.partial(OnnxEngine, path)
        stream = StreamingRecognizer(
            asr_model=model, asr_train_args=args, engine=engine, ctc_weight=1.0
        )
        held = []
        for piece in speech("ABBA_BA").split(4000):
            stream.accept(piece)
            held.append(stream.nbytes_by_kind())
        # 2 latents of 8 numbers for 8 frames, 2 x 4 inputs of convolutions of 32 numbers
        assert {(h["attention"], h["conv"]) for h in held} == {(2 * 8 * 8 * 4, 2 * 4 * 32 * 4)}
        assert max(h["input"] for h in held) < 19 * 20 * 4  # a chunk of features


class TestRefusals:
    def refused(self, said: str, path, model, args, **options) -> None:
        with pytest.raises(UserError, match=said) as caught:
            StreamingRecognizer(
                asr_model=model,
                asr_train_args=args,
                engine=functools.partial(OnnxEngine, path),
                **options,
            )
        assert "\n" not in str(caught.value) and "\n" not in said

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"chunk_size": 16}, "chunk_size 16: .*model.onnx was exported with 4"),
            ({"left_chunks": 4}, "left_chunks 4: .* exported with 2"),
            ({"left_chunks": -1}, "left_chunks -1: .* exported with 2"),
            ({"cache_dtype": "int8"}, "cache_dtype int8: .* exported with fp32"),
            ({"dtype": "float64"}, "dtype float64: a graph in onnxruntime needs float32"),
        ],
        ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
    )
    def test_other_settings(self, mla, options, said):
        model, args, path = mla
        self.refused(said, path, copy.deepcopy(model), args, **options)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"attention_conf": {"kv_rank": 4}}, "attention: mla r8 in the graph, mla r4 in the"),
            ({"output_size": 16}, "model size: 32 in the graph, 16 in the model"),
        ],
        ids=["attention", "size"],
    )
    def test_the_graph_of_another_model(self, mla, tmp_path, changes, said):
        _, _, path = mla
        self.refused(said, path, *build(tmp_path, encoder_conf=changes))

    @pytest.mark.parametrize("part", ["normalize", "encoder", "ctc"])
    def test_the_graph_of_another_checkpoint(self, mla, part):
        model, args, path = mla
        other = copy.deepcopy(model)
        next(iter(getattr(other, part).state_dict().values())).mul_(1.001)
        self.refused("same sizes, but other weights", path, other, args)

    def test_another_decoder_is_no_other_graph(self, mla):
        model, args, path = mla
        other = copy.deepcopy(model)
        other.decoder = None
        engine = functools.partial(OnnxEngine, path)
        stream = StreamingRecognizer(asr_model=other, asr_train_args=args, engine=engine)
        assert stream(speech("ABA"))[0][0] == "ABA"

    def test_files_that_are_no_such_graph(self, mla, tmp_path):
        model, args, path = mla
        self.refused(
            "nothing.onnx is not there: export the model", tmp_path / "nothing.onnx", model, args
        )
        self.refused("onnx is not there", path.parent, model, args)
        damaged = tmp_path / "damaged.onnx"
        damaged.write_bytes(path.read_bytes()[:1000])
        self.refused("damaged.onnx cannot be read as an ONNX graph", damaged, model, args)
        for said, wrong in (
            (None, "other.onnx is not a graph of espnet_kv.bin.export"),
            ("{}", "other.onnx was exported by another version"),
        ):
            graph = onnx.load(path)
            del graph.metadata_props[:]
            if said:
                onnx.helper.set_model_props(graph, {"espnet_kv": said})
            onnx.save(graph, tmp_path / "other.onnx")
            self.refused(wrong, tmp_path / "other.onnx", model, args)

    def test_another_layout(self, mla, tmp_path):
        model, args, _ = mla
        layout = LAYOUTS["wenet"](StreamingGraph(model).eval(), len(model.token_list)).eval()
        write_onnx(layout, tmp_path / "wenet.onnx", {"espnet_kv": "{}"})
        said = "wenet.onnx was exported with another layout: give one of --layout plain"
        self.refused(said, tmp_path / "wenet.onnx", model, args)

    def test_without_onnxruntime(self, mla, monkeypatch):
        model, args, path = mla
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        said = r'onnxruntime is not installed: pip install "espnet_kv\[serve\]"'
        self.refused(said, path, model, args)
