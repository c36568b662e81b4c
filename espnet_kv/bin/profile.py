"""Profile one model: cache bytes, time, memory, error rates, into one JSON (docs/profile.md)."""

import argparse
import logging
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espnet_kv.bin.model_options import add_model_options, find_model
from espnet_kv.cli import Parser, command, true_or_false, whole
from espnet_kv.config import load_config, load_yaml, read_json
from espnet_kv.errors import ConfigError, UserError
from espnet_kv.files import check_writable
from espnet_kv.profile.schema import write_profile
from espnet_kv.scores import read_scores

if TYPE_CHECKING:
    from espnet_kv.profile.sound import Sound
    from espnet_kv.profile.subject import Source, Subject

LENGTHS = "5 10 30 60 120 300 600"
CACHE_DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")
# limits: one day of audio, and some hours of encoder frames in the cache
LONGEST_SECONDS = 86_400
MOST_FRAMES = 1_000_000
# shorter recordings are not used
SHORTEST_SECONDS = 0.3


def get_parser() -> argparse.ArgumentParser:
    """The options of this command, with the names of the recipe and of ESPnet's commands."""
    parser = Parser(
        prog="python -m espnet_kv.bin.profile",
        description="Measure the cache bytes, time and memory of a model. A trained model loads "
        "from any directory; outside the directory of its training, give --wav_scp too. The output "
        "is described in docs/profile.md. The last line on standard output is the JSON's path.",
        allow_abbrev=False,
    )
    g = parser.add_argument_group("a trained model")
    g.add_argument("--experiment", type=Path, help="directory of the experiment")
    g.add_argument(
        "--inference_asr_model",
        default="valid.acc.ave.pth",
        help="model file in this directory (default: %(default)s)",
    )
    add_model_options(g.add_argument, Path)
    g.add_argument(
        "--decoding",
        default="",
        help="decodings to read error rates from, separated by spaces (default: the shortest name "
        "of each kind)",
    )

    g = parser.add_argument_group("or a configuration, with random weights")
    g.add_argument("--config", type=Path, help="training configuration, conf/train_asr_x.yaml")
    g.add_argument("--overlay", type=Path, help="YAML whose keys replace those of --config")
    g.add_argument(
        "--vocab_size",
        type=whole(3, 10_000_000),
        default=5000,
        help="number of tokens (default: %(default)s)",
    )

    g = parser.add_argument_group("measurement")
    g.add_argument(
        "--wav_scp",
        type=Path,
        help="audio (default: the validation set in the model's config.yaml; noise for random "
        "weights)",
    )
    g.add_argument(
        "--utterances",
        type=whole(1, 100_000),
        default=20,
        help="number of utterances (default: %(default)s)",
    )
    g.add_argument(
        "--lengths",
        nargs="+",
        default=[LENGTHS],
        help=f"seconds of audio at which size, time and memory are measured (default: {LENGTHS})",
    )
    g.add_argument(
        "--cache_dtypes",
        nargs="+",
        default=["fp32 int8"],
        help=f"some of {', '.join(CACHE_DTYPES)}, after the model's type (default: fp32 int8)",
    )
    g.add_argument("--chunk_size", type=whole(1), help="encoder frames (default: 16)")
    g.add_argument("--left_chunks", type=whole(0), help="chunks of left context (default: 4)")
    g.add_argument(
        "--inference_config", type=Path, help="beam search options, e.g. conf/decode_asr.yaml"
    )
    g.add_argument(
        "--streaming_config",
        type=Path,
        help="options of streaming, e.g. conf/decode_asr_streaming.yaml",
    )
    g.add_argument(
        "--repeats", type=whole(1), default=3, help="runs per utterance (default: %(default)s)"
    )
    g.add_argument(
        "--engine",
        choices=("torch", "onnx"),
        help="torch: the model alone; onnx: also the graphs in the directory onnx beside the model "
        "file, which have to fit (default: those that fit)",
    )
    g.add_argument("--hour", type=true_or_false, default=False, help="also stream an hour")
    g.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, help="seed of weights and noise (default: 0)"
    )
    g.add_argument("--threads", type=whole(1, 1024), default=1, help="CPU threads (default: 1)")
    g.add_argument("--ngpu", type=whole(0), help="0 = CPU (default: 1 if a GPU is available)")
    g.add_argument("--output", type=Path, help="(default: EXPERIMENT/profile/profile.json)")
    return parser


