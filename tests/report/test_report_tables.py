"""The comparison as CSV, Markdown and plain text, and the notes on rows that do not compare."""

import csv
import io
import re

import pytest
from profile_json import eight, make_profile, write_profile

from espnet_kv.errors import UserError
from espnet_kv.report.columns import MISSING, tables
from espnet_kv.report.models import compare, names, ordered
from espnet_kv.report.profiles import read_profiles
from espnet_kv.report.tables import comparison_csv, markdown, placed, plain


@pytest.fixture
def report(tmp_path):
    """A function: profiles as written -> profiles, names and notes in the report's order."""

    def read(profiles: list[dict]):
        paths = [write_profile(tmp_path / f"{n}.json", p) for n, p in enumerate(profiles)]
        found = ordered(read_profiles(paths))
        return found, names(found), compare(found)

    return read


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_gives_back_what_the_profiles_hold(report):
    profiles, called, notes = report(eight())
    read = rows(comparison_csv(profiles, called, notes))
    assert [row["model"] for row in read] == called
    for row, profile in zip(read, profiles, strict=True):
        held, allocated = profile.held(), profile.allocated()
        assert int(row["cache_attention_allocated"]) == allocated.attention
        assert int(row["cache_total_allocated"]) == allocated.total
        assert int(row["cache_rest_allocated"]) == allocated.conv + allocated.input
        assert int(row["position_bytes"]) == profile.own_cache.position
        assert int(row["cache_attention_bytes"]) == held.attention
        assert int(row["cache_total_bytes"]) == held.total
        assert int(row["cache_attention_bytes_int8"]) == profile.held("int8").attention
        int8 = profile.allocated("int8").attention
        assert int(row["cache_attention_allocated_int8"]) == int8
        assert float(row["chunk_ms_p95"]) == profile.time.chunk_ms.p95
        assert float(row["cer_streaming_test_other"]) == profile.wer["streaming"]["test_other"].cer
        assert row["command"] == profile.settings.command
        assert row["notes"] == ""


def test_what_is_not_known_is_empty_in_csv_and_a_dash_for_people(report):
    known, unknown = make_profile("conformer", "mha"), make_profile("conformer", "mla")
    unknown["wer"], unknown["time"] = {}, None
    profiles, called, notes = report([known, unknown])
    row = rows(comparison_csv(profiles, called, notes))[1]
    assert row["wer_offline_test_clean"] == "" and row["chunk_ms_p50"] == ""
    for text in (markdown(profiles, called, notes, "c"), plain(profiles, called, notes)):
        line = next(one for one in text.splitlines() if re.match(r"\|?conformer mla", one))
        assert line.count(MISSING) == 4 + 4  # error rates; two times and two real-time factors
    overview = tables(profiles)[0]
    assert {c.key for c in overview.columns} >= {"wer_offline_test_clean", "chunk_ms_p50"}


def test_the_overview_says_which_bytes_it_shows(report):
    """One figure of a cache is what is allocated; what is held stands beside it."""
    profiles, _, _ = report([make_profile()])
    columns = tables(profiles)[0].columns
    shown = {c.heading: c.shown(profiles)[0] for c in columns[:3]}
    assert shown == {
        "cache, allocated (kB)": "205",
        "cache, held (kB)": "164",
        "times less than mha": "2",
    }


def test_allocated_bytes_that_are_not_known_are_a_dash_and_not_those_held(report):
    known, unknown = make_profile("conformer", "mha"), make_profile("conformer", "mla")
    for cache in unknown["cache"].values():
        for length in cache["lengths"]:
            for bound in ("bounded", "unbounded"):
                del length[bound]["allocated"]
    profiles, called, notes = report([known, unknown])
    row = rows(comparison_csv(profiles, called, notes))[1]
    assert row["cache_attention_allocated"] == "" and row["cache_attention_bytes"] == "16384"
    shown = tables(profiles)[0].columns[0].shown(profiles)
    assert shown == ["205", MISSING]


def test_columns_that_no_model_has_are_left_out(report):
    profiles, called, notes = report([make_profile(wer={}, decoder_cache=None)])
    keys = rows(comparison_csv(profiles, called, notes))[0].keys()
    assert not any(key.startswith(("wer", "cer", "decoder_")) for key in keys)
    assert [t.title for t in tables(profiles)] == [
        "Overview",
        "Cache",
        "Time",
        "Memory and computation",
        "Settings",
    ]


