"""Small decoders, ESPnet's and ours, and searches with them."""

from typing import Any

import torch
from espnet2.asr.ctc import CTC
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from espnet2.legacy.nets.batch_beam_search import BatchBeamSearch
from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer
from espnet2.legacy.nets.scorers.length_bonus import LengthBonus
from espnet2.lm.transformer_lm import TransformerLM
from small_encoders import assert_close

from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.espnet.ctc_prefix import FastCTCPrefixScorer

VOCABULARY, SIZE = 23, 16
SIZES = {"attention_heads": 4, "linear_units": 24, "num_blocks": 2}
OFF = {
    "dropout_rate": 0.0,
    "positional_dropout_rate": 0.0,
    "self_attention_dropout_rate": 0.0,
    "src_attention_dropout_rate": 0.0,
}
ATTENTIONS: dict[str, tuple[str, dict]] = {
    "mha": ("mha", {}),
    "gqa": ("gqa", {"num_kv_heads": 2}),
    "mla": ("mla", {"kv_rank": 5}),
    "linear": ("linear", {}),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalize_before": False},
    {"concat_after": True},
    {"qk_norm": True},
    {"num_blocks": 1, "attention_heads": 2},
    {"num_blocks": 4, "attention_heads": 8, "linear_units": 64},
]


def build(cls=KVTransformerDecoder, **conf: Any) -> torch.nn.Module:
    """A decoder with weights far from their initialisation, in eval mode."""
    decoder = cls(VOCABULARY, SIZE, **SIZES | OFF | conf)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder.eval()


def pair(**conf: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """ESPnet's decoder and ours with its state dict, loaded strictly."""
    stock, ours = build(TransformerDecoder, **conf), build(**conf)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock, ours


def of(self_attention: str, src_attention: str) -> dict[str, Any]:
    kinds = {"self": ATTENTIONS[self_attention], "src": ATTENTIONS[src_attention]}
    return {f"{place}_attention_type": kind for place, (kind, _) in kinds.items()} | {
        f"{place}_attention_conf": conf for place, (_, conf) in kinds.items()
    }


def scorers(
    decoder: torch.nn.Module, ctc_weight: float, lm: bool, **others: Any
) -> tuple[dict, dict]:
    """Scorers with the same weights for every decoder; ours comes with our CTC scorer."""
    torch.manual_seed(5)
    ctc_scorer = (
        FastCTCPrefixScorer if isinstance(decoder, KVTransformerDecoder) else CTCPrefixScorer
    )
    language_model = TransformerLM(VOCABULARY, embed_unit=8, att_unit=8, head=2, unit=8, layer=1)
    made = {
        "decoder": decoder,
        "ctc": ctc_scorer(CTC(VOCABULARY, SIZE), VOCABULARY - 1),
        "length_bonus": LengthBonus(VOCABULARY),
        "lm": language_model.eval(),
        **others,
    }
    weights = {
        "decoder": 1 - ctc_weight,
        "ctc": ctc_weight,
        "length_bonus": 0.1,
        "lm": 0.5 if lm else 0.0,
        **dict.fromkeys(others, 0.4),
    }
    return {k: v for k, v in made.items() if weights[k]}, weights


def search(
    decoder: torch.nn.Module,
    beam: int,
    ctc_weight: float = 0.0,
    lm: bool = False,
    cls: type = BatchBeamSearch,
    return_hs: bool = False,
    **others: Any,
):
    made, weights = scorers(decoder, ctc_weight, lm, **others)
    return cls(
        scorers=made,
        weights=weights,
        beam_size=beam,
        vocab_size=VOCABULARY,
        sos=VOCABULARY - 1,
        eos=VOCABULARY - 1,
        pre_beam_score_key=None if ctc_weight in (0.0, 1.0) else "full",
        return_hs=return_hs,
    ).eval()


def assert_same(ours, stock) -> None:
    """The same n-best list: tokens exactly, every score to 1e-4."""
    assert len(ours) == len(stock) > 0
    for one, other in zip(ours, stock, strict=True):
        assert one.yseq.tolist() == other.yseq.tolist()
        assert_close(torch.as_tensor(one.score), torch.as_tensor(other.score), 1e-4)
        for name, score in other.scores.items():
            assert_close(torch.as_tensor(one.scores[name]), torch.as_tensor(score), 1e-4)
        assert len(one.hs) == len(other.hs)
        for hidden, expected in zip(one.hs, other.hs, strict=True):
            assert_close(hidden, expected, 1e-4)
