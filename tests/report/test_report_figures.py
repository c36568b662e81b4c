"""Figures show the numbers of the profiles: what was plotted is read back and compared."""

import re

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from profile_json import eight, make_profile, write_profile

from espnet_kv.profile.schema import read_profiles
from espnet_kv.report import plots
from espnet_kv.report.comparison import PALETTE, Entry, entries
from espnet_kv.report.page import inline_svg
from espnet_kv.report.style import duration, milliseconds, on_ticks, size, style
from espnet_kv.report.write import save


@pytest.fixture(autouse=True)
def _style():
    with style():
        yield


@pytest.fixture
def models_of(tmp_path):
    """A function: profiles as written -> the models of a report."""

    def read(profiles: list[dict]) -> list[Entry]:
        paths = [write_profile(tmp_path / f"{n}.json", p) for n, p in enumerate(profiles)]
        return entries(read_profiles(paths))

    return read


def panel(figure: Figure, title: str) -> Axes:
    return next(axis for axis in figure.axes if axis.get_title(loc="left") == title)


def lines(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    return {str(one.get_label()): list(map(tuple, one.get_xydata())) for one in axis.lines}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_cache_bars_are_stacked_from_the_bytes_allocated(models_of, narrow):
    models = models_of(eight())
    figure = plots.cache_size(models, narrow)
    stacks = figure.axes[0].containers
    assert [stack.get_label() for stack in stacks] == ["attention", "conv", "input"]
    for n, entry in enumerate(models):
        allocated = entry.profile.bounded().allocated
        attention, conv, input_ = (stack[n] for stack in stacks)
        assert [b.get_width() for b in (attention, conv, input_)] == [
            allocated.attention,
            allocated.conv,
            allocated.input,
        ]
        assert conv.get_x() == allocated.attention
        assert input_.get_x() == allocated.attention + allocated.conv
        if not narrow:
            held = size(entry.profile.bounded().bytes.attention)
            assert texts(figure)[n].endswith(f"; held {held}")
    assert {bar.get_facecolor()[:3] for bar in stacks[0]} == {
        tuple(int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)) for colour in PALETTE[:4]
    }
    shown = texts(figure) if narrow else [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert {entry.name for entry in models} <= set(shown)


def test_wer_is_drawn_against_attention_cache_with_the_front(models_of):
    models = models_of(eight())
    figure = plots.wer_against_cache(models)
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "test_clean, offline",
        "test_other, offline",
        "test_clean, streaming",
        "test_other, streaming",
    ]
    for axis in figure.axes:
        name, mode = axis.get_title(loc="left").split(", ")
        drawn = lines(axis)
        for entry in models:
            rate = entry.profile.wer[mode][name].wer
            assert drawn[entry.name] == [(entry.profile.bounded().allocated.attention, rate)]
        points = [drawn[entry.name][0] for entry in models]
        front = drawn["Pareto front"]
        better = lambda a, b: a != b and a[0] <= b[0] and a[1] <= b[1]  # noqa: E731
        assert front == sorted(p for p in points if not any(better(q, p) for q in points))
        assert 1 < len(front) < len(points) and axis.get_xscale() == "log"


def test_the_front_joins_only_what_does_not_overlap(models_of):
    """mla has the smaller cache; mha is better by 0.1, which is a difference or not."""
    fronts = {}
    for width in (0.04, 0.2):
        profiles = [make_profile("conformer", attention) for attention in ("mha", "mla")]
        for profile in profiles:
            rates = profile["wer"]["offline"]["test_clean"]
            rates["wer_interval"] = [rates["wer"] - width, rates["wer"] + width]
            profile["wer"] = {"offline": {"test_clean": rates}}
        figure = plots.wer_against_cache(models_of(profiles))
        axis = figure.axes[0]
        fronts[width] = lines(axis).get("Pareto front")
        explained = {text.get_text() for text in figure.legends[0].get_texts()}
        assert ("Pareto front" in explained) == (fronts[width] is not None)
        ends = {
            tuple(segment[:, 1]) for bars in axis.collections for segment in bars.get_segments()
        }
        assert ends == {(1.1 - width, 1.1 + width), (1.2 - width, 1.2 + width)}
        assert axis.get_ylim()[0] <= 1.1 - width and axis.get_ylim()[1] >= 1.2 + width
    assert [wer for _, wer in fronts[0.04]] == [1.2, 1.1]
    assert fronts[0.2] is None


