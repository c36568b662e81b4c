"""Error rates by hand-counted examples, their files, and RESULTS.md."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_kv.errors import UserError
from espnet_kv.recipe.results import BEGIN, END, write_results
from espnet_kv.recipe.score import Score, score, write_score
from espnet_kv.scores import MISSING, rate_text, read_scored_set, read_scores

REF = {"u1": "THE CAT SAT DOWN", "u2": "A DOG", "u3": "STOP", "u4": ""}
HYP = {"u1": "THE BAT SAT", "u2": "A BIG DOG", "u3": "STOP", "u4": ""}


def distance(ref: list[str], hyp: list[str]) -> int:
    """Levenshtein distance, by its definition."""
    row = list(range(len(hyp) + 1))
    for i, r in enumerate(ref, 1):
        previous, row = row, [i]
        for j, h in enumerate(hyp, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (r != h)))
    return row[-1]


def counts(result: Score) -> tuple[int, ...]:
    a = result.alignment
    return result.words, a.hits, a.substitutions, a.deletions, a.insertions


def test_words():
    result = score(REF, HYP, "wer")
    assert counts(result) == (7, 5, 1, 1, 1)
    assert result.error_rate == pytest.approx(100 * 3 / 7)
    assert (result.sentence_errors, result.missing) == (2, 0)
    line = " ".join(result.summary().splitlines()[1].replace("|", " ").split())
    assert line == "Sum/Avg 4 7 71.4 14.3 14.3 14.3 42.9 50.0"


def test_the_interval_is_that_of_resampled_utterances():
    """100 utterances of ten words with 0 or 2 errors each: the mean of 100 draws, by theory."""
    ref = {f"u{n:03}": " ".join("A" * 10) for n in range(100)}
    hyp = {utt: " ".join("A" * (10 if n % 2 else 8)) for n, utt in enumerate(ref)}
    result = score(ref, hyp, "wer")
    low, high = result.interval
    assert result.error_rate == 10 and low < 10 < high
    assert (low, high) == pytest.approx((10 - 1.96, 10 + 1.96), abs=0.3)  # 1.96 * 10 / sqrt(100)
    assert score(ref, hyp, "wer").interval == result.interval
    assert (
        f"95 % interval of Err (utterances resampled 2000 times, seed 0): {low:.1f} to {high:.1f}"
        in (result.summary())
    )


def test_errors_by_utterance_add_up_to_all():
    result = score(REF, HYP, "wer")
    assert (result.utterance_errors, result.utterance_words) == ([2, 1, 0, 0], [4, 2, 1, 0])


def test_rates_as_text_have_no_negative_zero():
    assert rate_text(-0.04, (-0.26, 0.04)) == "0.0 (-0.3 to 0.0)"


def test_without_errors_the_interval_is_a_point():
    assert score(REF, REF, "wer").interval == (0, 0)


@pytest.mark.parametrize(
    ("ref", "hyp"),
    [({"u": "A"}, {"u": "B"}), ({"u": "", "v": ""}, {"u": "A", "v": ""}), ({"u": ""}, {"u": ""})],
    ids=["one utterance", "no words", "nothing"],
)
def test_where_nothing_can_be_resampled_there_is_no_interval(ref, hyp):
    result = score(ref, hyp, "wer")
    assert result.interval is None
    assert "interval" not in result.summary()


def test_utterances_without_words_are_drawn_with_the_others():
    low, high = score(REF, HYP, "wer").interval
    assert 0 <= low < 100 * 3 / 7 < high


def test_characters_count_spaces():
    result = score({"u": "A B"}, {"u": "AB"}, "cer")
    assert counts(result) == (3, 2, 0, 1, 0)
    assert result.alignment.references == [["A", "<space>", "B"]]


def test_tokens_need_a_tokenizer():
    result = score({"u": "ABCD"}, {"u": "ABCE"}, "ter", lambda text: [text[:2], text[2:]])
    assert counts(result) == (2, 1, 1, 0, 0)
    for kind in ("ter", "per"):
        with pytest.raises(ValueError, match=kind):
            score(REF, HYP, kind)


def test_missing_hypotheses_are_deletions(capsys):
    result = score(REF, {"u3": "STOP"}, "wer")
    assert counts(result) == (7, 1, 0, 6, 0)
    assert result.missing == 3
    assert result.summary().endswith("Missing hypotheses: 3\n")
    assert "3 of 4 utterances have no hypothesis (the first: u1)" in capsys.readouterr().err


def test_foreign_hypotheses_and_no_references_are_refused():
    with pytest.raises(UserError, match=r"1 hypotheses have no reference \(the first: u9\)"):
        score(REF, HYP | {"u9": "A"}, "wer")
    with pytest.raises(UserError, match="no reference transcripts"):
        score({}, {}, "wer")


def test_silence():
    assert score({"u": ""}, {"u": ""}, "wer").error_rate == 0
    result = score({"u": ""}, {"u": "NOISE"}, "wer")
    assert result.error_rate == float("inf")
    assert "inf" in result.summary()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.text("AB ", max_size=9), st.text("AB ", max_size=9)), min_size=1, max_size=5
    )
)
def test_errors_are_the_edit_distance(pairs):
    ref = {f"u{i}": r for i, (r, _) in enumerate(pairs)}
    hyp = {f"u{i}": h for i, (_, h) in enumerate(pairs)}
    words = score(ref, hyp, "wer")
    assert words.errors == sum(distance(r.split(), h.split()) for r, h in pairs)
    assert words.words == sum(len(r.split()) for r, _ in pairs)
    characters = score(ref, hyp, "cer")
    clean = [(" ".join(r.split()), " ".join(h.split())) for r, h in pairs]
    assert characters.errors == sum(distance(list(r), list(h)) for r, h in clean)


def test_files(tmp_path: Path):
    out = tmp_path / "score_wer"
    write_score(score(REF, HYP, "wer"), out)
    assert (out / "ref.trn").read_text().splitlines()[:2] == ["THE CAT SAT DOWN (u1)", "A DOG (u2)"]
    assert (out / "hyp.trn").read_text().splitlines()[3] == "(u4)"
    blocks = (out / "alignments.txt").read_text().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == list(REF)
    assert blocks[0].splitlines()[1:] == [
        "REF: THE CAT SAT DOWN",
        "HYP: THE BAT SAT ****",
        "           S        D",
    ]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write_score(score(REF, HYP, "wer"), out)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_scores_json_says_what_result_txt_says(tmp_path: Path):
    """The counts give the figures that sclite's form has."""
    for kind in ("wer", "cer"):
        result = score(REF, HYP, kind)
        write_score(result, tmp_path / f"x/test/score_{kind}")
    sclite = read_scored_set(tmp_path / "x/test")
    found = {kind: score(REF, HYP, kind) for kind in ("wer", "cer")}
    counts = {kind: result.counts for kind, result in found.items()}
    said = {kind: result.counts | {"interval": result.interval} for kind, result in found.items()}
    (tmp_path / "x/test/scores.json").write_text(json.dumps({"streaming": True, **said}))
    own = read_scored_set(tmp_path / "x/test")
    assert own.mode == "streaming" and sclite.mode == "offline"
    assert own.rates["wer"].interval == found["wer"].interval
    assert counts["wer"] == {
        **{"utterances": 4, "words": 7, "corr": 5, "sub": 1, "del": 1, "ins": 1},
        **{"err": 3, "s_err": 2, "missing": 0},
    }
    for kind, rates in own.rates.items():
        figures = sclite.rates[kind]
        assert (rates.utterances, rates.words) == (figures.utterances, figures.words)
        assert [round(rate, 1) for rate in rates.percents] == figures.percents


