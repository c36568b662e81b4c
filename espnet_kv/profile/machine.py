"""Where a profile was made: device, versions, commit."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

import espnet_kv


def device_name(device: str) -> str:
    """The GPU's, or the processor's."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Of what takes part."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "espnet": metadata.version("espnet"),
        "espnet_kv": espnet_kv.__version__,
    }


def commit() -> str | None:
    """The commit of this package, with -dirty where files differ from it; None outside git."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is another's repository
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    """ISO, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
