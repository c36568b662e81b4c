"""Language models in commands and in Speech2Text: which class searches, and what it finds."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from espnet2.bin import asr_inference as espnet
from espnet2.bin import lm_train as stock_lm_train
from espnet2.lm.transformer_lm import TransformerLM
from espnet2.tasks.lm import LMTask
from small_models import TOKENS, save, speech
from small_training import largest_difference, lm_options, update_losses, weights, write_data

from espnet_kv.bin import asr_inference, lm_calc_perplexity, lm_train
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.errors import UserError
from espnet_kv.espnet.inference import Speech2Text
from espnet_kv.lm.transformer_lm import KVTransformerLM
from espnet_kv.names import REMARK

REPO = Path(__file__).parents[2]
SIZES = {"embed_unit": 8, "att_unit": 16, "head": 4, "unit": 16, "layer": 2}
LMS = {
    "stock": {"lm": "transformer", "lm_conf": SIZES},
    "mha": {"lm": "kv_transformer", "lm_conf": SIZES},
    "mla": {
        "lm": "kv_transformer",
        "lm_conf": SIZES | {"attention_type": "mla", "attention_conf": {"kv_rank": 4}},
    },
    "packed": {"lm": f"kv_transformer{REMARK}", "lm_conf": SIZES},
    "rnn": {"lm": "seq_rnn", "lm_conf": {"unit": 8, "nlayers": 1}},
}
AUDIO = [speech(letters) for letters in ("ABBA", "BAB", "A")]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Name of LMS -> arguments that name its files and those of an ASR model."""
    folder = tmp_path_factory.mktemp("asr")
    save(folder, encoder="conformer", encoder_conf=None)
    made = {}
    for name, config in LMS.items():
        lm = tmp_path_factory.mktemp(name)
        conf = LMTask.get_default_config() | {"token_list": TOKENS} | config
        torch.manual_seed(0)
        model = LMTask.build_model(argparse.Namespace(**conf))
        torch.save(model.state_dict(), lm / "lm.pth")
        (lm / "config.yaml").write_text(yaml.safe_dump(conf))
        made[name] = {
            "asr_train_config": str(folder / "config.yaml"),
            "asr_model_file": str(folder / "model.pth"),
            "lm_train_config": str(lm / "config.yaml"),
            "lm_file": str(lm / "lm.pth"),
        }
    return made


def results(made, audio) -> list[list]:
    """Tokens, and the total score and that of the language model of every hypothesis."""
    return [
        [(tokens, float(hyp.score), float(hyp.scores["lm"])) for _, tokens, _, hyp in nbest]
        for nbest in made(audio)
    ]


def assert_near(ours: list[list], stock: list[list], tolerance: float = 1e-5) -> None:
    for nbest, expected in zip(ours, stock, strict=True):
        assert [tokens for tokens, *_ in nbest] == [tokens for tokens, *_ in expected]
        for (_, *scores), (_, *others) in zip(nbest, expected, strict=True):
            assert scores == pytest.approx(others, rel=tolerance, abs=1e-4)


OPTIONS = {"beam_size": 3, "nbest": 3, "ctc_weight": 0.3, "lm_weight": 0.6}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_results_are_those_of_espnets_class(batch_size, files):
    ours, stock = (cls(**files["stock"], **OPTIONS) for cls in (Speech2Text, espnet.Speech2Text))
    assert type(ours.beam_search.scorers["lm"]) is KVTransformerLM
    assert type(stock.beam_search.scorers["lm"]) is TransformerLM
    audio = AUDIO[:batch_size]
    assert_near(results(ours, audio), results(stock, audio))
    again = Speech2Text(**files["mha"], **OPTIONS)  # the same weights
    assert_near(results(again, audio), results(stock, audio))


def test_stock_searches_where_they_are_wished_for(files):
    made = Speech2Text(**files["stock"], **OPTIONS, kv_decoder=False)
    assert type(made.beam_search.scorers["lm"]) is TransformerLM
    assert not isinstance(made.beam_search.scorers["decoder"], KVTransformerDecoder)
    again = Speech2Text(**files["mla"], **OPTIONS, kv_decoder=False)
    assert type(again.beam_search.scorers["lm"]) is KVTransformerLM


@pytest.mark.parametrize("name", ["mla", "packed", "rnn"])
def test_other_language_models(name, files):
    made = Speech2Text(**files[name], **OPTIONS)
    assert isinstance(made.beam_search.scorers["lm"], KVTransformerLM) == (name != "rnn")
    if name == "mla":  # ESPnet's class searches with it too, once our package is imported
        stock = espnet.Speech2Text(**files[name], **OPTIONS)
        assert_near(results(made, AUDIO), results(stock, AUDIO))
    assert len(results(made, AUDIO)) == len(AUDIO)


@pytest.mark.parametrize(
    "options",
    [
        {"quantize_lm": True},
        {"quantize_asr_model": True, "quantize_lm": True, "quantize_dtype": "float16"},
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
    ],
    ids=str,
)
def test_other_options_of_the_search(options, files):
    ours, stock = (
        Speech2Text(**files["stock"], **OPTIONS | {"nbest": 1}, **options, kv_decoder=kv)
        for kv in (True, False)
    )
    exact = options == {"dtype": "float64"}
    for (one,), (other,) in zip(results(ours, AUDIO), results(stock, AUDIO), strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-5 if exact else 0.1)


