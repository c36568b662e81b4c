"""Stock `whisper` experiments decoded by our commands, with PyPI's openai-whisper."""

import argparse
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from espnet2.asr.decoder.whisper_decoder import OpenAIWhisperDecoder
from espnet2.asr.encoder.whisper_encoder import OpenAIWhisperEncoder
from espnet2.bin.whisper_export_vocabulary import export_vocabulary
from small_encoders import assert_close
from small_whisper import DIMS, SIZE, far_from_initialisation

from espnet_kv.bin import asr_inference, stream
from espnet_kv.decoder.whisper_decoder import KVWhisperDecoder
from espnet_kv.encoder.whisper_encoder import KVWhisperEncoder
from espnet_kv.errors import UserError
from espnet_kv.espnet import whisper_weights
from espnet_kv.espnet.inference import Speech2Text
from espnet_kv.espnet.long_audio import joined, most_samples, windows
from espnet_kv.espnet.openai_whisper import whisper_for_espnet
from espnet_kv.espnet.task import ASRTask, TrainingTask
from espnet_kv.espnet.whisper_weights import weights_follow, whisper_package

RATE = 16000


@pytest.fixture(autouse=True)
def _a_small_public_model_without_network(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setitem(whisper_weights.SIZES, "nano", (SIZE, 4, 2))
    monkeypatch.setattr(whisper_package(), "load_model", no_network)


def arguments(folder: Path, name: str = "whisper", **conf) -> argparse.Namespace:
    tokens = folder / "tokens.txt"
    if not tokens.exists():
        with whisper_for_espnet():
            export_vocabulary(str(tokens), "whisper_en", log_level="ERROR")
    return argparse.Namespace(
        **ASRTask.get_default_config()
        | {
            "encoder": name,
            "encoder_conf": {"whisper_model": "nano.en"},
            "decoder": name,
            "decoder_conf": {"whisper_model": "nano.en"},
            "input_size": 1,
            "frontend": None,
            "normalize": None,
            "normalize_conf": {},
            "token_type": "whisper_en",
            "bpemodel": "whisper_en",
            "token_list": str(tokens),
            "model_conf": {
                "ctc_weight": 0.3,
                "sym_sos": "<|startoftranscript|>",
                "sym_eos": "<|endoftext|>",
            },
        }
        | conf
    )


def experiment(folder: Path, **conf) -> dict[str, str]:
    """An experiment as espnet2.bin.asr_train leaves it: its config.yaml has no dims."""
    args = arguments(folder, **conf)
    with weights_follow():
        model = far_from_initialisation(ASRTask.build_model(args))
    torch.save(model.state_dict(), folder / "model.pth")
    listed = {"token_list": str(folder / "tokens.txt")}  # reading 51864 tokens of a YAML is slow
    (folder / "config.yaml").write_text(yaml.safe_dump(vars(args) | listed))
    names = {"asr_train_config": "config.yaml", "asr_model_file": "model.pth"}
    return {key: str(folder / name) for key, name in names.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(whisper_weights.SIZES, "nano", (SIZE, 4, 2))
        return experiment(tmp_path_factory.mktemp("whisper"))


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(int(RATE * seconds)).astype("float32")


@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_a_stock_experiment_gives_the_same_hypotheses(trained, ctc_weight):
    options = {"beam_size": 3, "nbest": 2, "maxlenratio": -5, "ctc_weight": ctc_weight}
    found = {}
    for kv_decoder in (True, False):
        speech2text = Speech2Text(**trained, **options, kv_decoder=kv_decoder, fast_ctc=False)
        model = speech2text.asr_model
        wanted = (
            (KVWhisperEncoder, KVWhisperDecoder)
            if kv_decoder
            else (OpenAIWhisperEncoder, OpenAIWhisperDecoder)
        )
        assert (type(model.encoder), type(model.decoder)) == wanted
        alone = [speech2text(noise(1)), speech2text(noise(1.5))]
        found[kv_decoder] = [*alone, *speech2text.batch_decode([noise(1), noise(1)])]
    for ours, stock in zip(found[True], found[False], strict=True):
        assert len(ours) == len(stock) == 2
        for (text, tokens, ids, one), (*others, other) in zip(ours, stock, strict=True):
            assert [text, tokens, ids] == others and isinstance(text, str)
            assert one.yseq.tolist()[:2] == [50257, 50362]  # the primer
            assert_close(torch.as_tensor(one.score), torch.as_tensor(other.score), 1e-5)


def decode(trained, folder: Path, seconds: float, *options: str) -> int | None:
    soundfile.write(folder / "a.wav", 0.1 * noise(seconds), RATE)
    (folder / "wav.scp").write_text(f"utt-a {folder / 'a.wav'}\n")
    return asr_inference.main(
        [
            *(word for key, value in trained.items() for word in (f"--{key}", value)),
            *("--data_path_and_name_and_type", f"{folder / 'wav.scp'},speech,sound"),
            *("--output_dir", str(folder / "out"), "--beam_size", "2", "--ctc_weight", "0"),
            *options,
        ]
    )


def test_the_command_decodes_it(trained, tmp_path):
    assert not decode(trained, tmp_path, 1, "--maxlenratio", "-4")
    out = tmp_path / "out/1best_recog"
    assert (out / "text").read_text().startswith("utt-a ")
    assert len((out / "token_int").read_text().split()) == 1 + 5  # <|notimestamps|> and 4


LONG = 31


@pytest.mark.parametrize("kv_decoder", [True, False])
def test_long_audio_gives_what_its_parts_give(trained, kv_decoder, monkeypatch):
    options = {"beam_size": 2, "nbest": 2, "ctc_weight": 0.0, "maxlenratio": -3}
    speech2text = Speech2Text(**trained, **options, kv_decoder=kv_decoder)
    short, long = noise(2), noise(LONG)
    most = most_samples(speech2text.asr_model)
    parts = [part.numpy() for part in windows(torch.as_tensor(long), most)]
    assert len(parts) == 2
    alone = list(map(speech2text, parts))
    assert texts(speech2text(long)) == texts(joined(alone))
    padded = np.stack([np.pad(short, (0, len(long) - len(short))), long])
    # batches of two: all the utterances that are given
    one, *others = speech2text.batch_decode([short, parts[0]]) + speech2text.batch_decode(parts[1:])
    if kv_decoder:  # ESPnet's decoder attends to what fills up a batch
        assert [texts(one), *map(texts, others)] == [texts(speech2text(short)), *map(texts, alone)]
    sizes = []
    decode = Speech2Text._batch_decode_padded
    monkeypatch.setattr(
        Speech2Text,
        "_batch_decode_padded",
        lambda self, speech, lengths: sizes.append(len(speech)) or decode(self, speech, lengths),
    )
    for batch in (
        speech2text([short, long]),
        speech2text.batch_decode([short, long]),
        speech2text.batch_decode(padded, [len(short), len(long)]),
    ):
        assert list(map(texts, batch)) == [texts(one), texts(joined(others))]
    assert sizes == 3 * [2, 1]  # no more at once than were given


def test_audio_of_the_window_and_a_part_of_a_frame_is_decoded_whole(trained):
    speech2text = Speech2Text(**trained, beam_size=1, ctc_weight=0.0, maxlenratio=-2)
    ids = [speech2text(noise(40)[: 30 * RATE + more])[0][2] for more in (159, 160)]
    assert len(ids[1]) == 2 * len(ids[0])


def test_a_batch_of_long_audio_needs_its_lengths(trained):
    speech2text = Speech2Text(**trained, beam_size=1)
    with pytest.raises(ValueError, match="speech_lengths is required"):
        speech2text.batch_decode(np.stack([noise(31), noise(31)]))


def texts(results: list[tuple]) -> list[tuple]:
    assert len(results) == 2
    return [(*found, pytest.approx(float(scored.score), 1e-5)) for *found, scored in results]


def test_the_command_says_which_audio_it_decodes_in_parts(trained, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert not decode(trained, tmp_path, LONG, "--maxlenratio", "-4", "--num_workers", "0")
    (said,) = [record.message for record in caplog.records if "in parts" in record.message]
    assert said.startswith("utt-a: 31.00 s of audio are more than the 30 s that Whisper encodes")
    out = tmp_path / "out/1best_recog"
    assert len((out / "token_int").read_text().split()) == 1 + 2 * 5


def test_the_search_ends_at_the_last_position(trained, caplog):
    """1.5 s have 75 frames: maxlenratio 8 would allow 600 tokens."""
    speech2text = Speech2Text(**trained, beam_size=1, ctc_weight=0.0, maxlenratio=8, penalty=20.0)
    with caplog.at_level(logging.WARNING):
        hypothesis = speech2text(noise(1.5))[0][3]
    assert len(hypothesis.yseq) == 448 + 2
    assert sum("448 tokens" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_types(trained, dtype):
    speech2text = Speech2Text(**trained, beam_size=2, ctc_weight=0.0, maxlenratio=-3, dtype=dtype)
    assert isinstance(speech2text(noise(1))[0][0], str)


def test_audio_without_a_frame_is_too_short(trained):
    from espnet2.bin.asr_inference import TooShortUttError

    speech2text = Speech2Text(**trained, beam_size=2, ctc_weight=0.0)
    with pytest.raises(TooShortUttError, match="at least 201"):
        speech2text(noise(1)[:200])


def test_streaming_is_refused_in_one_line(trained, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noise(1) / 9, RATE)
    options = [word for key, value in trained.items() for word in (f"--{key}", value)]
    assert stream.main([*options, str(tmp_path / "a.wav")]) == 1
    message = capsys.readouterr().err
    assert (
        message.count("error: ") == 1
        and "whisper" in message.lower()
        and "Traceback" not in message
    )


def test_a_config_of_our_training_tells_the_sizes(tmp_path):
    """The original file may be gone; config.yaml has the dims of the model."""
    file = tmp_path / "own.pt"
    model = far_from_initialisation(whisper_weights.load_whisper(None, None, DIMS))
    torch.save({"dims": DIMS, "model_state_dict": model.state_dict()}, file)
    conf = {"whisper_model": str(file)}
    args = arguments(tmp_path, "kv_whisper", encoder_conf=conf, decoder_conf=conf)
    built = TrainingTask.build_model(args)
    assert args.encoder_conf["dims"] == args.decoder_conf["dims"] == DIMS
    torch.save(built.state_dict(), tmp_path / "model.pth")
    listed = {"token_list": str(tmp_path / "tokens.txt")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(vars(args) | listed))
    file.unlink()
    again, _ = ASRTask.build_model_from_file(tmp_path / "config.yaml", tmp_path / "model.pth")
    for key, value in built.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with pytest.raises(UserError, match=r"config\.yaml.*own\.pt"):
        ASRTask.build_model_from_file(tmp_path / "config.yaml")


def test_losses_are_espnets(tmp_path, trained):
    """Text preparation and the loss of a batch, with the same weights."""
    losses, state = [], torch.load(trained["asr_model_file"])
    for name in ("whisper", "kv_whisper"):
        args = arguments(tmp_path, name)
        with weights_follow():
            model = ASRTask.build_model(args)
        model.load_state_dict(state)
        prepare = ASRTask.build_preprocess_fn(args, train=True)
        text = prepare("u", {"text": "Hello world", "speech": noise(1)})["text"]
        assert text.tolist() == [50362, 15496, 995]
        batch = torch.as_tensor(text)[None]
        speech = torch.as_tensor(noise(1))[None]
        loss, _, _ = model.train()(speech, torch.tensor([RATE]), batch, torch.tensor([3]))
        losses.append(loss.detach())
    assert_close(losses[1], losses[0], 1e-5)
