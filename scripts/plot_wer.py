"""Draw the word error rates of a RESULTS.md: python scripts/plot_wer.py RESULTS.md wer.png"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SECTION = re.compile(r"^## (?:exp/)?asr_(?:train_asr_)?(\w+?)_(mha|gqa|mla|linear)_", re.MULTILINE)
ROW = re.compile(r"^\|[^|]+/(\w+)\|(?:[\d.]+\|){6}([\d.]+)\|", re.MULTILINE)


def read_rates(results: str) -> dict[str, dict[str, dict[str, float]]]:
    """encoder -> attention -> test set -> WER in per cent, from the tables of RESULTS.md."""
    rates: dict[str, dict[str, dict[str, float]]] = {}
    starts = [*SECTION.finditer(results)]
    ends = [*(found.start() for found in starts[1:]), len(results)]
    for found, end in zip(starts, ends, strict=True):
        words = results[found.end() : end].partition("### WER")[2].partition("###")[0]
        # the first decoding of each test set: the others follow it by name
        row = {name: float(rate) for name, rate in reversed(ROW.findall(words))}
        rates.setdefault(found[1], {}).setdefault(found[2], row)
    return rates


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    rates = read_rates(source.read_text(encoding="utf-8"))
    figure, _ = plt.subplots(1, len(rates), figsize=(4 * len(rates), 3), sharey=True)
    for axis, (encoder, attentions) in zip(figure.axes, rates.items(), strict=True):
        for n, name in enumerate(("test_clean", "test_other")):
            places = [place + 0.4 * n - 0.2 for place in range(len(attentions))]
            bars = axis.bar(places, [row[name] for row in attentions.values()], 0.4, label=name)
            axis.bar_label(bars, fmt="%.1f", fontsize=8)
        axis.set_xticks(range(len(attentions)), attentions)
        axis.set_title(encoder)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("WER (%)")
    figure.axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main()