@pytest.fixture
def expdir(tmp_path: Path) -> Path:
    """Two experiments, the first scored on two test sets and with a run.json."""
    exp = tmp_path / "exp"
    for name, tests in (("asr_b_mla", ["test_clean", "test_other"]), ("asr_a_mha", ["test_clean"])):
        for test in tests:
            for kind in ("wer", "cer"):
                result = score(REF, HYP, kind)
                write_score(result, exp / name / "decode_ctc" / test / f"score_{kind}")
    run = {
        "command": "./run.sh --ngpu 0",
        "config": "conf/mla.yaml",
        "commit": "abc",
        "overlay": "",
    }
    (exp / "asr_b_mla" / "run.json").write_text(json.dumps(run))
    (exp / "asr_c_untrained").mkdir()
    return exp


def test_results_page(expdir: Path):
    out = expdir.parent / "RESULTS.md"
    write_results(expdir, out, ["- corpus: synth"])
    page = out.read_text()
    assert page.startswith(f"{BEGIN}\n# RESULTS\n\n## Environments\n- date: `")
    assert "- corpus: synth" in page
    assert page.index("## exp/asr_a_mha") < page.index("## exp/asr_b_mla")
    assert "untrained" not in page and "### TER" not in page
    mla = page[page.index("## exp/asr_b_mla") :]
    assert mla.startswith(
        "## exp/asr_b_mla\n\n- command: `./run.sh --ngpu 0`\n- config: `conf/mla.yaml`\n"
        "- commit: `abc`\n\n### WER\n\n|dataset|Snt|Wrd|Corr|Sub|Del|Ins|Err|S.Err|Err, 95 %|\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
        f"|decode_ctc/test_clean|4|7|71.4|14.3|14.3|14.3|42.9|50.0|{MISSING}|\n"
        f"|decode_ctc/test_other|4|7|71.4|14.3|14.3|14.3|42.9|50.0|{MISSING}|\n\n### CER\n"
    )


