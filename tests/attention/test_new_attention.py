"""An attention added as CONTRIBUTING says: one file (here a class), one line, one YAML."""

import pytest
import torch
from profile_json import eight, make_profile, write_profile
from small_encoders import FEATURES, assert_close, batch, build, encoders
from streams import Feeder, streaming, utterances
from torch import Tensor, nn

from espnet_kv.attention import ATTENTIONS, attention_label, attention_like
from espnet_kv.attention.softmax import SoftmaxAttention
from espnet_kv.bin import report
from espnet_kv.cache import Footprint
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.report.comparison import PALETTE


class SharedAttention(SoftmaxAttention):
    """One head of keys, which serve as values too, projected from `width` stored numbers."""

    options = ("width",)
    colour_slot = 6

    def __init__(self, sizes, dropout_rate, rel_pos, zero_triu=False, *, width: int = 6):
        super().__init__(sizes, dropout_rate, rel_pos, zero_triu)
        self.width = width
        self.linear_down = nn.Linear(sizes.n_feat, width)
        self.linear_up = nn.Linear(width, sizes.d_k)

    def project_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._up(self.linear_down(key)[:, None])

    def _up(self, small: Tensor) -> tuple[Tensor, Tensor]:
        k = self.linear_up(small)  # (B, 1, S, d_k)
        return k, k

    def cached_vectors(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.linear_down(x)[:, None],)

    def attend_cached(self, q, stored, bias):
        return super().attend_cached(q, self._up(stored[0]), bias)

    @property
    def cached_vector_sizes(self) -> list[tuple[int, int]]:
        return [(1, self.width)]

    @property
    def footprint(self) -> Footprint:
        return Footprint(frame=[(1, self.width)])

    @property
    def label(self) -> str:
        return f"shared {self.width}"


YAML = {"attention_type": "shared", "attention_conf": {"width": 5}}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(ATTENTIONS, "shared", SharedAttention)


@encoders
def test_it_is_trained(name):
    encoder = build(name, dynamic_chunk_training=True, **YAML).train()
    x, lengths = batch(95, 61)
    encoder(x, lengths)[0].pow(3).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@encoders
@pytest.mark.parametrize("left", [2, -1])
def test_it_streams_what_one_pass_gives(name, left):
    Feeder(streaming(name, 4, left, **YAML), utterances(23, 17)).run(size=9).check()


@pytest.mark.parametrize("cache_dtype", [None, "fp16", "int8", "int4"])
def test_its_bytes_are_measured_and_computed_alike(cache_dtype):
    encoder = streaming("kv_conformer", **YAML)
    state = encoder.init_state(2, cache_dtype=cache_dtype)
    encoder.forward_chunk(torch.randn(2, 90, FEATURES), state)
    assert state.nbytes == state.nbytes_analytic
    attention = [module for module in state.modules if module.kind == "attention"]
    assert all(module.nbytes == module.nbytes_analytic > 0 for module in attention)


def test_its_bytes_and_label_are_known_from_a_configuration():
    attention = attention_like("shared", {"width": 5}, 4, 16)
    assert attention.label == "shared 5"
    assert attention.footprint.frame_bytes("fp32") == 20
    assert attention_like("mla", {"kv_rank": 64}, 4, 256).label == "mla r64"
    assert attention_like("linear", {}, 4, 256).footprint.constant_bytes("fp32") == 4 * 4 * 64 * 65


def test_it_stands_in_tables_and_figures(tmp_path):
    """The profile records its label and its colour; the report has no line about it."""
    new = make_profile(
        model__attention_type="shared",
        model__attention_label=attention_label(streaming("kv_conformer", **YAML)),
        model__attention_colour_slot=SharedAttention.colour_slot,
    )
    paths = [write_profile(tmp_path / f"{n}.json", p) for n, p in enumerate([new, *eight()[:2]])]
    assert report.main([*map(str, paths), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/comparison.csv").read_text()
    assert "\nconformer shared 5," in text
    for name in ("wer_cache", "cache_growth"):
        drawn = (tmp_path / f"out/figures/{name}.svg").read_text()
        assert ">shared 5<" in drawn and PALETTE[6] in drawn


def test_a_decoder_takes_it():
    kinds = {f"{place}_{key}": value for place in ("self", "src") for key, value in YAML.items()}
    decoder = KVTransformerDecoder(23, 16, 4, **kinds, num_blocks=1, linear_units=8).eval()
    x, ys = torch.randn(11, 16), torch.randint(23, (1, 4))
    state = decoder.init_state(x)
    for length in range(1, 5):
        scores, state = decoder.score(ys[0, :length], state, x)
    expected, _ = decoder(x[None], torch.tensor([11]), ys, torch.tensor([4]))
    assert_close(scores, torch.log_softmax(expected[0, -1], dim=-1))
    assert state.search.nbytes_by_kind() == state.search.nbytes_analytic()
