"""A training of ESPnet that takes a second: noise with one letter each, and a tiny model."""

from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

RATE = 16000
CONFIG = {
    "token_type": "char",
    "frontend_conf": {"n_fft": 512, "win_length": 400, "hop_length": 256, "n_mels": 20},
    "specaug": None,
    "normalize": None,
    "encoder": "kv_conformer",
    "encoder_conf": {
        "output_size": 8,
        "attention_heads": 2,
        "linear_units": 8,
        "num_blocks": 1,
        "cnn_module_kernel": 3,
        "rel_pos_type": "latest",
    },
    "decoder": "transformer",
    "decoder_conf": {"attention_heads": 2, "linear_units": 8, "num_blocks": 1},
    "optim": "adam",
    "optim_conf": {"lr": 0.01},
    "batch_type": "sorted",
    "batch_size": 2,
    "max_epoch": 3,
    "keep_nbest_models": 2,
    "best_model_criterion": [["valid", "acc", "max"], ["train", "loss", "min"]],
    "num_workers": 0,
    "use_matplotlib": False,
    "use_tensorboard": False,
}


def write_data(folder: Path) -> None:
    """Six utterances, their shapes, the tokens and config.yaml."""
    random = np.random.default_rng(0)
    scp, text, speech_shape, text_shape = [], [], [], []
    for n in range(6):
        soundfile.write(folder / f"u{n}.wav", 0.1 * random.standard_normal(8000), RATE)
        scp.append(f"u{n} {folder}/u{n}.wav\n")
        text.append(f"u{n} {'AB'[n % 2]}\n")
        speech_shape.append(f"u{n} 8000\n")
        text_shape.append(f"u{n} 1,5\n")
    (folder / "wav.scp").write_text("".join(scp))
    (folder / "text").write_text("".join(text))
    (folder / "speech_shape").write_text("".join(speech_shape))
    (folder / "text_shape").write_text("".join(text_shape))
    (folder / "tokens.txt").write_text("<blank>\n<unk>\nA\nB\n<sos/eos>\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))


def options(data: Path, exp: Path, *more: str) -> list[str]:
    """Options of asr_train."""
    given = ["--config", str(data / "config.yaml"), "--token_list", str(data / "tokens.txt")]
    for mode in ("train", "valid"):
        name = f"--{mode}_data_path_and_name_and_type"
        given += [name, f"{data}/wav.scp,speech,sound", name, f"{data}/text,text,text"]
        for shape in ("speech_shape", "text_shape"):
            given += [f"--{mode}_shape_file", str(data / shape)]
    return [*given, "--output_dir", str(exp), "--ngpu", "0", "--resume", "true", *more]


def lm_options(data: Path, exp: Path, *more: str) -> list[str]:
    """Options of lm_train."""
    given = ["--token_list", str(data / "tokens.txt"), "--token_type", "char"]
    given += ["--lm", "seq_rnn", "--lm_conf", "unit=4", "--max_epoch", "2"]
    given += ["--batch_type", "sorted", "--batch_size", "2", "--keep_nbest_models", "1"]
    given += ["--num_workers", "0", "--use_matplotlib", "false", "--use_tensorboard", "false"]
    for mode in ("train", "valid"):
        given += [f"--{mode}_data_path_and_name_and_type", f"{data}/text,text,text"]
        given += [f"--{mode}_shape_file", str(data / "text_shape")]
    return [*given, "--output_dir", str(exp), "--ngpu", "0", "--resume", "true", *more]


def weights(file: Path) -> dict[str, torch.Tensor]:
    """A model file's tensors."""
    return torch.load(file, map_location="cpu", weights_only=True)


def same(first: Path, second: Path) -> bool:
    """Whether two model files hold the same numbers."""
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
