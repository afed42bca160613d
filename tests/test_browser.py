"""The built book in a real browser, opened from files with the network refused."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from axe_core_python.sync_playwright import Axe
from browsing import Visit

pytestmark = pytest.mark.browser

FORBIDDEN = re.compile(r"Traceback|NotImplementedError|injected-parameters|(?<![\w.:/])/(home|root|tmp|Users|work)/\w")
AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


class _Page(HTMLParser):
    """The identifiers and addresses of one HTML page, and the titles in its article."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.addresses: list[str] = []
        self.titles = 0
        self.in_article = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids |= {value for name, value in attrs if name in ("id", "name") and value}
        # The theme repeats the title outside the article, for print only.
        self.in_article |= tag == "article"
        self.titles += tag == "h1" and self.in_article
        self.addresses += [named[name] or "" for name in ("href", "src") if name in named]

    def handle_endtag(self, tag: str) -> None:
        self.in_article &= tag != "article"


@pytest.fixture(scope="session")
def site(built_book: Path) -> Path:
    return Path(built_book).parent


@pytest.fixture(scope="session")
def pages(site: Path) -> list[Path]:
    """The pages that readers visit; the index in the root only sends them on."""
    found = [*sorted((site / "book").rglob("*.html")), site / "genindex.html", site / "search.html"]
    assert len(found) > 5
    return found


def written(page: Path) -> int:
    """How many figures a page has."""
    return page.read_text(encoding="utf-8").count('<figure class="rim-chart">')


@pytest.fixture
def visit(browser) -> Iterator[object]:
    opened: list[Visit] = []

    def start(theme: str, width: int = 1280) -> Visit:
        opened.append(Visit(browser, theme, width))
        return opened[-1]

    yield start
    for each in opened:
        each.context.close()


def violations(page: Path, tab: Visit, only: dict) -> list[str]:
    """What axe finds against these rules once all is unfolded."""
    tab.unfold()
    # To tell of what is right too would take ten times as long.
    found = Axe().run(tab.tab, options={"runOnly": only, "resultTypes": ["violations"]})["violations"]
    return [f"{page.name}: {each['id']}: {each['nodes'][0]['html'][:200]}" for each in found]


@pytest.mark.timeout(1500)  # waits for the book, and contrast takes seconds a page
def test_every_page_is_drawn_whole_and_accessible(visit, pages):
    tab, drawn, found = visit("light"), 0, []
    for page in pages:
        tab.open(page)
        assert tab.figures() == [["ok", "light", "drawn"]] * written(page), page.name
        drawn += written(page)
        found += violations(page, tab, {"type": "tag", "values": AXE_TAGS})
    assert drawn > 0
    assert tab.wrong == []
    assert found == []


@pytest.mark.timeout(1500)
def test_a_phone_shows_every_page_without_scrolling_sideways_and_the_dark_is_readable(visit, pages):
    tab, found = visit("dark", width=360), []
    for page in pages:
        tab.open(page)
        assert tab.figures() == [["ok", "dark", "drawn"]] * written(page), page.name
        wide = tab.tab.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, page.name
        clipped = tab.tab.evaluate(
            "() => [...document.querySelectorAll('.rim-vega svg')]"
            ".filter(svg => svg.getBoundingClientRect().right > innerWidth).length"
        )
        assert clipped == 0, page.name
        # Nothing but colours depends on the theme; a wide page shows more of them.
        tab.tab.set_viewport_size({"width": 1280, "height": 900})
        found += violations(page, tab, {"type": "rule", "values": ["color-contrast"]})
        tab.tab.set_viewport_size({"width": 360, "height": 900})
    assert tab.wrong == []
    assert found == []


def test_figures_follow_the_reader_from_light_to_dark_and_back(visit, pages):
    tab = visit("light")
    tab.open(next(filter(written, pages)))
    for theme in ("dark", "light"):
        tab.tab.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
        tab.tab.wait_for_function(
            "theme => [...document.querySelectorAll('figure.rim-chart')]"
            ".every(figure => figure.dataset.theme === theme && figure.dataset.state === 'ok')",
            arg=theme,
        )
    assert tab.wrong == []


def test_the_keyboard_reaches_the_data_of_a_figure(visit, pages):
    tab = visit("light")
    tab.open(next(filter(written, pages)))
    tab.tab.locator("figure.rim-chart summary").first.focus()
    tab.tab.keyboard.press("Enter")
    assert tab.tab.locator("figure.rim-chart td").first.is_visible()


def test_search_finds_a_term_of_the_glossary(visit, site):
    tab = visit("light")
    tab.tab.goto((site / "search.html").as_uri() + "?q=residual")
    tab.tab.wait_for_selector("#search-results li a[href*='glossary']")
    assert tab.wrong == []


def test_pages_have_one_title_and_tell_nothing_of_the_machine(pages):
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert _Page(text).titles == 1 or path.name == "search.html", path.name
        # An example may show the error that a mistake gets.
        told = text.replace("Traceback (most recent call last)", "") if path.name == "api.html" else text
        assert not (found := FORBIDDEN.search(told)), (path.name, found.group(0))


def test_the_index_leads_to_the_first_page(built_book, site):
    found = re.search(r"url=([^\"]+)", Path(built_book).read_text(encoding="utf-8"))
    assert found is not None
    assert (site / found.group(1).strip()).is_file()


def test_internal_links_lead_somewhere(site, pages):
    parsed = {path: _Page(path.read_text(encoding="utf-8")) for path in pages}
    broken = []
    for path, page in parsed.items():
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = parsed.get(target)
            if not target.is_file() or (known and parts.fragment and unquote(parts.fragment) not in known.ids):
                broken.append(f"{path.relative_to(site)}: {address}")
    assert broken == []