def test_models_are_ordered_by_encoder_and_attention(report):
    profiles = eight()
    _, called, _ = report(profiles[::-1])
    assert called == [
        f"{encoder} {attention}"
        for encoder in ("conformer", "branchformer")
        for attention in ("mha", "gqa G2", "mla r16", "linear")
    ]


@pytest.mark.parametrize(
    ("conf", "name"),
    [
        ({"kv_rank": 64}, "mla r64"),
        ({"kv_rank": [32, 64, 48]}, "mla r32-64"),
        ({"kv_rank": [32, 32]}, "mla r32"),
        ({"cache": "input"}, "mla cache input"),
        ({"feature_map": "elu", "cache": "kv"}, "mla"),
        ({"feature_map": ["elu", 1], "other": {}}, "mla feature_map ['elu', 1] other {}"),
        ({"feature_map": "hedgehog", "decay": None}, "mla feature_map hedgehog"),
    ],
)
def test_names_say_what_of_the_options_is_not_usual(report, conf, name):
    _, called, _ = report([make_profile("conformer", "mla", model__attention_conf=conf)])
    assert called == [f"conformer {name}"]


def test_the_decoders_attention_is_named_where_it_is_not_mha(report):
    parts = {"self_attention_type": "mla", "self_attention_conf": {"kv_rank": 8}}
    profile = make_profile()
    profile["model"] |= parts | {"src_attention_type": "gqa", "src_attention_conf": {}}
    assert report([profile])[1] == ["conformer mha, self mla r8, cross gqa"]


def test_models_of_one_name_are_told_apart(report):
    same = [make_profile() for _ in range(2)]
    assert report(same)[1] == ["conformer mha #1", "conformer mha #2"]
    same[1]["model"]["weights"] = "random"
    assert report(same)[1] == ["conformer mha trained", "conformer mha random"]
    same[1]["settings"]["device"] = "cuda"
    assert report(same)[1] == ["conformer mha cpu", "conformer mha cuda"]


@pytest.mark.parametrize(
    ("key", "value", "note"),
    [
        ("device", "cuda", "device cuda instead of cpu"),
        ("dtype", "bfloat16", "dtype bfloat16 instead of float32"),
        ("commit", "v1-dirty", "commit v1-dirty instead of v1-3-gabcdef0"),
        ("commit", None, "commit not known instead of v1-3-gabcdef0"),
        ("threads", 8, "threads 8 instead of 1"),
        ("left_chunks", -1, "left_chunks -1 instead of 4"),
        ("search", {"beam_size": 5}, "search beam_size 5 instead of beam_size 10, ctc_weight 0.7"),
    ],
)
def test_a_row_that_differs_from_the_others_is_marked(report, key, value, note):
    profiles = eight()
    profiles[2]["settings"][key] = value
    profiles, called, notes = report(profiles)
    assert notes.texts == [note]
    assert notes.marks == [[1] if n == 2 else [] for n in range(8)]
    assert key not in notes.shared and len(notes.shared) >= 8
    marked = markdown(profiles, called, notes, "c")
    assert "|conformer mla r16 <sup>1</sup>|" in marked
    assert f"1. {note}" in marked.replace("\\_", "_")
    assert "conformer mla r16 [1]" in plain(profiles, called, notes)
    assert rows(comparison_csv(profiles, called, notes))[2]["notes"] == note


def test_random_weights_and_disagreeing_bytes_are_marked(report):
    random, wrong = eight()[:2]
    random["model"]["weights"], random["wer"] = "random", {}
    wrong["cache"]["fp32"]["lengths"][0]["bounded"]["analytic"]["conv"] += 1
    _, _, notes = report([random, wrong])
    assert [notes.texts[mark - 1] for marks in notes.marks for mark in marks] == [
        "random weights: sizes and speed only, no error rates",
        "the measured cache is not what the formula gives",
    ]


def test_markdown_states_settings_and_commands_and_escapes(report):
    name = "bran|ch<b>former_*"
    profiles, called, notes = report([make_profile(name), make_profile("conformer")])
    text = markdown(profiles, called, notes, "python -m espnet_kv.bin.report --expdir exp")
    assert "threads 1" in text.splitlines()[0]
    assert r"|bran\|ch&lt;b&gt;former\_\* mha|" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(table) == 4 and len(cells) == 1
    for profile in profiles:
        assert f"`{profile.settings.command}`" in text
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
