"""Small Whisper models with random weights, ESPnet's and ours, and searches with them."""

from typing import Any

import pytest
import torch
from espnet2.asr.ctc import CTC
from espnet2.asr.decoder.whisper_decoder import OpenAIWhisperDecoder
from espnet2.asr.encoder.whisper_encoder import OpenAIWhisperEncoder
from espnet2.legacy.nets.batch_beam_search import BatchBeamSearch
from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer
from small_encoders import assert_close

from espnet_kv.decoder.whisper_decoder import KVWhisperDecoder
from espnet_kv.encoder.whisper_encoder import KVWhisperEncoder
from espnet_kv.espnet.openai_whisper import whisper_for_espnet

pytest.importorskip("whisper.audio", reason="openai-whisper is not installed")

VOCABULARY, SIZE, WINDOW = 31, 32, 1500
SOS, EOS = VOCABULARY - 2, VOCABULARY - 1
PRIMER = [SOS, 3, 5, 7]
DIMS = {
    "n_mels": 80,
    "n_audio_ctx": WINDOW,
    "n_audio_state": SIZE,
    "n_audio_head": 4,
    "n_audio_layer": 2,
    "n_vocab": VOCABULARY,
    "n_text_ctx": 448,
    "n_text_state": SIZE,
    "n_text_head": 4,
    "n_text_layer": 2,
}
ATTENTIONS: dict[str, tuple[str, dict]] = {
    "mha": ("mha", {}),
    "gqa": ("gqa", {"num_kv_heads": 2}),
    "mla": ("mla", {"kv_rank": 5}),
    "linear": ("linear", {}),
}


def of(self_attention: str, src_attention: str) -> dict[str, Any]:
    """Arguments of a decoder with these attentions."""
    kinds = {"self": ATTENTIONS[self_attention], "src": ATTENTIONS[src_attention]}
    return {f"{place}_attention_type": kind for place, (kind, _) in kinds.items()} | {
        f"{place}_attention_conf": conf for place, (_, conf) in kinds.items()
    }


def far_from_initialisation(module: torch.nn.Module) -> torch.nn.Module:
    """Add noise to the weights, which shows an exchange of two; in eval mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            # openai-whisper leaves positions uninitialised
            parameter.nan_to_num_(0, 0, 0).clamp_(-1, 1).add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def decoder(cls: type = KVWhisperDecoder, vocabulary: int = VOCABULARY, **conf: Any) -> Any:
    with whisper_for_espnet(DIMS):
        given = {"dims": DIMS} if cls is KVWhisperDecoder else {}
        made = cls(vocabulary, SIZE, whisper_model="", **given, **conf)
    return far_from_initialisation(made)


def decoders(**conf: Any) -> tuple[Any, Any]:
    """ESPnet's decoder and ours with its state dict, loaded strictly."""
    stock, ours = decoder(OpenAIWhisperDecoder, **conf), decoder(**conf)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock, ours


def encoder(cls: type = KVWhisperEncoder, **conf: Any) -> Any:
    with whisper_for_espnet(DIMS):
        given = {"dims": DIMS} if cls is KVWhisperEncoder else {}
        made = cls(whisper_model="", **given, **conf)
    return far_from_initialisation(made)


def encoders(**conf: Any) -> tuple[Any, Any]:
    """ESPnet's encoder and ours with its state dict, loaded strictly."""
    stock, ours = encoder(OpenAIWhisperEncoder, **conf), encoder(**conf)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock, ours


def search(
    scorer: Any,
    beam: int,
    ctc_weight: float = 0.0,
    cls: type = BatchBeamSearch,
    primer: Any = PRIMER,
) -> Any:
    """A beam search as ESPnet's asr_inference makes it."""
    torch.manual_seed(5)
    ctc = CTC(VOCABULARY, SIZE)
    made = cls(
        scorers={"decoder": scorer, "ctc": CTCPrefixScorer(ctc, EOS)},
        weights={"decoder": 1 - ctc_weight, "ctc": ctc_weight},
        beam_size=beam,
        vocab_size=VOCABULARY,
        sos=SOS,
        eos=EOS,
        pre_beam_score_key="full",
    ).eval()
    made.set_hyp_primer(primer)
    return made


def assert_same(ours: Any, stock: Any) -> None:
    """The same n-best list: tokens exactly, every score to a relative 1e-5."""
    assert len(ours) == len(stock) > 0
    for one, other in zip(ours, stock, strict=True):
        assert one.yseq.tolist() == other.yseq.tolist()
        assert_close(torch.as_tensor(one.score), torch.as_tensor(other.score), 1e-5)
        for name, score in other.scores.items():
            assert_close(torch.as_tensor(one.scores[name]), torch.as_tensor(score), 1e-5)
