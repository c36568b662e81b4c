"""Shared by the benchmarks: models of conf/ with equal weights, lines of the card, timing."""

import argparse
import importlib.metadata
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CONF = Path(__file__).resolve().parent.parent / "conf"
MELS = 80
DROPOUTS = ("dropout_rate", "positional_dropout_rate", "attention_dropout_rate")


def positive(text: str) -> int:
    """An argparse type: positive integers."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, help="torch threads (unset: torch's choice)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def set_up_machine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Apply the options of `add_machine_options`."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)


def encoder_conf(encoder: str, attention: str) -> dict:
    """encoder_conf of the model that the recipe trains."""
    from espnet_kv.config import load_yaml

    return load_yaml(CONF / f"train_asr_{encoder}_{attention}.yaml")["encoder_conf"]


def copy_weights(weights: dict, encoder) -> None:
    """Copy those `weights` to `encoder` that agree in name and shape."""
    for name, tensor in encoder.state_dict().items():
        if name in weights and weights[name].shape == tensor.shape:
            tensor.copy_(weights[name])


def print_software() -> None:
    """The card's line about versions."""
    import torch

    versions = f"espnet {importlib.metadata.version('espnet')}, torch {torch.__version__}"
    print(f"software  {versions}, Python {sys.version.split()[0]}")


def print_device(device: str) -> None:
    """The card's line about the machine."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {_cpu_name()}"
    print(f"device    {name}, {torch.get_num_threads()} threads, float32")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def synchronize(device: str) -> None:
    """Wait until a GPU has finished, before reading the time."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def timed(device: str, run: Callable, *operands) -> float:
    """Seconds of one run: of the CPU with one thread, else of the clock.

    Other processes of the machine change the time of the CPU less than that of the clock.
    """
    import torch

    one_thread = device == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if one_thread else time.perf_counter
    begin = now()
    run(*operands)
    synchronize(device)
    return now() - begin


def rounds(
    runs: dict[Any, Callable],
    device: str,
    most: int,
    enough: float = math.inf,
) -> Iterator[dict]:
    """Run every side once per round; the order rotates from round to round.

    Args:
        runs: the sides, by name.
        most: maximum number of rounds.
        enough: seconds after which no third round begins.

    Yields:
        Seconds of every side in a round, by name.
    """
    names = list(runs)
    begin = time.perf_counter()
    for turn in range(most):
        if turn >= 2 and time.perf_counter() - begin > enough:
            return
        first = turn % len(names)
        names_now = names[first:] + names[:first]
        yield {name: timed(device, runs[name]) for name in names_now}


def by_side(timings: list[dict]) -> dict[Any, list]:
    """Transpose the results of `rounds`: seconds of all rounds, by side."""
    return {name: [seconds[name] for seconds in timings] for name in timings[0]}


def ratio(times: list, others: list) -> float:
    """Median over rounds of the ratio within a round."""
    return round(statistics.median(a / b for a, b in zip(times, others, strict=True)), 3)


def settings(args: argparse.Namespace) -> dict:
    """For the line of JSON."""
    import torch

    versions = {"torch": torch.__version__, "espnet": importlib.metadata.version("espnet")}
    return vars(args) | {"threads": torch.get_num_threads()} | versions
