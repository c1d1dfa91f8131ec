"""The report as a reader sees it, in headless Chromium: nothing fails, overflows or is fetched, and its parts work."""

import base64
import itertools
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from analysis.report import comparison, render_report, theme
from analysis.run_record import read_run
from tests.analysis.browser import CHROMIUM, Browser, browser
from tests.analysis.fake_run import write_fake_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="headless Chromium is not installed")

# What is wider than the window and not within something that scrolls by itself.
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(each => {
  const box = each.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !each.closest('.scroll, .skip, pre');
}).map(each => each.tagName + '.' + each.className).slice(0, 5)"""
SETTINGS = "document.querySelector('#settings-sound table.sortable')"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_report(write_fake_run(tmp_path_factory.mktemp("browsed")))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page__shows_at_every_width_without_errors_overflow_or_requests(
    tab: Browser, page: Path, width: int, dark: bool
) -> None:
    tab.open(page, width, dark=dark)
    tab.ask("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert tab.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert tab.ask(TOO_WIDE) == []
    assert tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith("data:")] == [page.as_uri()]


@pytest.mark.parametrize("width", [360, 1280])
def test_comparison__shows_without_errors_overflow_or_requests(tab: Browser, page: Path, width: int) -> None:
    records = [read_run(page.parent), read_run(write_fake_run(page.parent.parent / "another-run-with-a-long-name"))]
    nothing = comparison.Paired(pd.DataFrame(), "No paired differences: they were not asked for.")
    both = comparison.render_comparison(records, nothing, page.parent.parent / "both")
    tab.open(both, width)
    assert tab.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert tab.ask(TOO_WIDE) == [] and tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith("data:")] == [both.as_uri()]


def test_page__follows_the_readers_theme_and_the_button(tab: Browser, page: Path) -> None:
    shown = "getComputedStyle(document.body).backgroundColor"
    light, dark = (_rgb(value) for value in theme.COLOURS["paper"])
    tab.open(page, 900)
    assert tab.ask(shown) == light
    tab.ask("document.querySelector('button.theme').click()")
    assert tab.ask(shown) == dark
    tab.open(page, 900, dark=True)
    assert tab.ask(shown) == dark
    tab.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert tab.ask(shown) == "rgb(255, 255, 255)"
    tab.call("Emulation.setEmulatedMedia", media="", features=[])


def test_page__sorts_a_table_by_its_numbers_with_the_keyboard(tab: Browser, page: Path) -> None:
    rows = read_run(page.parent).rows("metric")
    lrap = rows[(rows["metric"] == "lrap") & rows["label"].isna()].sort_values("value")
    tab.open(page, 1280)
    head = f"[...{SETTINGS}.tHead.rows[0].cells].find(cell => cell.textContent.startsWith('LRAP'))"
    order = f"[...{SETTINGS}.tBodies[0].rows].map(row => row.cells[0].firstChild.nextSibling.textContent)"
    tab.ask(f"{head}.querySelector('button').focus()")
    for way, expected in (("ascending", lrap), ("descending", lrap.iloc[::-1])):
        tab.press("Enter")
        assert tab.ask(f"{head}.getAttribute('aria-sort')") == way
        assert tab.ask(order) == expected["setting"].tolist()
    assert tab.ask(f"{SETTINGS}.querySelectorAll('[aria-sort]').length") == 1


def test_page__begins_for_the_keyboard_with_a_way_past_the_contents(tab: Browser, page: Path) -> None:
    tab.open(page, 1280)
    tab.press("Tab")
    assert tab.ask("document.activeElement.getAttribute('href')") == "#main"
    assert tab.ask("document.activeElement.getBoundingClientRect().left") >= 0
    tab.press("Tab")
    outline = tab.ask("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_page__has_headings_in_order_and_names_for_everything(tab: Browser, page: Path) -> None:
    tab.open(page, 1280)
    levels = tab.ask("[...document.querySelectorAll('h1,h2,h3')].map(each => +each.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert tab.ask("[...document.querySelectorAll('img')].filter(each => !each.alt).length") == 0
    named = "each.getAttribute('aria-label') || each.getAttribute('aria-hidden')"
    assert tab.ask(f"[...document.querySelectorAll('svg')].filter(each => !({named})).length") == 0
    assert (
        tab.ask("[...document.querySelectorAll('table')].filter(each => !each.caption.textContent.trim()).length") == 0
    )
    assert tab.ask("[...document.querySelectorAll('thead th:not([scope]), tbody th:not([scope])')].length") == 0
    assert (
        tab.ask("[...document.querySelectorAll('tbody tr')].filter(row => row.cells[0].tagName !== 'TH').length") == 0
    )
    broken = "[...document.querySelectorAll('a[href^=\"#\"]')].filter(each => !document.querySelector(each.hash))"
    assert tab.ask(f"{broken}.length") == 0


def test_page__tells_which_sample_a_point_is_and_shows_one_label_alone(tab: Browser, page: Path) -> None:
    points = read_run(page.parent).embedding_map
    tab.open(page, 1280)
    tab.ask("document.querySelector('#map').scrollIntoView({behavior: 'instant'})")
    place = tab.ask(
        "(() => { const data = JSON.parse(document.querySelector('.map-data').textContent).panels[0];"
        "const box = document.querySelector('#map svg').getBoundingClientRect();"
        "return [box.left + data.x[7] / 1000 * box.width, box.top + data.y[7] / 1000 * box.width]; })()"
    )
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    told = tab.ask("document.querySelector('.tip').textContent")
    row = points.iloc[7]
    assert told == f"{row['label']} · {row['split']} · {row['id']}"
    tab.ask("document.querySelector('.legend button').click()")
    label = tab.ask("document.querySelector('.legend button').dataset.label")
    shown = "[...document.querySelectorAll('.map path.on')].map(each => each.dataset.label)"
    assert tab.ask(shown) == [label]


def test_page__prints_with_all_but_long_tables_open(tab: Browser, page: Path) -> None:
    tab.open(page, 1280)
    shut = "document.querySelectorAll('main details:not([open], .long)').length"
    tab.ask(f"addEventListener('beforeprint', () => {{ window.shut = {shut}; }})")
    assert tab.ask(shut) > 0
    paper = base64.b64decode(tab.call("Page.printToPDF", printBackground=True)["data"])
    assert paper.startswith(b"%PDF")
    assert tab.ask("window.shut") == 0


def _rgb(colour: str) -> str:
    return "rgb({}, {}, {})".format(*(int(colour[place : place + 2], 16) for place in (1, 3, 5)))