@dataclass(frozen=True)
class ProfileTarget:
    """The model to profile.

    experiment: directory of the experiment; None: a configuration with random weights.
    paths: paths in the profile's `model`.
    """

    source: "Source"
    name: str
    experiment: Path | None
    paths: dict[str, str | None]

    def output(self, given: Path | None) -> Path:
        """The path of the profile.

        Raises:
            UserError: --output is missing and there is no experiment.
        """
        if given is None and self.experiment is None:
            raise UserError("--config: give --output, the file to write")
        return given or self.experiment / "profile" / "profile.json"  # type: ignore[operator]


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Profile a model.

    Args:
        cmd: the options; None: sys.argv.

    Raises:
        UserError: bad options or bad input.
    """
    # before torch is imported, whose profiler warns of older tensors
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = list(sys.argv[1:] if cmd is None else cmd)
    args = get_parser().parse_args(arguments)
    seconds, cache_dtypes = _lengths(args.lengths), _cache_dtypes(args.cache_dtypes)
    search, streaming = _search_options(args)
    named = _profile_target(args)
    output = named.output(args.output)
    check_writable(output)

    import torch

    from espnet_kv.export.onnx_engine import OnnxEngine
    from espnet_kv.profile.engines import find_engines
    from espnet_kv.profile.run import Options, profile
    from espnet_kv.profile.subject import Subject

    # ESPnet's messages about the search are not relevant here
    logging.getLogger("espnet2").setLevel(logging.ERROR)
    device = _device(args.ngpu)
    torch.set_num_threads(args.threads)
    subject = Subject.load(
        named.source, device, streaming.pop("chunk_size"), streaming.pop("left_chunks")
    )
    if longer := [length for length in seconds if length > subject.most_seconds]:
        said = f"{' '.join(f'{length:g}' for length in longer)} s"
        limit = f"Whisper encodes at most {subject.most_seconds:g} s"
        seconds = seconds[: -len(longer)]
        if not seconds:
            raise UserError(f"--lengths: {said}: {limit}")
        _print_line(f"lengths of {said} are left out: {limit}")
    if subject.streams and seconds[-1] < 2 * subject.chunk_seconds:
        raise UserError(
            f"--lengths {seconds[-1]:g}: the longest must be at least two chunks, "
            f"{2 * subject.chunk_seconds:g} s"
        )
    engines = find_engines(subject, args.engine, OnnxEngine, _print_line)
    sound = _sound(args, subject)
    _print_line(f"{named.name} on {device}, {len(sound.utterances)} utterances of {sound.name}")
    options = Options(seconds, cache_dtypes, args.repeats, args.hour, search, streaming, engines)
    try:
        measured = profile(named.name, subject, sound, options, _print_line).model_dump(
            by_alias=True
        )
    except ConfigError as error:
        raise UserError(f"{args.inference_config}: {error}") from error
    measured["model"] |= named.paths | {"converted_from": _provenance(named.experiment)}
    measured["settings"]["command"] = shlex.join(
        ["python", "-m", "espnet_kv.bin.profile", *arguments]
    )
    wer = read_scores(named.experiment, args.decoding.split()) if named.experiment else {}
    write_profile(output, measured | {"wer": wer})
    print(output)


def _print_line(text: str) -> None:
    print(f"  {text}", flush=True)


def _device(ngpu: int | None) -> str:
    import torch

    found = torch.cuda.is_available()
    if ngpu and not found:
        raise UserError(f"--ngpu {ngpu}: no GPU was found; leave it out to use the CPU")
    return "cuda" if (found if ngpu is None else ngpu) else "cpu"


def _lengths(words: Sequence[str]) -> list[float]:
    try:
        seconds = sorted({float(word) for word in " ".join(words).split()})
    except ValueError as error:
        raise UserError(f"--lengths: {error}; give seconds, e.g. --lengths 5 30 60") from error
    if not seconds or not 0 < seconds[0] <= seconds[-1] <= LONGEST_SECONDS:
        raise UserError(
            f"--lengths {' '.join(words)}: give seconds, at most {LONGEST_SECONDS}, e.g. "
            "--lengths 5 30 60"
        )
    return [int(s) if s == int(s) else s for s in seconds]


def _cache_dtypes(words: Sequence[str]) -> list[str]:
    names = " ".join(words).split()
    for name in names:
        if name not in CACHE_DTYPES:
            raise UserError(f"--cache_dtypes {name}: unknown (allowed: {', '.join(CACHE_DTYPES)})")
    return names


def _search_options(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the beam search, and options of streaming including the chunk settings."""
    search = load_yaml(args.inference_config) if args.inference_config else {}
    streaming = load_yaml(args.streaming_config) if args.streaming_config else {}
    for name, default in (("chunk_size", 16), ("left_chunks", 4)):
        given = getattr(args, name)
        streaming[name] = streaming.get(name, default) if given is None else given
        if type(streaming[name]) is not int or streaming[name] < (name == "chunk_size"):
            raise UserError(
                f"{args.streaming_config}: {name}: {streaming[name]!r} is not allowed here (a "
                "bounded stream of whole chunks is profiled)"
            )
    if streaming["chunk_size"] * (streaming["left_chunks"] + 1) > MOST_FRAMES:
        raise UserError(
            f"--chunk_size {streaming['chunk_size']}, --left_chunks {streaming['left_chunks']}: "
            f"at most {MOST_FRAMES} encoder frames are held"
        )
    return search, streaming


