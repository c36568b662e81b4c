"""What torch does to whole models: quantisation, flat parameter vectors, safe files."""

import copy
import pickle

import pytest
import torch
from small_decoders import ATTENTIONS as DECODED
from small_decoders import SIZE, VOCABULARY, of, search
from small_decoders import build as build_decoder
from small_encoders import ATTENTIONS, assert_close, build, encode, position_conf
from streams import STREAMED, Feeder, streaming, utterances

from espnet_kv.decoder.transformer import KVTransformerDecoder

LINEAR = {torch.nn.Linear}


def quantized(module: torch.nn.Module) -> torch.nn.Module:
    """As ESPnet's --quantize_asr_model true does it."""
    return torch.quantization.quantize_dynamic(module, qconfig_spec=LINEAR, dtype=torch.qint8)


@pytest.mark.parametrize("rel_pos", [True, False], ids=["rel", "abs"])
@pytest.mark.parametrize("attention", STREAMED)
def test_a_quantised_encoder_streams_what_one_pass_gives(attention, rel_pos):
    """Scales of dynamic quantisation depend on the frames at hand: close, not equal."""
    conf = position_conf("kv_conformer", rel_pos)
    encoder = streaming("kv_conformer", **STREAMED[attention], **conf)
    small = quantized(encoder)
    feeder = Feeder(small, utterances(20)).run(size=20)
    assert_close(torch.cat(feeder.out[0]), encode(encoder, feeder.xs[0]), 0.3)
    assert feeder.state.nbytes == feeder.state.nbytes_analytic


@pytest.mark.parametrize("attention", DECODED)
@pytest.mark.parametrize("src", DECODED)
def test_a_quantised_decoder_scores_as_before(attention, src):
    decoder = build_decoder(**of(attention, src))
    x, ys = torch.randn(11, SIZE), torch.randint(VOCABULARY, (3,))
    scores = []
    for module in (decoder, quantized(decoder)):
        state = module.init_state(x)
        for length in range(1, 4):
            logp, state = module.score(ys[:length], state, x)
        scores.append(logp)
    assert_close(scores[1], scores[0], 0.5)


def test_a_decoder_with_weights_for_search_is_quantised_too():
    decoder = build_decoder(**of("mla", "mla"))
    decoder.prepare_search()
    search(quantized(decoder), 3)(torch.randn(9, SIZE), maxlenratio=0.5)


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("attention", DECODED)
def test_parameters_of_a_decoder_are_contiguous(attention, searched):
    """torch.nn.utils.parameters_to_vector, LBFGS and safetensors ask for it."""
    decoder = build_decoder(**of(attention, attention))
    if searched:
        search(decoder, 3)(torch.randn(9, SIZE), maxlenratio=0.5)
    vector = torch.nn.utils.parameters_to_vector(decoder.parameters())
    assert vector.numel() == sum(p.numel() for p in decoder.parameters())
    assert all(tensor.is_contiguous() for tensor in decoder.state_dict().values())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_parameters_of_an_encoder_are_contiguous(attention):
    encoder = build("kv_conformer", **ATTENTIONS[attention])
    assert all(tensor.is_contiguous() for tensor in encoder.state_dict().values())


def test_weights_go_through_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    decoder = build_decoder(**of("mla", "gqa"))
    safetensors.save_file(decoder.state_dict(), tmp_path / "decoder.safetensors")
    loaded = safetensors.load_file(tmp_path / "decoder.safetensors")
    assert loaded.keys() == decoder.state_dict().keys()


def test_weights_laid_out_for_search_are_the_same_weights():
    decoder = build_decoder()
    prepared = copy.deepcopy(decoder)
    prepared.prepare_search()
    x = torch.randn(12, SIZE)
    found = [search(d, 5)(x, maxlenratio=0.5) for d in (decoder, prepared)]
    for one, other in zip(*found, strict=True):
        assert one.yseq.tolist() == other.yseq.tolist()
    weights = zip(decoder.parameters(), prepared.parameters(), strict=True)
    assert all(torch.equal(own, other) for own, other in weights)
    state = pickle.loads(pickle.dumps(prepared.state_dict()))
    KVTransformerDecoder.load_state_dict(decoder, state)
    assert all(p.is_contiguous() for p in decoder.parameters())
