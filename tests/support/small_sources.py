"""Small experiments, ESPnet's and ours, as sources of conversions."""

import argparse
from pathlib import Path
from typing import Any

import small_models
import soundfile
import torch
import yaml
from espnet2.tasks.asr import ASRTask as ESPnetASRTask
from torch import Tensor

from espnet_kv.bin import convert
from espnet_kv.espnet.task import ASRTask

SIZE, HEADS, BLOCKS = 16, 4, 2
LETTERS = ("ABBA", "B_AAB", "BAB", "A_BB", "AB", "BBA")
NO_DROPOUT = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0, "attention_dropout_rate": 0.0}
ENCODERS: dict[str, dict[str, Any]] = {
    "conformer": {"linear_units": 16, "rel_pos_type": "latest", "cnn_module_kernel": 5},
    "branchformer": {"cgmlp_linear_units": 16, "cgmlp_conv_kernel": 5},
    "e_branchformer": {
        "cgmlp_linear_units": 16,
        "cgmlp_conv_kernel": 5,
        "merge_conv_kernel": 3,
        "linear_units": 16,
    },
    "transformer": {"linear_units": 16},
}
SELFATTN = {
    "conformer": {"selfattention_layer_type": "selfattn", "pos_enc_layer_type": "abs_pos"},
    "branchformer": {"attention_layer_type": "selfattn", "pos_enc_layer_type": "abs_pos"},
    "e_branchformer": {"attention_layer_type": "selfattn", "pos_enc_layer_type": "abs_pos"},
}
STREAMING = {"causal": True, "chunk_size": 4, "left_chunks": 2}


class Experiment:
    """config.yaml and valid.acc.ave.pth in a folder, with weights far from their initialisation.

    Args:
        folder: a new folder.
        encoder: name of the encoder; ours begin with kv_.
        conf: options of the encoder without its size.
        changes: other keys of the configuration.
    """

    def __init__(self, folder: Path, encoder: str, conf: dict[str, Any] | None = None, **changes):
        folder.mkdir(parents=True)
        self.folder = folder
        config = small_models.config(folder, encoder=encoder)
        sizes = {"output_size": SIZE, "attention_heads": HEADS, "num_blocks": BLOCKS}
        config["encoder_conf"] = sizes | NO_DROPOUT | ENCODERS[encoder.removeprefix("kv_")]
        config["encoder_conf"] |= conf or {}
        config["decoder_conf"] = {
            "attention_heads": 2,
            "linear_units": 16,
            "num_blocks": 2,
            "dropout_rate": 0.0,
            "positional_dropout_rate": 0.0,
        }
        config |= changes
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        torch.manual_seed(0)
        task = ASRTask if encoder.startswith("kv_") else ESPnetASRTask
        self.model = task.build_model(argparse.Namespace(**config)).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.save()

    def save(self) -> None:
        torch.save(self.model.state_dict(), self.folder / "valid.acc.ave.pth")

    @property
    def files(self) -> list[str]:
        return [
            *["--asr_train_config", str(self.folder / "config.yaml")],
            *["--asr_model_file", str(self.folder / "valid.acc.ave.pth")],
        ]


def load(folder: Path) -> Any:
    """The model of an experiment, loaded strictly as in our inference."""
    model, _ = ASRTask.build_model_from_file(folder / "config.yaml", folder / "valid.acc.ave.pth")
    return model.eval()


def write_audio(folder: Path) -> Path:
    """A wav.scp of a few tones."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n, letters in enumerate(LETTERS):
        file = folder / f"u{n}.wav"
        soundfile.write(file, small_models.speech(letters, 0.2, 0.1).numpy(), small_models.RATE)
        lines.append(f"u{n} {file}\n")
    (folder / "wav.scp").write_text("".join(lines))
    return folder / "wav.scp"


@torch.no_grad()
def outputs(model: Any) -> dict[str, Tensor]:
    """Outputs of encoder and decoder for a tone and some tokens."""
    audio = small_models.speech("ABBA", 0.2, 0.1)
    encoded, lengths = model.encode(audio[None], torch.tensor([len(audio)]))
    words = torch.tensor([[model.sos, 2, 3, 3, 2]])
    scores, _ = model.decoder(encoded, lengths, words, torch.tensor([words.size(1)]))
    return {"encoder": encoded, "decoder": scores}


def run(source: Experiment, out: Path, *options: str) -> int:
    """Run the command in this process; return its exit status."""
    return convert.main([*source.files, "--output_dir", str(out), *options])