def _profile_target(args: argparse.Namespace) -> ProfileTarget:
    """The model given by the options."""
    from espnet_kv.profile.subject import Source

    files = args.asr_train_config or args.asr_model_file
    ways = [args.experiment, files, args.model_tag, args.config]
    if sum(way is not None for way in ways) != 1:
        raise UserError(
            "give one of --experiment DIR, --asr_train_config with --asr_model_file, --model_tag, "
            "or --config"
        )
    if args.model_tag is not None and args.output is None:
        raise UserError("--model_tag: give --output, the file to write")
    if args.config is None and args.overlay is not None:
        raise UserError("--overlay goes with --config; a trained model has its own")
    paths: dict[str, str | None] = dict.fromkeys(("experiment", "config", "overlay", "model_file"))
    if args.config is not None:
        config = load_config(args.config, args.overlay)
        if not isinstance(config.get("encoder"), str):
            raise UserError(f"{args.config} is not a training configuration: it names no encoder")
        stems = [path.stem for path in (args.config, args.overlay) if path is not None]
        paths |= {"config": str(args.config), "overlay": _text(args.overlay)}
        source = Source(config=config, vocab_size=args.vocab_size, seed=args.seed)
        return ProfileTarget(source, "_".join(stems), None, paths)
    if args.experiment is not None:
        if not args.experiment.is_dir():
            raise UserError(f"{args.experiment} does not exist: train first (stage 11)")
        args.asr_train_config = args.experiment / "config.yaml"
        args.asr_model_file = args.experiment / args.inference_asr_model
    find_model(args, kind=Path)
    experiment = args.asr_train_config.parent
    run = read_json(experiment / "run.json")
    paths |= {
        "experiment": str(experiment),
        "config": run.get("config") or str(args.asr_train_config),
        "overlay": run.get("overlay"),
        "model_file": str(args.asr_model_file),
    }
    source = Source(str(args.asr_train_config), str(args.asr_model_file), seed=args.seed)
    return ProfileTarget(source, experiment.resolve().name, experiment, paths)


def _sound(args: argparse.Namespace, subject: "Subject") -> "Sound":
    """The audio: utterances evenly selected from a wav.scp, or noise."""
    import numpy as np

    from espnet_kv.profile.sound import Sound
    from espnet_kv.streaming.recordings import read_scp, read_utterance

    if args.wav_scp is None and not subject.source.trained:
        return Sound.noise(args.utterances, subject.sample_rate, args.seed)
    wav_scp = args.wav_scp or _validation_set(subject)
    scp = read_scp(wav_scp)
    count = min(args.utterances, len(scp))
    chosen = [sorted(scp)[n * len(scp) // count] for n in range(count)]
    samples, notes = [], set[str]()
    for utterance in chosen:
        try:
            audio = read_utterance(scp[utterance], None, subject.sample_rate, note=notes.add)
        except UserError as error:
            raise UserError(f"{wav_scp}: {utterance}: {error}") from error
        length = len(audio) / subject.sample_rate
        if length > subject.most_seconds:
            notes.add(
                f"{utterance} of {length:.2f} s is left out: Whisper encodes no more than "
                f"{subject.most_seconds:g} s"
            )
        elif length >= SHORTEST_SECONDS:
            samples.append(audio.astype(np.float32))
    for note in sorted(notes):
        _print_line(f"{wav_scp}: {note}")
    if not samples:
        fits = f"{SHORTEST_SECONDS} s or more"
        if math.isfinite(subject.most_seconds):
            fits = f"from {SHORTEST_SECONDS} s to {subject.most_seconds:g} s"
        raise UserError(
            f"{wav_scp}: none of the {count} utterances that were chosen has {fits}: name another "
            "--wav_scp, or more --utterances"
        )
    return Sound(str(wav_scp), subject.sample_rate, samples)


def _validation_set(subject: "Subject") -> Path:
    named = getattr(subject.args, "valid_data_path_and_name_and_type", None) or []
    paths = [Path(path) for path, name, _ in named if name == "speech"]
    if not paths or not paths[0].is_file():
        found = f"{paths[0]} (of config.yaml) does not exist" if paths else "no audio is named"
        raise UserError(f"{found}: give --wav_scp")
    return paths[0]


def _provenance(experiment: Path | None) -> Mapping[str, Any] | None:
    return None if experiment is None else read_json(experiment / "conversion.json") or None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


if __name__ == "__main__":
    sys.exit(main())
