"""Commands for tests of the recipe's processes: main([FUNCTION, ARGUMENT, ...])."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

GPUS_AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES")
SLEEPER = "import time; time.sleep(300)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"


def main(arguments: list[str]) -> int | None:
    """Call the function named by the first argument with the other arguments."""
    return globals()[arguments[0]](*arguments[1:])


def record(file: str, seconds: str = "0") -> None:
    """Write how and when this process was started."""
    begun = time.monotonic()
    time.sleep(float(seconds))
    espnet = sys.modules.get("espnet2.bin.asr_inference")
    found = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgrp(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpus_at_import": GPUS_AT_IMPORT,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "forked": "multiprocessing.popen_forkserver" in sys.modules
        or "multiprocessing.forkserver" in sys.modules,
        "espnet": espnet is not None,
        "device_awake": getattr(espnet, "AWAKE", None),
        "time": [begun, time.monotonic()],
    }
    Path(file).write_text(json.dumps(found))


def meet(file: str, count: str) -> None:
    """Write the GPUs of this process, and wait until `count` processes have done so."""
    Path(file).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    deadline = time.monotonic() + 60
    while len(list(Path(file).parent.glob("*.met"))) < int(count):
        if time.monotonic() > deadline:
            raise TimeoutError("the others do not run")
        time.sleep(0.05)


def say(text: str, status: str = "0") -> int:
    """Print a text and exit with a status."""
    print(text, flush=True)
    return int(status)


def train(*lines: str) -> None:
    """Print lines of a trainer's log, then run forever."""
    print("\n".join(lines), flush=True)
    time.sleep(300)


def die(number: str) -> None:
    """Get killed by a signal, after an ordinary line."""
    print("[host] 2026-01-01 (trainer:1) INFO: 3epoch started", flush=True)
    if int(number) != signal.SIGKILL:
        signal.signal(int(number), signal.SIG_DFL)
    os.kill(os.getpid(), int(number))
    time.sleep(10)


def fail() -> None:
    """Raise an exception between ordinary lines."""
    print("[host] 2026-01-01 (trainer:1) INFO: 3epoch started", flush=True)
    try:
        {}["first"]
    except KeyError as error:
        raise RuntimeError("size mismatch:\n    weight is (2, 2)") from error


def check(number: str) -> None:
    """Fail as a check of ESPnet does, without a message."""
    assert int(number) < 3


def family(file: str, code: str = SLEEPER) -> None:
    """Start a long-running child, and run as long."""
    pids = [os.getpid(), subprocess.Popen([sys.executable, "-S", "-c", code]).pid]
    Path(f"{file}.new").write_text(json.dumps(pids))
    os.replace(f"{file}.new", file)
    time.sleep(300)


def make(option: str) -> None:
    """Write a file into the folder that the option names, `--output_dir=FOLDER`."""
    folder = Path(option.removeprefix("--output_dir="))
    folder.mkdir(parents=True)
    (folder / "made").touch()


def square(number: int) -> int:
    """Work for `parallel_map`."""
    return number * number


def fail_at_three(number: int) -> int:
    """Work that fails."""
    if number == 3:
        raise ValueError("three is\none too many")
    return number


def kill_at_three(number: int) -> int:
    """Work that is killed for lack of memory."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def work_for_ever(file: str) -> None:
    """Work that runs until the run ends."""
    family(file)
