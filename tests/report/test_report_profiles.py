"""Profiles are read as written, with parts missing, and refused in one line where damaged."""

import pytest
from profile_json import eight, make_profile, write_profile

from espnet_kv.errors import UserError
from espnet_kv.report.profiles import read_profile, read_profiles


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
    held = profile.held()
    assert held.attention == 4 * 64 * 16 * 4
    assert held.total == sum(data["cache"]["fp32"]["lengths"][-1]["bounded"]["bytes"].values())
    assert profile.held("int8").attention == held.attention / 4
    assert profile.allocated().attention == 4 * 80 * 16 * 4
    assert profile.allocated("int8").attention == 4 * 80 * 16
    assert profile.time.hour[7].chunk_ms == data["time"]["hour"][7]["chunk_ms"]
    assert (
        profile.wer["streaming"]["test_other"].wer == data["wer"]["streaming"]["test_other"]["wer"]
    )


def test_what_need_not_be_known_may_be_absent_or_null(tmp_path):
    little = {
        "schema": "espnet_kv.profile/2",
        "name": "m",
        "model": {"encoder": "conformer", "attention_type": "mha", "weights": "random"},
        "settings": {"device": "cpu", "commit": None},
        "time": None,
    }
    profile = read_profile(write_profile(tmp_path / "p.json", little))
    assert profile.held() is None and profile.allocated() is None and profile.cache_dtype is None
    assert profile.time.chunk_ms.p50 is None and profile.memory.offline_bytes is None
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
        ({"schema": "espnet_kv.profile/1"}, "schema is 'espnet_kv.profile/1', expected"),
        ({"schema": "espnet_kv.profile/3"}, "schema is 'espnet_kv.profile/3', expected"),
        ({"name": 3}, "name: expected text, found 3"),
        ({"model__encoder": None}, "model.encoder is missing"),
        ({"settings": []}, "settings: expected keys and values"),
        ({"cache__fp32": None}, "cache.fp32: expected keys and values, found None"),
        ({"cache__int8__lengths": {}}, "cache.int8.lengths: expected a list"),
        ({"cache__int8__lengths": [{}]}, r"cache.int8.lengths[0].seconds is missing"),
        ({"time__rtf": "fast"}, "time.rtf: expected a number, found 'fast'"),
        ({"time__rtf": True}, "time.rtf: expected a number, found True"),
        ({"memory__offline_bytes": 1.5}, "memory.offline_bytes: expected a whole number"),
        ({"wer__offline__test_clean__wer": float("nan")}, "wer.offline.test_clean.wer: expected"),
        ({"time__utterance_ms__p50": -1.0}, "time.utterance_ms.p50: expected no negative number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_damaged_key_is_named(tmp_path, parts, said):
    assert said in refused(write_profile(tmp_path / "p.json", make_profile(**parts)))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', "\ud800"])
def test_what_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    assert "profile again (stage 14)" in refused(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.json")


def test_several_are_read_in_their_order_and_each_once(tmp_path):
    paths = [write_profile(tmp_path / f"{n}.json", data) for n, data in enumerate(eight())]
    profiles = read_profiles([*paths, paths[0]])
    assert [p.path for p in profiles] == paths


def test_none_at_all_is_an_error():
    with pytest.raises(UserError, match="profile a model first"):
        read_profiles([])