def test_without_an_interval_a_rate_is_a_point(models_of):
    profiles = [make_profile("conformer", attention) for attention in ("mha", "mla")]
    for profile in profiles:
        profile["wer"]["offline"]["test_clean"]["wer_interval"] = None
    axis = plots.wer_against_cache(models_of(profiles)).axes[0]
    assert [wer for _, wer in lines(axis)["Pareto front"]] == [1.2, 1.1]


def test_a_missing_word_error_rate_is_no_point_at_zero(models_of):
    profiles = eight(cache_dtypes=("fp32",))[:3]
    profiles[0]["wer"] = {}
    profiles[1]["wer"]["offline"]["test_clean"]["wer"] = None
    del profiles[2]["wer"]["streaming"]
    models = models_of(profiles)
    figure = plots.wer_against_cache(models)
    drawn = {axis.get_title(loc="left"): lines(axis) for axis in figure.axes}
    having = {title: {n for n in found if n in names_of(models)} for title, found in drawn.items()}
    assert having == {
        "test_clean, offline": {"conformer mla r16"},
        "test_other, offline": {"conformer gqa G2", "conformer mla r16"},
        "test_clean, streaming": {"conformer gqa G2"},
        "test_other, streaming": {"conformer gqa G2"},
    }
    assert all(y > 0 for found in drawn.values() for points in found.values() for _, y in points)


def names_of(models: list[Entry]) -> set[str]:
    return {entry.name for entry in models}


def test_where_weights_come_from_is_seen_in_the_marker(models_of):
    source = {"source": "exp/asr_mha"}
    profiles = [
        make_profile("conformer", "mla"),
        make_profile("conformer", "mla", model__converted_from=source),
        make_profile("conformer", "mla", model__converted_from=source | {"finetune_epochs": 3}),
        make_profile("branchformer", "mla"),
    ]
    models = models_of(profiles)
    figure = plots.wer_against_cache(models)
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    looks = {e.name: (drawn[e.name].get_marker(), drawn[e.name].get_fillstyle()) for e in models}
    assert looks == {
        "conformer mla r16": ("o", "full"),
        "conformer mla r16 (converted)": ("o", "none"),
        "conformer mla r16 (fine-tuned)": ("o", "bottom"),
        "branchformer mla r16": ("s", "full"),
    }
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"trained from scratch", "converted", "converted and fine-tuned"} <= set(legend)


def test_cache_growth_has_a_line_for_each_model_and_bound(models_of):
    models = models_of(eight())
    figure = plots.cache_growth(models)
    for entry in models:
        drawn = lines(panel(figure, entry.encoder))
        for side in ("bounded", "unbounded"):
            assert drawn[f"{entry.name}, {side}"] == [
                (length.seconds, getattr(length, side).allocated.attention)
                for length in entry.profile.own_cache.lengths
            ]


def test_time_is_the_median_and_reaches_the_95th_percentile(models_of):
    models = models_of(eight())
    figure = plots.inference_time(models)
    for title, part in (
        ("one chunk, streamed", "chunk_ms"),
        ("whole utterance, offline", "utterance_ms"),
        ("first token", "first_token_ms"),
    ):
        axis = panel(figure, title)
        spreads = [getattr(entry.profile.time, part) for entry in models]
        assert [bar.get_width() for bar in axis.patches] == [s.p50 for s in spreads]
        assert [line.get_xdata()[-1] for line in axis.lines] == [s.p95 for s in spreads]


def test_memory_bars_are_the_peaks(models_of):
    models = models_of(eight())
    figure = plots.peak_memory(models)
    for title, part in (("streaming", "streaming"), ("whole utterance, offline", "offline")):
        widths = [bar.get_width() for bar in panel(figure, title).patches]
        assert widths == [getattr(e.profile.memory, f"{part}_bytes") for e in models]


