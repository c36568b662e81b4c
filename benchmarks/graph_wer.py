"""Word error rates and equal texts of exported graphs, in our recognizer and in sherpa-onnx."""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from common import positive, print_software
from torch import Tensor

from espnet_kv.cli import command
from espnet_kv.errors import UserError
from espnet_kv.recipe.option_types import seconds

RATE = 16000
Decode = Callable[[Sequence[Tensor]], list[str]]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Export trained models and decode a test set: with torch, with the graphs in "
        "onnxruntime and, where the model has Kaldi's features, with sherpa-onnx (on the best path "
        "of CTC). fp32 and int8 are the types of the weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("experiments", type=Path, nargs="+", help="directories of config.yaml and the model file")
    add("--data", type=Path, required=True, help="Kaldi data directory at 16 kHz")
    add("--model_file", default="valid.acc.ave.pth", help="in each experiment")
    add("--utterances", type=positive, default=100, help="the first ones by name")
    add(
        "--tail",
        type=seconds,
        default=1.0,
        help="seconds of faint noise behind each recording: sherpa-onnx decodes whole chunks "
        "only. With 0, sherpa-onnx is left out",
    )
    add("--chunk_size", type=positive, default=16, help="frames")
    add("--left_chunks", type=positive, default=4, help="chunks of left context")
    add("--beam_size", type=positive, default=1, help="1: the best path")
    add("--ctc_weight", type=float, default=1.0, help="the decoder has the rest")
    return parser


def read(data: Path, count: int, tail: float) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Samples with `tail` seconds of noise behind them, and references, by utterance."""
    from espnet_kv.recipe.audio import read_audio_at
    from espnet_kv.recipe.datadir import DataDir

    kaldi = DataDir.read(data)
    names = sorted(kaldi.text)[:count]
    audio = {name: read_audio_at(kaldi.wav_scp[name], RATE).samples for name in names}
    generator = torch.Generator().manual_seed(0)
    noise = 0.001 * torch.randn(round(tail * RATE), generator=generator)
    samples = {name: torch.cat([torch.as_tensor(x).float(), noise]) for name, x in audio.items()}
    return samples, {name: kaldi.text[name] for name in names}


def ours(experiment: Path, args: argparse.Namespace, graph: Path | None) -> Decode:
    """The recognizer with torch, or with a graph."""
    from espnet_kv.export.onnx_engine import OnnxEngine
    from espnet_kv.streaming.engine import TorchEngine
    from espnet_kv.streaming.recognizer import StreamingRecognizer

    recognizer = StreamingRecognizer(
        experiment / "config.yaml",
        experiment / args.model_file,
        chunk_size=args.chunk_size,
        left_chunks=args.left_chunks,
        beam_size=args.beam_size,
        ctc_weight=args.ctc_weight,
        engine=functools.partial(OnnxEngine, graph) if graph else TorchEngine,
    )
    return lambda audio: [recognizer(samples)[0][0] or "" for samples in audio]


def sherpa(graph: Path, args: argparse.Namespace, mels: int) -> Decode:
    """sherpa-onnx, 16 streams together; `mels`: size of the model's features."""
    import sherpa_onnx

    recognizer = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(
        model=str(graph),
        tokens=str(graph.with_name("tokens.txt")),
        chunk_size=args.chunk_size,
        num_left_chunks=args.left_chunks,
        feature_dim=mels,
        num_threads=1,
    )

    def decode(audio: Sequence[Tensor]) -> list[str]:
        texts = []
        for first in range(0, len(audio), 16):
            streams = []
            for samples in audio[first : first + 16]:
                streams.append(recognizer.create_stream())
                streams[-1].accept_waveform(RATE, samples.numpy())
                streams[-1].input_finished()
            while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
                recognizer.decode_streams(ready)
            texts += [recognizer.get_result(stream) for stream in streams]
        return texts

    return decode


def engines(
    experiment: Path, args: argparse.Namespace, folder: Path, scp: Path
) -> Iterator[tuple[str, Decode]]:
    """Export the model, and yield each way to decode with its name."""
    from espnet_kv.bin import export
    from espnet_kv.config import load_yaml

    config = load_yaml(experiment / "config.yaml")
    kaldi = config["frontend"] == "kaldi_fbank" and args.tail > 0
    mels = config["frontend_conf"].get("n_mels", 80)
    entry = scp.read_text(encoding="utf-8").split()[1]
    kind = "kaldi_ark" if ".ark:" in entry else "sound"
    for layout in ("plain", "wenet") if kaldi else ("plain",):
        status = export.main(
            [
                *("--asr_train_config", str(experiment / "config.yaml")),
                *("--asr_model_file", str(experiment / args.model_file)),
                *("--chunk_size", str(args.chunk_size), "--left_chunks", str(args.left_chunks)),
                *("--check_scp", str(scp), "--check_type", kind, "--layout", layout),
                *("--output_dir", str(folder / layout)),
            ]
        )
        if status:
            raise UserError(f"{experiment} cannot be exported, see above")
    yield "torch", ours(experiment, args, None)
    graphs = {"fp32": "model.onnx", "int8": "model.int8.onnx"}
    for kind, name in graphs.items():
        yield f"onnxruntime, {kind}", ours(experiment, args, folder / "plain" / name)
    if kaldi:
        for kind, name in graphs.items():
            yield f"sherpa-onnx, {kind}", sherpa(folder / "wenet" / name, args, mels)


def row(
    model: str, engine: str, texts: Mapping[str, str], first: Mapping[str, str], ref: Mapping
) -> str:
    """One line of the table, with the difference from the `first` engine."""
    from espnet_kv.recipe.score import score
    from espnet_kv.scores import error_interval, rate_text

    found, base = score(ref, texts, "wer"), score(ref, first, "wer")
    equal = sum(texts[name].split() == first[name].split() for name in ref)
    errors = [a - b for a, b in zip(found.utterance_errors, base.utterance_errors, strict=True)]
    more = rate_text(
        found.error_rate - base.error_rate, error_interval(errors, found.utterance_words)
    )
    wer = rate_text(found.error_rate, found.interval)
    return f"| {model} | {engine} | {wer} | {more} | {equal} of {len(ref)} |"


@command
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    for experiment in args.experiments:
        if not (experiment / args.model_file).is_file():
            raise UserError(f"{experiment / args.model_file} does not exist: train it, or name it")
    print_software()
    audio, references = read(args.data, args.utterances, args.tail)
    print(f"data  {args.data}, {len(audio)} utterances, {args.tail:g} s of noise behind each")
    print(
        "\n| model | engine | WER (%), 95 % interval | more than torch | texts equal to torch's |"
    )
    print("|---|---|---|---|---|")
    for experiment in args.experiments:
        with tempfile.TemporaryDirectory() as folder:
            first: dict[str, str] = {}
            ways = engines(experiment, args, Path(folder), args.data / "wav.scp")
            for name, decode in ways:
                texts = dict(zip(audio, decode(list(audio.values())), strict=True))
                first = first or texts
                print(row(experiment.name, name, texts, first, references), flush=True)


if __name__ == "__main__":
    sys.exit(main())
