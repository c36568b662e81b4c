"""Where a profile was made: device, versions, date."""

import platform
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


def versions() -> dict[str, str | None]:
    """Of what takes part."""
    try:
        onnxruntime = metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        onnxruntime = None
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "espnet": metadata.version("espnet"),
        "onnxruntime": onnxruntime,
        "espnet_kv": espnet_kv.__version__,
    }


def now() -> str:
    """ISO, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
