"""A recipe with a model that recognizes tones, so that decoding can be tried without training."""

from pathlib import Path

import soundfile
from small_models import RATE, TOKENS, save, speech

REPO = Path(__file__).parents[2]
SETS = ("train", "dev", "test")


def words(number: int) -> str:
    """The letters of one utterance, unlike those of its neighbours."""
    return "".join("AB"[number >> bit & 1] for bit in range(2 + number % 3))


def make_tone_recipe(folder: Path, count: int) -> list[str]:
    """Sets of `count` (train: 2, dev: 2) utterances and an experiment; options of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "conf").symlink_to(REPO / "conf")
    (folder / "train.yaml").write_text("encoder: kv_conformer\n")
    for name in SETS:
        data = folder / "own" / name
        (data / "wav").mkdir(parents=True)
        lines: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": []}
        for number in range(count if name == "test" else 2):
            utt, wav = f"{name}{number:05d}", data / "wav" / f"{number}.wav"
            soundfile.write(wav, speech(words(number)).numpy(), RATE)
            for file, value in zip(lines, (wav, words(number), "speaker"), strict=True):
                lines[file].append(f"{utt} {value}\n")
        for file, content in lines.items():
            (data / file).write_text("".join(content))
    tokens = folder / "data/token_list/char/tokens.txt"
    tokens.parent.mkdir(parents=True)
    tokens.write_text("\n".join(TOKENS) + "\n")
    exp = folder / "exp/asr_x"
    exp.mkdir(parents=True)
    save(exp)
    (exp / "model.pth").rename(exp / "valid.acc.ave.pth")
    return [
        *("--corpus", "kaldi", "--train_set", "own/train", "--valid_set", "own/dev"),
        *("--test_sets", "own/test", "--token_type", "char", "--speed_perturb_factors", ""),
        *("--asr_config", "train.yaml", "--asr_tag", "x", "--ngpu", "0"),
        *("--inference_config", "conf/decode_asr_fast.yaml"),
        *("--inference_args", "--ctc_weight 0.95 --beam_size 2"),
    ]


def outputs(folder: Path) -> dict[str, bytes]:
    """What stages 3 and 12 make that holds no date and no place."""
    kept = {}
    for pattern in ("dump/raw/**/*", "exp/asr_x/decode_*/*/text", "exp/asr_x/decode_*/*/token_int"):
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and path.name not in (".done.json", "wav.scp"):
                kept[str(path.relative_to(folder))] = path.read_bytes()
    return kept