def test_growth_of_time_and_memory(models_of):
    models = models_of(eight()[:2])
    time = lines(plots.time_growth(models).axes[0])
    memory = lines(plots.memory_growth(models).axes[0])
    for entry in models:
        lengths = entry.profile.time.lengths
        assert time[entry.name] == [(length.seconds, length.encode_ms) for length in lengths]
        for mode in ("offline", "streaming"):
            assert memory[f"{entry.name}, {mode}"] == [
                (m.seconds, getattr(m, f"{mode}_bytes")) for m in entry.profile.memory.lengths
            ]


def test_the_hour_is_drawn_for_those_who_have_it(models_of):
    with_hour, without = make_profile("conformer", "mha"), make_profile("conformer", "mla")
    without["time"]["hour"] = None
    models = models_of([with_hour, without])
    figure = plots.hour(models)
    minutes = [(m["minute"], m["chunk_ms"]) for m in with_hour["time"]["hour"]]
    assert lines(figure.axes[0]) == {"conformer mha": minutes}
    assert texts(figure) == ["mha"]
    assert plots.hour(models[1:]) is None


def test_cache_dtypes_are_points_of_their_bytes(models_of):
    models = models_of([make_profile("conformer", "mla", cache_dtypes=("fp32", "int8", "int4"))])
    figure = plots.cache_dtypes(models)
    sizes = [x for x, _ in lines(figure.axes[0])["conformer mla r16"]]
    assert sizes == [
        models[0].profile.bounded(d).allocated.attention for d in ("fp32", "int8", "int4")
    ]
    assert texts(figure) == ["fp32", "int8", "int4"]
    assert plots.cache_dtypes(models_of([make_profile(cache_dtypes=("fp32",))])) is None


@pytest.mark.parametrize("draw", plots.PLOTS.values(), ids=plots.PLOTS)
def test_a_profile_without_measurements_has_no_figures(models_of, draw):
    parts = ("cache", "time", "memory", "wer")
    models = models_of([make_profile(**dict.fromkeys(parts))])
    assert draw(models, False) is None


def test_the_same_figure_is_the_same_file(models_of, tmp_path):
    models = models_of([make_profile()])
    made = []
    for folder in ("a", "b"):
        figure = plots.peak_memory(models)
        (tmp_path / folder).mkdir()
        made.append([path.read_bytes() for path in save(figure, tmp_path / folder / "memory")])
    assert made[0] == made[1]
    assert made[0][0].startswith(b"\x89PNG") and b"<svg" in made[0][1]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"memory.png", "memory.svg"}


def test_an_inline_figure_takes_the_colours_of_the_page_and_keeps_its_ids_apart(models_of):
    figure = plots.cache_growth(models_of(eight()[:2]))
    svg = inline_svg(figure, "growth")
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert "var(--ink)" in svg and "#22262c" not in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids)) and all(i.startswith("growth-") for i in ids)
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids)
    assert "http" not in svg and ">mha<" in svg


def test_a_name_is_never_read_as_a_formula(models_of, tmp_path):
    models = models_of([make_profile("$\\frac$", "mha"), make_profile("$x$", "mla")])
    for draw in (plots.cache_size, plots.cache_growth, plots.wer_against_cache):
        assert ">$x$" in inline_svg(draw(models), "a")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (100e3, "100 kB"), (2.5e6, "2.5 MB"), (10e3, "10 kB"), (1.25e6, "1.25 MB")],
)
def test_ticks_have_no_zeros_behind_the_point(value, text):
    assert on_ticks(size)(value) == text


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (size, 0, "0 B"),
        (size, 940, "940 B"),
        (size, 16384, "16.4 kB"),
        (size, 1_572_864, "1.57 MB"),
        (duration, 30, "30.0 s"),
        (duration, 600, "10.0 min"),
        (milliseconds, 6.2, "6.20 ms"),
        (milliseconds, 1500, "1.50 s"),
    ],
)
def test_units(write, value, text):
    assert write(value) == text
