"""The page in a browser: sorting by mouse and keyboard, phone width, dark mode, no requests."""

import pytest
from chromium import PROGRAM, Page
from profile_json import eight

from espnet_kv.report.table import MISSING

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")

COLUMN = """(name => [...document.querySelectorAll('#overview thead th')]
    .findIndex(th => th.textContent.startsWith(name)) + 1)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser, report):
    """The report, opened anew in a window of a desktop."""
    browser.show(width=1280, dark=False)
    browser.open(report.page)
    return browser


def heading(page, name: str) -> str:
    """The selector of a column's button in the overview."""
    return f"#overview th:nth-child({page.evaluate(f'{COLUMN}({name!r})')}) button"


def column(page, name: str) -> list[str]:
    number = page.evaluate(f"{COLUMN}({name!r})")
    cells = f"#overview tbody tr > :nth-child({number})"
    return page.evaluate(f"[...document.querySelectorAll({cells!r})].map(c => c.textContent)")


def sorted_as(page, name: str) -> str:
    selector = heading(page, name).removesuffix(" button")
    return page.evaluate(f"document.querySelector({selector!r}).getAttribute('aria-sort')")


def test_it_opens_without_complaint_or_request(page):
    assert page.complaints() == []
    assert {address.split(":")[0] for address in page.requests()} == {"file"}
    assert len(page.requests()) == 1
    assert page.evaluate("document.querySelectorAll('figure svg').length") >= 16


def test_clicks_sort_by_number_up_and_down_with_the_missing_last(page):
    rates = [p["wer"]["offline"]["test_clean"]["wer"] for p in eight()]
    # as in reports.py; linear has none
    rates = [
        f"{r:.1f} ({r - 0.04:.1f} to {r + 0.04:.1f})" for r in (rates[n] for n in (0, 2, 4, 0))
    ]
    name = "WER test_clean, offline"
    rows = dict(zip(column(page, "model"), column(page, name), strict=True))
    assert column(page, name)[2] == MISSING and sorted_as(page, name) == "none"
    for order, reverse in (("ascending", False), ("descending", True)):
        page.click(heading(page, name))
        assert column(page, name) == [*sorted(rates, reverse=reverse), MISSING]
        assert sorted_as(page, name) == order
    assert dict(zip(column(page, "model"), column(page, name), strict=True)) == rows
    page.click(heading(page, "cache, allocated"))
    assert column(page, "cache, allocated")[:2] == ["20.5", "26.9"]  # by number: text has 204 first
    assert sorted_as(page, name) == "none" and page.complaints() == []


def test_the_keyboard_sorts_too(page):
    button = heading(page, "model")
    page.evaluate(f"document.querySelector({button!r}).focus()")
    page.press("Enter")
    assert sorted_as(page, "model") == "ascending"
    names = column(page, "model")
    assert names[1].startswith("branchformer mha") and names[-1].startswith("conformer mla")
    page.press("Tab")
    page.press("Enter")
    assert sorted_as(page, "cache, allocated") == "ascending"


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(page, report, width):
    page.show(width=width, dark=False)
    page.open(report.page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = "[...document.querySelectorAll('.plot')].filter(p => p.offsetWidth)"
    kinds = page.evaluate(f"[...new Set({shown}.map(p => p.classList[1]))]")
    assert kinds == (["narrow"] if width < 600 else ["wide"])
    letters = page.evaluate(
        f"Math.min(...{shown}.flatMap(p => [...p.querySelectorAll('text')])"
        ".map(t => t.getBoundingClientRect()).map(b => Math.min(b.width, b.height)))"
    )
    assert letters > 5  # pixels, of the smallest text in any figure


def test_in_the_dark_text_stands_out(page, report):
    contrast = """(() => {
        const light = colour => {
            const [r, g, b] = colour.match(/[0-9.]+/g).map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ratio = (one, other) => {
            const [a, b] = [light(one), light(other)].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        };
        const style = (s, key) => getComputedStyle(document.querySelector(s))[key];
        const card = style('figure', 'backgroundColor');
        return [ratio(style('h1', 'color'), style('body', 'backgroundColor')),
            ratio(style('tbody td', 'color'), card), ratio(style('figcaption', 'color'), card),
            ratio(style('figure .wide text', 'fill'), card)];
    })()"""
    for dark in (False, True):
        page.show(width=1280, dark=dark)
        page.open(report.page)
        assert min(page.evaluate(contrast)) >= 4.5, "dark" if dark else "light"
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(19, 22, 26)"
