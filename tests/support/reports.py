"""A report for several tests."""

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from profile_json import eight, write_profile

from espnet_kv.bin.report import main

STRANGE = "<b>&amp;\"'<script>alert(1)</script>"
NAMES = ("conformer mha", "conformer mla r16 [2]", "conformer linear [1]", "branchformer mha")


@dataclass(frozen=True)
class Report:
    """The input, the output and the printed text of the command."""

    inputs: list[Path]
    folder: Path
    stdout: str

    @property
    def page(self) -> Path:
        return self.folder / "report.html"


def make_report(folder: Path) -> Report:
    """Five models: one with random weights and no WER, one of another commit, one strange name."""
    profiles = [p for p in eight() if p["model"]["attention_type"] != "gqa"][:4]
    profiles[1]["settings"]["commit"] = "other-dirty"
    profiles[2]["model"]["weights"], profiles[2]["wer"] = "random", {}
    profiles.append(eight()[0])
    profiles[4]["model"]["encoder"], profiles[4]["settings"]["command"] = STRANGE, STRANGE
    inputs = [write_profile(folder / f"{n}.json", p) for n, p in enumerate(profiles)]
    with redirect_stdout(io.StringIO()) as stdout:
        assert main([*map(str, inputs), "--output", str(folder / "out")]) == 0
    return Report(inputs, folder / "out", stdout.getvalue())
