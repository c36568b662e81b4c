"""A recognizer of tones: ESPnet experiments with small random encoders whose CTC is fitted.

A low tone is an A, a high tone is a B, and silence is blank. The output layer of CTC is fitted by
least squares, so that the model recognizes tones without training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from torch import Tensor

from espnet_kv.espnet.task import ASRTask

RATE = 16000
TOKENS = ["<blank>", "<unk>", "A", "B", "<sos/eos>"]
HERTZ = {"A": 400, "B": 3000}
CHUNKS = {"chunk_size": 4, "left_chunks": 2}
HOP = 160
FRAME = 4 * HOP  # samples per encoder frame


def speech(letters: str, seconds: float = 0.4, pause: float = 0.3) -> Tensor:
    """(N,) samples: a tone of `seconds` for each letter, silence for _, with pauses around."""
    heard = sounds(letters, seconds, pause)
    time = torch.arange(len(heard)) / RATE
    tones = {letter: torch.sin(2 * torch.pi * hertz * time) for letter, hertz in HERTZ.items()}
    audio = sum((heard == TOKENS.index(letter)) * tone for letter, tone in tones.items())
    noise = torch.randn(len(heard), generator=torch.Generator().manual_seed(len(letters)))
    return 0.3 * audio + 1e-3 * noise


def write_scp(folder: Path, letters: Sequence[str]) -> Path:
    """Write a `speech` of each entry of `letters`, and a wav.scp of them, which is returned."""
    lines = []
    for number, spoken in enumerate(letters):
        soundfile.write(folder / f"{number}.wav", speech(spoken).numpy(), RATE)
        lines.append(f"{number} {folder}/{number}.wav\n")
    (folder / "wav.scp").write_text("".join(lines))
    return folder / "wav.scp"


def sounds(letters: str, seconds: float, pause: float) -> Tensor:
    """(N,) the token at each sample of `speech`, 0 in silence."""
    quiet = torch.zeros(int(pause * RATE), dtype=torch.long)
    parts = [quiet]
    for letter in letters:
        token = 0 if letter == "_" else TOKENS.index(letter)
        parts += [torch.full((int(seconds * RATE),), token), quiet]
    return torch.cat(parts)


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A training configuration in ESPnet's format; its statistics are written to `folder`."""
    stats = folder / "feats_stats.npz"
    count = 100.0
    np.savez(stats, count=count, sum=np.full(20, -8 * count), sum_square=np.full(20, 80 * count))
    conf = ASRTask.get_default_config()
    conf.update(
        token_list=TOKENS,
        token_type="char",
        frontend_conf={"n_fft": 512, "win_length": 400, "hop_length": HOP, "n_mels": 20},
        normalize="global_mvn",
        normalize_conf={"stats_file": str(stats)},
        encoder="kv_conformer",
        encoder_conf={
            "output_size": 32,
            "attention_heads": 4,
            "linear_units": 32,
            "num_blocks": 2,
            "dropout_rate": 0.0,
            "positional_dropout_rate": 0.0,
            "attention_dropout_rate": 0.0,
            "rel_pos_type": "latest",
            "cnn_module_kernel": 5,
            "causal": True,
            "attention_type": "mla",
            "attention_conf": {"kv_rank": 8},
            **CHUNKS,
        },
        decoder="transformer",
        decoder_conf={"attention_heads": 2, "linear_units": 16, "num_blocks": 1},
    )
    if changes.get("frontend") == "kaldi_fbank":
        conf["frontend_conf"] = {"n_mels": 20}
    if changes.get("encoder") == "kv_transformer":
        del conf["encoder_conf"]["cnn_module_kernel"], conf["encoder_conf"]["rel_pos_type"]
    if "branchformer" in changes.get("encoder", ""):
        sizes = {"cgmlp_linear_units": conf["encoder_conf"]["linear_units"], "cgmlp_conv_kernel": 5}
        del conf["encoder_conf"]["cnn_module_kernel"]
        if changes["encoder"] == "kv_branchformer":
            del conf["encoder_conf"]["linear_units"]
        conf["encoder_conf"] |= sizes
    for key, value in changes.items():  # None: ESPnet's defaults
        merged = isinstance(value, dict) and isinstance(conf.get(key), dict)
        conf[key] = conf[key] | value if merged else {} if value is None else value
    return conf


def build(folder: Path, **changes: Any) -> tuple[torch.nn.Module, argparse.Namespace]:
    """A model that recognizes tones, and its training arguments."""
    torch.manual_seed(0)
    args = argparse.Namespace(**config(folder, **changes))
    model = ASRTask.build_model(args).eval()
    fit_ctc(model)
    return model, args


def save(folder: Path, **changes: Any) -> list[str]:
    """Write config.yaml and model.pth to `folder`; return the options that name them."""
    model, _ = build(folder, **changes)
    torch.save(model.state_dict(), folder / "model.pth")
    (folder / "config.yaml").write_text(yaml.safe_dump(config(folder, **changes)))
    return [
        *["--asr_train_config", str(folder / "config.yaml")],
        *["--asr_model_file", str(folder / "model.pth")],
    ]


@torch.no_grad()
def fit_ctc(model: torch.nn.Module) -> None:
    """Fit the CTC output layer by least squares."""
    rows, targets = [], []
    for letters, seconds, pause in (
        ("ABBAAB", 0.4, 0.3),
        ("BB_AABA", 0.3, 0.35),
        ("BAB__AAB", 0.5, 0.25),
        ("A__B_BA", 0.25, 0.4),
    ):
        audio = speech(letters, seconds, pause)
        encoded, _ = model.encode(audio[None], torch.tensor([len(audio)]))  # (1, T, D)
        rows.append(encoded[0])
        heard = sounds(letters, seconds, pause)
        targets.append(heard[FRAME // 2 + FRAME * torch.arange(len(encoded[0]))])
    x = torch.nn.functional.pad(torch.cat(rows), (0, 1), value=1.0).double()
    y = torch.nn.functional.one_hot(torch.cat(targets), model.ctc.ctc_lo.out_features).double()
    ridge = 1e-4 * torch.eye(x.size(1), dtype=x.dtype)
    solution = 12 * torch.linalg.solve(x.T @ x / len(x) + ridge, x.T @ y / len(x))
    model.ctc.ctc_lo.weight.copy_(solution[:-1].T)
    model.ctc.ctc_lo.bias.copy_(solution[-1])