def test_a_checkpoint_of_another_attention_is_refused(files):
    mixed = files["mla"] | {"lm_file": files["stock"]["lm_file"]}
    with pytest.raises(UserError, match=r"lm.pth: .*missing keys: .*linear_kv_down") as raised:
        Speech2Text(**mixed, **OPTIONS)
    assert "\n" not in str(raised.value)


def test_asr_inference_searches_with_a_cache(files, tmp_path, monkeypatch):
    calls, scored = [], KVTransformerLM.batch_score

    def counted(lm, ys, *args):
        calls.append(len(ys))
        return scored(lm, ys, *args)

    monkeypatch.setattr(KVTransformerLM, "batch_score", counted)
    import soundfile

    soundfile.write(tmp_path / "a.wav", AUDIO[0].numpy(), 16000)
    (tmp_path / "wav.scp").write_text(f"u1 {tmp_path / 'a.wav'}\n")
    given = [f"--{name}={value}" for name, value in (files["stock"] | OPTIONS).items()]
    given += [f"--data_path_and_name_and_type={tmp_path / 'wav.scp'},speech,sound"]
    texts = {}
    for kv in ("true", "false"):
        out = tmp_path / kv
        assert asr_inference.main([*given, "--kv_decoder", kv, f"--output_dir={out}"]) == 0
        texts[kv] = [(out / f"{n}best_recog/text").read_text() for n in (1, 2, 3)]
        assert bool(calls) == (kv == "true")
        calls.clear()
    assert texts["true"] == texts["false"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def lm_training(data: Path, exp: Path, lm: str, **conf) -> list[str]:
    config = {"lm": lm, "lm_conf": SIZES | conf, "log_interval": 1, "use_tensorboard": True}
    exp.with_suffix(".yaml").write_text(yaml.safe_dump(config | {"train_dtype": "float64"}))
    given = lm_options(data, exp)
    dropped = ("--lm", "--lm_conf", "--use_tensorboard")
    pairs = [p for p in zip(given[::2], given[1::2], strict=True) if p[0] not in dropped]
    return ["--config", str(exp.with_suffix(".yaml")), *[word for pair in pairs for word in pair]]


def test_training_is_espnets_from_the_same_seed(data, tmp_path):
    """With dropout; one checkpoint is resumed by the other class."""
    assert lm_train.main(lm_training(data, tmp_path / "ours", "kv_transformer")) == 0
    stock_lm_train.main(lm_training(data, tmp_path / "stock", "transformer"))
    ours, stock = (update_losses(tmp_path / name) for name in ("ours", "stock"))
    assert len(stock) > 4 and largest_difference(ours, stock) < 1e-5
    last = [weights(tmp_path / name / "2epoch.pth") for name in ("ours", "stock")]
    assert list(last[0]) == list(last[1])
    resumed = lm_training(data, tmp_path / "stock", "kv_transformer")
    assert lm_train.main([*resumed, "--max_epoch", "3"]) == 0


def test_espnets_commands_know_it(data, tmp_path, capsys):
    """As asr.sh calls them: training, then perplexity by a class of stock weights."""
    given = lm_training(data, tmp_path / "exp", "kv_transformer", attention_type="linear")
    call = [sys.executable, "-m", "espnet_kv", "-m", "espnet2.bin.lm_train", *given]
    ended = subprocess.run(call, cwd=REPO, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    config = yaml.safe_load((tmp_path / "exp/config.yaml").read_text())
    assert config["lm"] == "kv_transformer"
    assert config["lm_conf"]["attention_type"] == "linear"
    options = {
        "output_dir": tmp_path / "ppl",
        "data_path_and_name_and_type": f"{data}/text,text,text",
        "train_config": tmp_path / "exp/config.yaml",
        "model_file": tmp_path / "exp/valid.loss.ave.pth",
        "num_workers": 0,
    }
    assert lm_calc_perplexity.main([f"--{key}={value}" for key, value in options.items()]) == 0
    assert 1 < float((tmp_path / "ppl/ppl").read_text()) < 100
    state = torch.load(tmp_path / "exp/valid.loss.ave.pth")
    state.popitem()
    torch.save(state, tmp_path / "cut.pth")
    config.pop("lm")
    (tmp_path / "asr.yaml").write_text(yaml.safe_dump(config))
    for key, name, said in (
        ("model_file", "cut.pth", "missing keys: "),
        ("train_config", "asr.yaml", "asr.yaml is not a config.yaml .*it names no lm"),
    ):
        wrong = options | {key: tmp_path / name}
        assert lm_calc_perplexity.main([f"--{k}={value}" for k, value in wrong.items()]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.match(f"error: .*{said}", last), last


@pytest.mark.parametrize(
    ("conf", "said"),
    [
        ({"attention_type": "mqa"}, "attention_type: unknown 'mqa' (allowed: mha, gqa, mla, lin"),
        ({"attention_conf": {"rank": 4}}, "attention_conf.rank: mha does not take it"),
        ({"head": 3}, "lm_conf.head: 3 does not divide att_unit 16"),
        ({"units": 3}, "lm_conf.units: KVTransformerLM has no such argument"),
    ],
    ids=str,
)
def test_a_bad_key_is_one_line(conf, said, data, tmp_path, capsys):
    assert lm_train.main(lm_training(data, tmp_path / "exp", "kv_transformer", **conf)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and said in errors[0]