def test_results_page_keeps_handwriting(expdir: Path):
    out = expdir.parent / "RESULTS.md"
    out.write_text("# By hand\n")
    for _ in range(2):
        write_results(expdir, out)
        out.write_text(out.read_text() + "below\n")
    page = out.read_text()
    assert page.startswith("# By hand\n\n<!-- generated -->\n")
    assert page.endswith("<!-- /generated -->\nbelow\nbelow\n")
    assert page.count("# RESULTS") == page.count(BEGIN) == page.count(END) == 1
    out.write_text(page.replace(END, ""))
    with pytest.raises(UserError, match="or neither"):
        write_results(expdir, out)
    out.write_bytes(b"notes caf\xe9\n")
    with pytest.raises(UserError, match=r"RESULTS.md: not UTF-8 at byte 9; convert it first"):
        write_results(expdir, out)
    assert out.read_bytes() == b"notes caf\xe9\n"


def test_results_read_sclite(expdir: Path):
    result = expdir / "asr_a_mha" / "decode_ctc" / "test_clean" / "score_wer" / "result.txt"
    result.write_text(
        "| SPKR     | # Snt  # Wrd  | Corr     Sub     Del     Ins     Err   S.Err  |\n"
        "| Sum/Avg  | 2620   52576  | 94.7     4.8     0.5     0.7     6.0    52.1  |\n"
        "|  Mean    | 65.5   1314.4 | 94.7     4.8     0.5     0.7     6.0    52.3  |\n"
    )
    write_results(expdir, expdir.parent / "RESULTS.md")
    page = (expdir.parent / "RESULTS.md").read_text()
    assert f"|decode_ctc/test_clean|2620|52576|94.7|4.8|0.5|0.7|6.0|52.1|{MISSING}|\n" in page


def test_the_interval_of_sclite_is_made_from_its_alignments(expdir: Path):
    """The same counts give the same interval, whoever aligned."""
    ours = score(REF, HYP, "wer")
    result = expdir / "asr_a_mha" / "decode_ctc" / "test_clean" / "score_wer" / "result.txt"
    aligned = zip(sorted(REF), ["2 1 1 0", "2 0 0 1", "1 0 0 0", "0 0 0 0"], strict=True)
    result.write_text(
        "| Sum/Avg  |    4       7  | 71.4    14.3    14.3    14.3    42.9    50.0  |\n"
        + "".join(f"id: ({utt})\nScores: (#C #S #D #I) {counts}\n" for utt, counts in aligned)
    )
    assert read_scored_set(result.parents[1]).rates["wer"].interval == ours.interval
    low, high = ours.interval
    write_results(expdir, expdir.parent / "RESULTS.md")
    page = (expdir.parent / "RESULTS.md").read_text()
    assert f"|42.9|50.0|{low:.1f} to {high:.1f}|\n" in page


@pytest.mark.parametrize(
    ("record", "mode"),
    [
        ({"streaming": False}, "offline"),
        ({"streaming": True}, "streaming"),
        ({"streaming": True, "cache_dtype": None}, "streaming"),
        ({"streaming": True, "cache_dtype": "int8"}, "streaming, int8 cache"),
    ],
)
def test_decodings_with_another_cache_are_a_mode_of_their_own(expdir: Path, record, mode):
    place = expdir / "asr_a_mha/decode_ctc/test_clean"
    (place / "decoding.json").write_text(json.dumps(record))
    assert read_scored_set(place).mode == mode
    assert read_scores(expdir / "asr_a_mha")[mode]["test_clean"]["decoding"] == "decode_ctc"


def test_results_refuse_damage(expdir: Path, tmp_path: Path):
    out = tmp_path / "RESULTS.md"
    with pytest.raises(UserError, match="holds no scores"):
        write_results(tmp_path / "nothing", out)
    (expdir / "asr_b_mla" / "run.json").write_text("{half")
    with pytest.raises(UserError, match=r"run.json is damaged"):
        write_results(expdir, out)
    (expdir / "asr_a_mha" / "decode_ctc" / "test_clean" / "score_cer" / "result.txt").write_text("")
    with pytest.raises(UserError, match="no line Sum/Avg"):
        write_results(expdir, out)
    assert not out.exists()
