"""Profiles are read as written, with parts missing, and refused in one line where damaged."""

import json
from pathlib import Path

import pytest
from profile_json import eight, make_profile, schema_keys, values_at, write_profile
from pydantic import ValidationError

from espnet_kv.errors import UserError
from espnet_kv.profile import schema
from espnet_kv.profile.schema import SCHEMA, Options, read_profile, read_profiles

REPO = Path(__file__).parents[2]


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        read_profile(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_a_whole_profile_comes_back(tmp_path):
    data = make_profile("branchformer", "mla")
    profile = read_profile(write_profile(tmp_path / "p.json", data))
    assert profile.name == data["name"]
    assert profile.model.attention_conf == {"kv_rank": 16}
    assert profile.cache_dtype == "fp32" and [*profile.cache] == ["fp32", "int8"]
    own, int8 = profile.bounded(), profile.bounded("int8")
    assert own.bytes.attention == 4 * 64 * 16 * 4
    assert own.bytes.total == sum(data["cache"]["fp32"]["lengths"][-1]["bounded"]["bytes"].values())
    assert int8.bytes.attention == own.bytes.attention / 4
    assert own.allocated.attention == 4 * 80 * 16 * 4
    assert int8.allocated.attention == 4 * 80 * 16
    assert profile.time.hour[7].chunk_ms == data["time"]["hour"][7]["chunk_ms"]
    assert (
        profile.wer["streaming"]["test_other"].wer == data["wer"]["streaming"]["test_other"]["wer"]
    )


def test_what_need_not_be_known_may_be_absent_or_null(tmp_path):
    little = {
        "schema": SCHEMA,
        "name": "m",
        "model": {
            "encoder": "conformer",
            "attention_type": "mha",
            "attention_label": "mha",
            "weights": "random",
        },
        "settings": {"device": "cpu", "commit": None},
        "time": None,
    }
    profile = read_profile(write_profile(tmp_path / "p.json", little))
    assert profile.bounded() is None and profile.cache_dtype is None
    assert profile.time.chunk_ms is None and profile.memory.offline_bytes is None
    assert profile.settings.commit is None and profile.wer == {}


def test_the_headline_is_that_of_the_longest_length(tmp_path):
    data = make_profile()
    data["cache"]["fp32"]["lengths"].reverse()
    profile = read_profile(write_profile(tmp_path / "p.json", data))
    assert profile.cache["fp32"].longest.seconds == 600.0


def test_a_key_that_a_later_version_adds_does_no_harm(tmp_path):
    assert read_profile(write_profile(tmp_path / "p.json", make_profile(later={"a": 1})))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"schema": "espnet_kv.profile/2"}, "schema: expected 'espnet_kv.profile/3', found"),
        ({"schema": "espnet_kv.profile/4", "time": 1}, "schema: expected 'espnet_kv.profile/3'"),
        ({"name": 3}, "name: expected a valid string, found 3"),
        ({"model__encoder": None}, "model.encoder is missing"),
        ({"model__attention_label": None}, "model.attention_label is missing"),
        ({"settings": []}, "settings: expected an object"),
        ({"cache__fp32": None}, "cache.fp32: expected an object, found None"),
        ({"cache__int8__lengths": {}}, "cache.int8.lengths: expected a valid array"),
        ({"cache__int8__lengths": [{}]}, "cache.int8.lengths[0].seconds is missing"),
        ({"time__rtf": "fast"}, "time.rtf: expected a valid number, found 'fast'"),
        ({"time__rtf": True}, "time.rtf: expected a valid number, found True"),
        ({"memory__offline_bytes": 1.5}, "memory.offline_bytes: expected a valid integer"),
        ({"wer__offline__test_clean__wer": float("nan")}, "wer.offline.test_clean.wer: expected"),
        ({"time__utterance_ms__p50": -1.0}, "time.utterance_ms.p50: expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_damaged_key_is_named(tmp_path, parts, said):
    assert said in refused(write_profile(tmp_path / "p.json", make_profile(**parts)))


@pytest.mark.parametrize("text", ["", "{", "[" * 999, "[]", "null", '{"schema": 1}', "\ud800"])
def test_what_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    assert "profile again (stage 14)" in refused(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.json")


def test_several_are_read_in_their_order_and_each_once(tmp_path):
    paths = [write_profile(tmp_path / f"{n}.json", data) for n, data in enumerate(eight())]
    profiles = read_profiles([*paths, paths[0]])
    assert [profile.name for profile in profiles] == [data["name"] for data in eight()]


def test_none_at_all_is_an_error():
    with pytest.raises(UserError, match="profile a model first"):
        read_profiles([])


def test_what_is_written_is_what_is_read(tmp_path):
    data = make_profile("branchformer", "mla")
    plain = read_profile(write_profile(tmp_path / "plain.json", data))
    schema.write_profile(tmp_path / "p.json", data)
    assert read_profile(tmp_path / "p.json") == plain
    assert json.loads((tmp_path / "p.json").read_text()) == data


def test_a_key_that_the_schema_lacks_is_not_written(tmp_path):
    data = make_profile(time__latency=3.0)
    with pytest.raises(ValidationError, match=r"time\.latency"):
        schema.write_profile(tmp_path / "p.json", data)
    assert not list(tmp_path.iterdir())


def test_profiles_of_tests_have_every_key():
    for path, _, _ in schema_keys():
        assert values_at(make_profile(), path), path


def test_the_docs_list_every_key():
    """Keys of plain numbers stand in the row of what holds them, and nothing is explained twice."""
    names = {int: "integer", float: "number", str: "text", Options: "options"}
    rows, seen, inner = [], {SCHEMA: f'"{SCHEMA}"'}, ()
    for path, kind, meaning in schema_keys():
        if path.startswith(inner):
            continue
        inner = (f"{path}.",)
        if kind in names | seen:
            said = (names | seen)[kind]
        elif any(field.description for field in kind.model_fields.values()):
            said, meaning, inner = "", meaning or kind.__doc__, ()
            seen[kind] = f"as `{path}`"
        else:
            said = f"{{{', '.join(kind.model_fields)}}}"
        rows.append(f"| `{path}` | {said} | {' '.join(meaning.split())} |")
    table = "\n".join(["| key | type | meaning |", "|---|---|---|", *rows])
    assert table in (REPO / "docs/profile.md").read_text(encoding="utf-8"), table
