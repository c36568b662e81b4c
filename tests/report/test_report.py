"""The report command and its page, from JSON files to what a user opens."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from profile_json import eight, make_profile, write_profile
from reports import NAMES, STRANGE

from espnet_kv.bin.report import main
from espnet_kv.profile.schema import read_profiles
from espnet_kv.recipe.__main__ import main as run_sh
from espnet_kv.report.comparison import entries
from espnet_kv.report.table import MISSING, tables


class Reader(HTMLParser):
    """Collects of a page its tables (rows of cell texts), attributes, and text."""

    def __init__(self, page: Path):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.missing: list[dict[str, str | None]] = []
        self._cell = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self._cell = True
            if "missing" in (dict(attrs).get("class") or ""):
                self.missing.append(dict(attrs))

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("th", "td")

    def handle_data(self, data):
        self.text.append(data)
        if self._cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def reader(report) -> Reader:
    return Reader(report.page)


def test_the_last_line_is_the_page_and_the_table_stands_above(report):
    lines = report.stdout.splitlines()
    assert Path(lines[-1]) == report.page and report.page.is_file()
    for name in NAMES:
        assert any(line.startswith(name) for line in lines[:-1])


def test_all_files_are_there_and_no_half_ones(report):
    files = {p.relative_to(report.folder).as_posix() for p in report.folder.rglob("*")}
    assert {"report.html", "comparison.csv", "RESULTS.md"} <= files
    stems = {Path(name).stem for name in files if name.startswith("figures/")}
    assert {"wer_cache", "cache_size", "cache_growth", "hour"} <= stems
    for stem in stems:
        assert {f"figures/{stem}.png", f"figures/{stem}.svg"} <= files
    assert not any("partial" in name for name in files)


def test_tables_of_the_page_are_complete(report, reader):
    wanted = tables(entries(read_profiles(report.inputs)))
    assert len(reader.tables) == len(wanted)
    for rows, table in zip(reader.tables, wanted, strict=True):
        columns = [column for column in table.columns if column.key != "command"]
        assert [" ".join(cell.split()) for cell in rows[0]] == [
            "model",
            *(f"{c.title} {c.unit}".strip() for c in columns),
        ]
        shown = table.shown()[[c.key for c in columns]]
        assert [row[1:] for row in rows[1:]] == shown.to_numpy().tolist()


def test_rows_are_marked_for_random_weights_and_notes(reader):
    named = [row[0] for row in reader.tables[0][1:]]
    assert sum("random weights" in name for name in named) == 1
    assert "conformer linear 1random weights" in named
    assert "commit other-dirty instead of v1-3-gabcdef0" in reader.text


def test_a_missing_rate_is_a_dash_without_a_value(reader):
    row = next(row for row in reader.tables[0] if row[0].startswith("conformer linear"))
    assert row.count(MISSING) == 4
    assert reader.missing and not any("data-value" in attributes for attributes in reader.missing)


def test_the_page_names_no_address_outside_itself(report, reader):
    text = report.page.read_text(encoding="utf-8")
    assert not re.search(r"(?:https?:)?//[\w.]|@import|url\((?!#)", text)
    for tag, key, value in reader.attributes:
        if key in ("src", "href", "action", "srcset", "data"):
            assert value.startswith("#"), (tag, key, value)
    anchors = {value for _, key, value in reader.attributes if key == "id"}
    links = {value[1:] for _, key, value in reader.attributes if key == "href"}
    assert links <= anchors


def test_ids_are_unique_and_figures_are_described(reader):
    ids = [value for _, key, value in reader.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    described = [value for _, key, value in reader.attributes if key == "aria-label"]
    assert sum(text.startswith("Cache size. Bytes allocated") for text in described) == 2


def test_names_and_commands_are_text_not_markup(report, reader):
    assert STRANGE in reader.text and f"{STRANGE} mha" in reader.tables[0][-1][0]
    assert "<script>alert" not in report.page.read_text(encoding="utf-8")
    assert not any(tag == "b" for tag, _, _ in reader.attributes)
    profiles = read_profiles(report.inputs)
    assert {profile.settings.command for profile in profiles} <= set(reader.text)


def test_scalars_are_in_tensorboard(report):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = report.folder / "tensorboard"
    assert {path.name for path in board.iterdir()} >= {"conformer_mha", "conformer_mla_r16"}
    events = EventAccumulator(str(board / "conformer_mla_r16"))
    events.Reload()
    mla = read_profiles(report.inputs)[1]
    held, allocated = mla.bounded().bytes.attention, mla.bounded().allocated.attention
    assert [e.value for e in events.Scalars("cache/cache_attention_bytes")] == [held]
    assert [e.value for e in events.Scalars("cache/cache_attention_allocated")] == [allocated]
    for name, value in (("bytes", held), ("allocated", allocated)):
        growth = events.Scalars(f"growth/bounded_attention_{name}_fp32")
        assert [(e.step, e.value) for e in growth] == [(5, value), (60, value), (600, value)]
    assert not any("wer" in tag for tag in events.Tags()["scalars"] if tag.startswith("cache"))


def test_the_table_in_results_md_is_replaced_and_the_rest_stays(tmp_path, capsys):
    results, profiles = tmp_path / "RESULTS.md", eight(time=None, memory=None, cache=None)[:2]
    results.write_text("# Results\n\nby hand\n")
    for n, profile in enumerate(profiles):
        write_profile(tmp_path / f"exp/m{n}/profile/profile.json", profile)
    command = ["--expdir", str(tmp_path / "exp"), "--results", str(results)]
    assert main(command) == 0
    first = results.read_text()
    assert first.startswith("# Results\n\nby hand\n\n<!-- comparison: KV caches compared -->\n")
    assert main(command) == 0
    assert results.read_text() == first
    page = tmp_path / "exp/report/report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)


def test_a_figure_of_an_earlier_report_does_not_stay(tmp_path):
    stale = tmp_path / "out/figures/hour.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    parts = dict.fromkeys(("cache", "time", "memory", "wer"))
    profile = write_profile(tmp_path / "p.json", make_profile(**parts))
    assert main([str(profile), "--output", str(tmp_path / "out")]) == 0
    assert not stale.exists() and (tmp_path / "out/report.html").exists()


def test_stage_15_compares_all_that_is_profiled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("conf").symlink_to(Path(__file__).parents[2] / "conf")
    exp = tmp_path / "exp"
    options = ["--stage", "15", "--expdir", str(exp)]
    assert run_sh(options) == 1
    assert "profile first" in capsys.readouterr().err
    for n, profile in enumerate(eight(time=None, memory=None, cache=None)[:2]):
        write_profile(exp / f"m{n}/profile/profile.json", profile)
    assert run_sh(options) == 0
    assert f"page: {exp}/report/report.html" in capsys.readouterr().out
    assert f"- this table: `./run.sh --stage 15 --expdir {exp}`" in (exp / "RESULTS.md").read_text()
    assert {"conformer mha", "conformer gqa G2"} <= {
        row[0] for row in Reader(exp / "report/report.html").tables[0]
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "out"], "there is no profile to report"),
        (["--expdir", "."], "holds no */profile/profile.json"),
        (["p.json"], "--output is missing"),
        (["p.json", "--output", "out", "--loud"], "--loud"),
        (["broken.json", "--output", "out"], "broken.json: time.rtf: expected a valid number"),
        (["p.json", "--output", "p.json"], "the report cannot be written"),
        (["p.json", "--output", "out", "--results", "marks.md"], "marks.md: keep one line"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    write_profile(Path("p.json"), make_profile())
    write_profile(Path("broken.json"), make_profile(time__rtf="fast"))
    Path("marks.md").write_text("<!-- comparison: KV caches compared -->\n")
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and out == ""
