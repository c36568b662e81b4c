"""The class Speech2Text: the results of ESPnet's, strict loading, cached searches."""

import inspect
import subprocess
import sys
import threading

import pytest
import torch
from espnet2.bin import asr_inference as espnet
from hydra.utils import get_class
from small_models import TOKENS, save, speech

from espnet_kv.bin.asr_inference import Speech2Text
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.errors import UserError
from espnet_kv.espnet import inference
from espnet_kv.espnet.ctc_prefix import FastCTCPrefixScorer
from espnet_kv.espnet.inference import replaced

REPLACED = ("ASRTask", "LMTask", "CTCPrefixScorer", "Speech2Text")
MODELS = {
    "stock": {"encoder": "conformer", "encoder_conf": None},
    "mha": {"encoder_conf": {"attention_type": "mha", "attention_conf": {}}},
    "gqa": {"encoder_conf": {"attention_type": "gqa", "attention_conf": {"num_kv_heads": 2}}},
    "mla": {},
    "linear": {"encoder_conf": {"attention_type": "linear", "attention_conf": {}}},
}
LETTERS = ("ABBA", "BAB", "A")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Name of MODELS -> the arguments that name its files."""
    made = {}
    for name, changes in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        save(folder, **changes)
        made[name] = {
            "asr_train_config": str(folder / "config.yaml"),
            "asr_model_file": str(folder / "model.pth"),
        }
    return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ctc_weight", [0.3, 1.0])
def test_results_are_those_of_espnets_class(name, ctc_weight, models):
    options = {"beam_size": 3, "nbest": 3, "ctc_weight": ctc_weight}
    ours = Speech2Text(**models[name], **options)
    stock = espnet.Speech2Text(**models[name], **options)
    assert isinstance(ours.asr_model.decoder, KVTransformerDecoder)
    assert isinstance(ours.beam_search.part_scorers["ctc"], FastCTCPrefixScorer)
    assert not isinstance(stock.asr_model.decoder, KVTransformerDecoder)
    audio = [speech(letters) for letters in LETTERS]
    for one, other in zip(ours(audio), stock(audio), strict=True):
        assert_same(one, other)
    one = ours(audio[0])
    assert_same(one, stock(audio[0].numpy()))
    assert ctc_weight < 1 or one[0][0] == LETTERS[0]


def assert_same(ours: list, stock: list) -> None:
    """N-best lists agree in texts, tokens and every score."""
    assert [result[:3] for result in ours] == [result[:3] for result in stock]
    for (*_, one), (*_, other) in zip(ours, stock, strict=True):
        assert one.yseq.tolist() == other.yseq.tolist()
        assert one.scores.keys() == other.scores.keys()
        for key, score in other.scores.items():
            torch.testing.assert_close(
                torch.as_tensor(one.scores[key]), torch.as_tensor(score), rtol=1e-4, atol=1e-4
            )


def test_stock_searches_where_they_are_wished_for(models):
    made = Speech2Text(**models["mha"], beam_size=2, kv_decoder=False, fast_ctc=False)
    assert not isinstance(made.asr_model.decoder, KVTransformerDecoder)
    assert not isinstance(made.beam_search.part_scorers["ctc"], FastCTCPrefixScorer)


def test_it_takes_espnets_arguments_by_place_and_name(models):
    files = models["mla"]
    places = list(inspect.signature(espnet.Speech2Text).parameters)
    assert places[:2] == ["asr_train_config", "asr_model_file"]
    made = Speech2Text(*files.values(), beam_size=2, nbest=2, device="cpu", maxlenratio=-3.0)
    assert (made.nbest, made.maxlenratio, made.beam_search.beam_size) == (2, -3.0, 2)
    made = Speech2Text.from_pretrained(**files, beam_size=2)
    assert type(made) is Speech2Text
    with pytest.raises(TypeError, match="beam_width"):
        Speech2Text(**files, beam_width=3)


def test_a_packed_model_is_found_by_its_tag(models, monkeypatch):
    asked = []
    monkeypatch.setattr(inference, "unpacked", lambda tag: asked.append(tag) or models["mla"])
    assert type(Speech2Text.from_pretrained("someone/model", beam_size=2)) is Speech2Text
    assert asked == ["someone/model"]


FAULTS = [
    ({"beam_size": 6}, "^beam_size 6 is more than the 5 tokens"),
    ({"beam_size": 2, "nbest": 3}, "^nbest 3 is more than beam_size 2:"),
    ({"ctc_weight": 1.5}, "^ctc_weight 1.5: allowed: 0 to 1"),
    ({"lm_file": "lm.pth"}, "^lm_file needs lm_train_config"),
    ({"time_sync": "yes"}, 'argument "time_sync"'),
    ({"asr_model_file": "nowhere.pth"}, "nowhere.pth does not exist"),
]


@pytest.mark.parametrize(("options", "said"), FAULTS, ids=lambda x: str(x)[:24])
def test_what_cannot_be_used_is_named_as_the_argument(options, said, models):
    with pytest.raises(UserError, match=said) as raised:
        Speech2Text(**models["mla"] | {"beam_size": 2} | options)
    assert "--" not in str(raised.value)


def test_a_checkpoint_of_another_attention_is_refused(models):
    files = models["mla"] | {"asr_model_file": models["mha"]["asr_model_file"]}
    with pytest.raises(UserError, match=r"missing keys: .*linear_kv_down"):
        Speech2Text(**files, beam_size=2)


def test_audio_that_is_too_short_is_said(models):
    with pytest.raises(espnet.TooShortUttError, match="10 samples"):
        Speech2Text(**models["mla"], beam_size=2)(torch.zeros(10))


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_espnets_module_is_as_before(ends, models):
    own = {name: getattr(espnet, name) for name in REPLACED}
    if ends == "well":
        Speech2Text(**models["mla"], beam_size=2)
    else:
        with pytest.raises(UserError):
            Speech2Text(**models["mla"], beam_size=len(TOKENS) + 1)
    assert {name: getattr(espnet, name) for name in REPLACED} == own


def test_threads_do_not_see_each_others_classes(models):
    """What one thread replaces is restored before the next replaces it."""
    own, inside, go = espnet.ASRTask, threading.Event(), threading.Event()

    def hold() -> None:
        with replaced(espnet, ASRTask="held"):
            inside.set()
            go.wait(20)

    def add() -> None:
        with replaced(espnet, ASRTask="added"):
            pass

    threads = [threading.Thread(target=hold), threading.Thread(target=add)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    assert espnet.ASRTask == "held"
    go.set()
    for thread in threads:
        thread.join(20)
    assert espnet.ASRTask is own


def test_importing_the_module_does_not_load_espnets_inference():
    code = (
        "import sys, espnet_kv.bin.asr_inference\n"
        "assert 'espnet2.bin.asr_inference' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert get_class("espnet_kv.bin.asr_inference.Speech2Text") is inference.Speech2Text
