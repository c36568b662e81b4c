"""The comparison as CSV, Markdown and plain text, and the notes on rows that do not compare."""

import csv
import io
import re

import pytest
from profile_json import eight, make_profile, write_profile

from espnet_kv.attention import ATTENTIONS
from espnet_kv.errors import UserError
from espnet_kv.profile.schema import read_profiles
from espnet_kv.report.comparison import PALETTE, compare, entries
from espnet_kv.report.table import MISSING, comparison_csv, joined, markdown, placed, plain, tables


class Compared:
    """Profiles as written, and everything that is made of them."""

    def __init__(self, folder, profiles):
        paths = [write_profile(folder / f"{n}.json", p) for n, p in enumerate(profiles)]
        self.models = entries(read_profiles(paths))
        self.names = [entry.name for entry in self.models]
        self.parts = tables(self.models)
        self.notes = compare(self.models, joined(self.parts))
        self.csv = comparison_csv(self.parts, self.notes)
        self.rows = list(csv.DictReader(io.StringIO(self.csv)))
        self.plain = plain(self.parts[0], self.notes)

    def markdown(self, command="c"):
        return markdown(self.models, self.parts[0], self.notes, command)


@pytest.fixture
def report(tmp_path):
    """A function: profiles as written -> what a report makes of them."""
    return lambda profiles: Compared(tmp_path, profiles)


def test_csv_gives_back_what_the_profiles_hold(report):
    made = report(eight())
    assert [row["model"] for row in made.rows] == made.names
    for row, entry in zip(made.rows, made.models, strict=True):
        profile = entry.profile
        own, int8 = profile.bounded(), profile.bounded("int8")
        expected = {
            "cache_attention_allocated": own.allocated.attention,
            "cache_total_allocated": own.allocated.total,
            "cache_rest_allocated": own.allocated.conv + own.allocated.input,
            "streams_per_gib": 2**30 // own.allocated.total,
            "streams_per_gib_int8": 2**30 // int8.allocated.total,
            "position_bytes": profile.own_cache.position,
            "cache_attention_bytes": own.bytes.attention,
            "cache_total_bytes": own.bytes.total,
            "cache_attention_bytes_int8": int8.bytes.attention,
            "cache_attention_allocated_int8": int8.allocated.attention,
            "chunk_ms_p95": profile.time.chunk_ms.p95,
            "cer_streaming_test_other": profile.wer["streaming"]["test_other"].cer,
            "search": "beam_size 10, ctc_weight 0.7",
            "command": profile.settings.command,
            "notes": "",
        }
        assert {key: row[key] for key in expected} == {k: str(v) for k, v in expected.items()}


def test_what_is_not_known_is_empty_in_csv_and_a_dash_for_people(report):
    known, unknown = make_profile("conformer", "mha"), make_profile("conformer", "mla")
    unknown["wer"], unknown["time"] = {}, None
    made = report([known, unknown])
    assert made.rows[1]["wer_offline_test_clean"] == "" and made.rows[1]["chunk_ms_p50"] == ""
    for text in (made.markdown(), made.plain):
        line = next(one for one in text.splitlines() if re.match(r"\|?conformer mla", one))
        assert line.count(MISSING) == 4 + 4  # error rates; two times and two real-time factors
    assert {"wer_offline_test_clean", "chunk_ms_p50"} <= set(made.parts[0].values)


def test_error_rates_stand_with_their_intervals(report):
    profile = make_profile("conformer", "mha")
    profile["wer"]["streaming"]["test_other"]["wer_interval"] = None
    profile["wer"]["streaming, int8 cache"] = {"test_clean": {"wer": 3.1, "decoding": "d"}}
    made = report([profile])
    (row,) = made.rows
    assert (row["wer_offline_test_clean_low"], row["wer_offline_test_clean_high"]) == (
        str(1.1 - 0.04), str(1.1 + 0.04),
    )  # fmt: skip
    assert "wer_streaming_test_other_low" not in row
    assert row["wer_streaming_int8_cache_test_clean"] == "3.1"
    line = next(one for one in made.markdown().splitlines() if one.startswith("|conformer mha"))
    assert "|1.1 (1.1 to 1.1)|" in line and "|4.1|" in line and "|3.1|" in line
    assert "low" not in made.markdown()
    assert (
        "intervals 95 %, by bootstrap over utterances (2000 resamples, seed 0)" in made.markdown()
    )


def three_seeds(**parts):
    """Three trainings of one model, by name, seed and error rates."""
    made = []
    for seed, wer in ((1, 2.0), (3, 2.6), (2, 2.0)):
        profile = make_profile("conformer", "mla", model__training_seed=seed, **parts)
        profile["name"] = f"asr_train_asr_conformer_mla_raw_seed{seed}_small"
        profile["model"]["experiment"] = f"exp{seed}/{profile['name']}"
        profile["settings"]["command"] = f"profile {seed}"
        profile["wer"]["offline"]["test_clean"]["wer"] = wer
        profile["time"]["rtf"] = 0.01 * seed
        made.append(profile)
    return made


