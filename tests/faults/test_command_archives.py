"""Audio in archives, as the recipe writes it, and the type that names it."""

from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile
from commands import assert_one_line, run
from small_models import RATE, save, speech

from espnet_kv.bin import asr_inference, asr_inference_streaming
from espnet_kv.errors import UserError
from espnet_kv.streaming.recordings import read_recording

DECODERS = {"offline": asr_inference.main, "streaming": asr_inference_streaming.main}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tones")
    save(folder, encoder_conf={"attention_type": "mha", "attention_conf": None})
    return [
        *("--asr_train_config", f"{folder}/config.yaml"),
        *("--asr_model_file", f"{folder}/model.pth"),
    ]


def test_an_entry_of_an_archive_that_is_called_sound_names_its_type(tmp_path):
    entry = f"{tmp_path / 'data_wav.1.ark'}:11"
    with pytest.raises(UserError, match=r"\.ark:11 is in an archive.*kaldi_ark, not sound"):
        read_recording(entry, "sound")


@pytest.mark.parametrize("name", DECODERS)
def test_the_recipes_archives_are_decoded_with_their_type_only(name, model, tmp_path):
    whole = write_archive(tmp_path, speech("ABBA").numpy())
    for kind in ("sound", "kaldi_ark"):
        data = f"{tmp_path}/wav.scp,speech,{kind}"
        options = ["--data_path_and_name_and_type", data, "--output_dir", f"{tmp_path}/{kind}"]
        ended = run(DECODERS[name], *model, *options, "--num_workers", "0", "--beam_size", "2")
        if kind == "sound":
            assert_one_line(ended, f"u1: {whole} is in an archive: give .*wav.scp,speech,kaldi_ark")
        else:
            assert not ended.returncode, ended.stderr
            text = (tmp_path / kind / "1best_recog/text").read_text()
            assert text.startswith("u1 ") and "ABBA" in text


def test_without_a_type_an_entry_is_read_as_what_it_is(tmp_path):
    samples = speech("ABBA").numpy()
    soundfile.write(tmp_path / "u1.wav", samples, RATE)
    whole = write_archive(tmp_path, samples)
    archived, rate = read_recording(whole, None)
    assert rate == RATE
    np.testing.assert_allclose(archived, read_recording(f"{tmp_path}/u1.wav", None)[0], atol=1e-4)


def write_archive(folder: Path, samples: np.ndarray) -> str:
    """An archive of u1 as the recipe writes them, and a wav.scp; its entry."""
    options = f"ark,scp:{folder}/data_wav.1.ark,{folder}/wav.scp"
    with kaldiio.WriteHelper(options, write_function="soundfile") as writer:
        writer["u1"] = RATE, (samples * 32767).astype("int16")
    return (folder / "wav.scp").read_text().split()[1]