def test_trainings_that_differ_in_the_seed_are_one_row(report):
    made = report([make_profile("conformer", "mha"), *three_seeds()])
    assert made.names == ["conformer mha", "conformer mla r16"]
    row = made.rows[1]
    assert [row[f"wer_offline_test_clean{end}"] for end in ("", "_low", "_high")] == [
        str((2.0 + 2.6 + 2.0) / 3), "2.0", "2.6",
    ]  # fmt: skip
    assert float(row["rtf"]) == pytest.approx(0.02)
    assert row["notes"] == "mean of the seeds 1, 2, 3; error rates from the lowest to the highest"
    text = made.markdown()
    assert "|2.2 (2.0 to 2.6)|" in text
    assert [f"`profile {seed}`" in text for seed in (1, 2, 3)] == [True] * 3


def test_what_one_seed_lacks_is_no_mean(report):
    profiles = three_seeds()
    profiles[1]["wer"]["offline"]["test_clean"]["wer"] = None
    profiles[1]["time"]["hour"] = []
    profiles[2]["wer"]["streaming"] = {}
    (row,) = report(profiles).rows
    assert "wer_offline_test_clean" not in row and "wer_streaming_test_clean" not in row
    assert row["wer_offline_test_other"] != ""


@pytest.mark.parametrize(
    "parts",
    [
        {"name": "asr_train_asr_conformer_mla_raw_seed3_max_epoch9_small"},
        {"settings__left_chunks": 8},
        {"settings__commit": "another"},
        {"model__attention_conf": {"kv_rank": 8}},
        {"model__overlay": "conf/overlays/medium.yaml"},
        {"model__training_seed": 2},
        {"model__weights": "random", "model__training_seed": None},
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_what_differs_in_more_or_less_than_the_seed_is_a_row_of_its_own(report, parts):
    profiles = three_seeds()
    for key, value in parts.items():
        part, _, name = key.rpartition("__")
        (profiles[1][part] if part else profiles[1])[name or key] = value
    made = report(profiles)
    assert len(made.names) == 2
    assert sorted(len(entry.runs) for entry in made.models) == [1, 2]


def test_the_overview_shows_allocated_bytes_and_says_so(report):
    """Held bytes are in the table of caches."""
    overview, cache, *_ = report([make_profile()]).parts
    shown = overview.shown().iloc[0]
    assert {c.heading: shown[c.key] for c in overview.columns[:2]} == {
        "cache, allocated (kB)": "205",
        "compression against mha": "2",
    }
    assert not any("held" in column.heading for column in overview.columns)
    headings = [column.heading for column in cache.columns]
    assert {"cache, allocated (kB)", "cache, held (kB)"} <= set(headings)


def test_graphs_stand_beside_torch(report):
    with_graph, without = make_profile(), make_profile("conformer", "mla", engines={})
    made = report([with_graph, without])
    (part,) = (part for part in made.parts if part.title == "Streaming engines")
    headings = [column.heading for column in part.columns]
    assert [h for h in headings if "chunk" in h] == [
        f"{name}: chunk, median (ms)" for name in ("torch", "onnx", "onnx int8")
    ]
    engines = with_graph["engines"]
    row = made.rows[0]
    assert row["engine_onnx_int8_rtf"] == str(engines["onnx int8"]["streaming_rtf"])
    assert row["engine_onnx_attention_bytes"] == str(engines["onnx"]["bytes"]["attention"])
    whole = sum(engines["torch"]["allocated"].values())
    assert row["engine_torch_total_allocated"] == str(whole)
    assert made.rows[1]["engine_onnx_rtf"] == ""


def test_columns_that_no_model_has_are_left_out(report):
    made = report([make_profile(wer={}, decoder_cache=None, engines={})])
    assert not any(key.startswith(("wer", "cer", "decoder_")) for key in made.rows[0])
    assert [part.title for part in made.parts] == [
        "Overview",
        "Cache",
        "Time",
        "Memory and computation",
        "Settings",
    ]


def test_models_are_ordered_by_encoder_and_attention(report):
    new = make_profile("zipformer", "mha", model__attention_type="delta", model__weights="random")
    assert report([new, *eight()[::-1]]).names == [
        *(
            f"{encoder} {attention}"
            for encoder in ("conformer", "branchformer")
            for attention in ("mha", "gqa G2", "mla r16", "linear")
        ),
        "zipformer mha",
    ]


def test_attentions_have_colours_of_their_own(report):
    """Those of their slots in every report; without a slot one that no other has."""

    def new(name: str, slot: int | None) -> dict:
        return make_profile(
            model__attention_type=name,
            model__attention_label="x",
            model__attention_colour_slot=slot,
        )

    made = report([new("b", None), new("a", None), new("c", 5), *eight()[:4]])
    types = [entry.profile.model.attention_type for entry in made.models]
    assert types == ["mha", "gqa", "mla", "linear", "a", "c", "b"]  # 4, 5, 6
    colours = [entry.colour for entry in made.models]
    assert colours == list(PALETTE[:7])
    assert [report([p]).models[0].colour for p in eight()[:4]] == colours[:4]


def test_attentions_of_this_package_have_slots_of_their_own():
    slots = [attention.colour_slot for attention in ATTENTIONS.values()]
    assert slots == list(range(len(slots)))


def test_the_label_of_an_attention_is_its_name(report):
    parts = {
        "attention_label": "shared 5",
        "self_attention_label": "mla r8",
        "src_attention_label": "gqa G1",
    }
    profile = make_profile()
    profile["model"] |= parts
    assert report([profile]).names == ["conformer shared 5, self mla r8, cross gqa G1"]


def test_models_of_one_name_are_told_apart(report):
    same = [make_profile() for _ in range(2)]
    assert report(same).names == ["conformer mha #1", "conformer mha #2"]
    same[1]["model"]["weights"] = "random"
    assert report(same).names == ["conformer mha trained", "conformer mha random"]
    same[1]["settings"]["device"] = "cuda"
    assert report(same).names == ["conformer mha cpu", "conformer mha cuda"]


@pytest.mark.parametrize(
    ("key", "value", "note"),
    [
        ("device", "cuda", "device cuda instead of cpu"),
        ("commit", None, "commit not known instead of v1-3-gabcdef0"),
        ("threads", 8, "threads 8 instead of 1"),
        ("left_chunks", -1, "left_chunks -1 instead of 4"),
        ("search", {"beam_size": 5}, "search beam_size 5 instead of beam_size 10, ctc_weight 0.7"),
    ],
)
def test_a_row_that_differs_from_the_others_is_marked(report, key, value, note):
    profiles = eight()
    profiles[2]["settings"][key] = value
    made = report(profiles)
    assert made.notes.texts == [note]
    assert made.notes.marks == [[1] if n == 2 else [] for n in range(8)]
    assert key not in made.notes.shared and len(made.notes.shared) >= 8
    assert made.notes.shared["longest_seconds"] == "600"
    marked = made.markdown()
    assert "|conformer mla r16 <sup>1</sup>|" in marked
    assert f"1. {note}" in marked.replace("\\_", "_")
    assert "conformer mla r16 [1]" in made.plain
    assert made.rows[2]["notes"] == note


def test_random_weights_and_disagreeing_bytes_are_marked(report):
    random, wrong = eight()[:2]
    random["model"]["weights"], random["wer"] = "random", {}
    wrong["cache"]["fp32"]["lengths"][0]["bounded"]["analytic"]["conv"] += 1
    notes = report([random, wrong]).notes
    assert [notes.texts[mark - 1] for marks in notes.marks for mark in marks] == [
        "random weights: sizes and speed only, no error rates",
        "the measured cache differs from the computed one",
    ]


def test_markdown_states_settings_and_commands_and_escapes(report):
    name = "bran|ch<b>former_*"
    made = report([make_profile(name), make_profile("conformer")])
    text = made.markdown("python -m espnet_kv.bin.report --expdir exp")
    assert "threads 1" in text.splitlines()[0]
    assert r"|bran\|ch&lt;b&gt;former\_\* mha|" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(table) == 4 and len(cells) == 1
    for entry in made.models:
        assert f"`{entry.profile.settings.command}`" in text
    assert "- this table: `python -m espnet_kv.bin.report --expdir exp`" in text


class TestPlaced:
    def test_is_added_at_the_end_and_then_replaced(self, tmp_path):
        text = placed("# Mine\n\nkept\n", "T", "first", tmp_path)
        assert text.startswith("# Mine\n\nkept\n\n<!-- comparison: T -->\nfirst\n")
        again = placed(text + "\nafter\n", "T", "second", tmp_path)
        assert again == text.replace("first", "second") + "\nafter\n"
        assert placed(again, "T", "second", tmp_path) == again

    def test_two_titles_are_two_tables(self, tmp_path):
        text = placed(placed("", "digits", "a", tmp_path), "LibriSpeech", "b", tmp_path)
        text = placed(text, "digits", "c", tmp_path)
        assert re.findall(r"^\w$", text, re.MULTILINE) == ["c", "b"]

    @pytest.mark.parametrize(
        "text",
        [
            "<!-- comparison: T -->",
            "<!-- /comparison: T -->",
            "<!-- /comparison: T --> <!-- comparison: T -->",
            "<!-- comparison: T --><!-- comparison: T --><!-- /comparison: T -->",
        ],
    )
    def test_damaged_markers_are_refused(self, tmp_path, text):
        with pytest.raises(UserError, match=r"R\.md: keep one line <!-- comparison: T -->"):
            placed(text, "T", "x", tmp_path / "R.md")
