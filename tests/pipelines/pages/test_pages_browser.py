"""The pages in a real headless browser, opened from a folder as a user opens them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_tables import D_SAE, HOSTILE, dictionary, label_of, speller, write_tables

from pipelines.pages import write_pages
from tests.browser import PROGRAM, WHY_NOT, Page, browser

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)

ROWS = "[...document.querySelectorAll('#rows tr')].map(row => row.cells[0].innerText.trim())"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages")
    tables = write_tables(root / "tables")
    return write_pages(dictionary(), tables, root / "pages", title=HOSTILE, speller=speller()).parent


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running.page()


def index(tab: Page, folder: Path, view: str = "") -> None:
    tab.open((folder / "index.html").as_uri() + view)


def feature(tab: Page, folder: Path, latent: int) -> None:
    tab.open((folder / "feature.html").as_uri() + f"#{latent}")


def rows(tab: Page) -> list[int]:
    return [int(text) for text in tab.evaluate(ROWS)]


def choose(tab: Page, selector: str, value: str) -> None:
    tab.evaluate(
        f"(() => {{ const s = document.querySelector({json.dumps(selector)}); s.value = {json.dumps(value)};"
        "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def test_the_index_shows_every_latent_with_few_rows_in_the_page(tab: Page, folder: Path):
    index(tab, folder)
    shown = rows(tab)
    assert shown == list(range(len(shown)))
    assert 10 < len(shown) < 60
    assert f"{D_SAE} latents" in tab.text()
    assert tab.evaluate("document.getElementById('table').getAttribute('aria-rowcount')") == str(D_SAE + 1)
    tab.evaluate("document.getElementById('scroller').scrollTop = 1e9")
    tab.wait(f"{ROWS}.at(-1) === '{D_SAE - 1}'")
    heights = tab.evaluate("[...document.querySelectorAll('#rows tr')].map(row => row.getBoundingClientRect().height)")
    assert set(heights) == {52}  # what the scrolling counts with


def test_the_index_is_searched_filtered_and_sorted(tab: Page, folder: Path):
    index(tab, folder)
    tab.press("/")
    tab.write("RIVER number 11")
    expected = [i for i in range(D_SAE) if "river number 11" in (label_of(i) or f"candidate {i}")]
    tab.wait(f"document.querySelectorAll('#rows tr').length === {len(expected)}")
    assert rows(tab) == expected
    assert f"{len(expected)} of {D_SAE}" in tab.text()
    tab.press("Escape")
    tab.write("nothing has this")
    tab.wait("!document.getElementById('nothing').hidden")
    tab.press("Escape")
    tab.evaluate("document.querySelector('#statuses input[value=survives]').click()")
    surviving = [i for i in range(D_SAE) if i % 10 == 1 and label_of(i) is not None]
    assert rows(tab) == surviving[: len(rows(tab))]
    tab.evaluate("document.querySelector('#statuses input[value=\"\"]').click()")
    choose(tab, "#density", "1")
    assert rows(tab) == [7]
    choose(tab, "#density", "0")
    choose(tab, "#kind", "silent")
    assert rows(tab) == [7]
    choose(tab, "#kind", "")
    for expected_order in ("descending", "ascending"):
        tab.evaluate("[...document.querySelectorAll('th button')].find(b => b.innerText.startsWith('Max')).click()")
        state = tab.evaluate("document.querySelector('th[data-key=max_activation]').getAttribute('aria-sort')")
        assert state == expected_order
    assert rows(tab)[:3] == [7, 0, 1]
    tab.evaluate("[...document.querySelectorAll('th button')].find(b => b.innerText.startsWith('Label')).click()")
    labels = tab.evaluate("[...document.querySelectorAll('#rows .name')].map(e => e.innerText)")
    assert len(labels) > 10
    # The address keeps the view.
    address = tab.evaluate("location.hash")
    before = rows(tab)
    index(tab, folder, address)
    assert rows(tab) == before


def test_the_index_is_worked_with_the_keyboard(tab: Page, folder: Path):
    index(tab, folder)
    for _ in range(30):
        tab.press("ArrowDown")
    assert tab.evaluate("document.activeElement.getAttribute('href')") == "feature.html#29"
    seen = tab.evaluate(
        "[document.activeElement.getBoundingClientRect()].every(box => box.top > 0 && box.bottom < innerHeight)"
    )
    assert seen
    tab.press("Enter")
    tab.wait("location.pathname.endsWith('feature.html') && document.readyState === 'complete'")
    tab.wait("performance.getEntriesByName('ready').length > 0")
    assert "LATENT 29" in tab.text()
    tab.press("ArrowRight")
    tab.wait("document.querySelector('.eyebrow').innerText === 'LATENT 30'")
    assert tab.evaluate("document.activeElement.id") == "name"  # read out
    tab.press("ArrowLeft")
    tab.wait("document.querySelector('.eyebrow').innerText === 'LATENT 29'")


def test_a_feature_page_shows_label_tests_contexts_and_neighbours(tab: Page, folder: Path):
    feature(tab, folder, 1)
    text = tab.text()
    for part in (
        *("LATENT 1", "river number 1", "Survives", "Held-out detection", "Brand new", "How strongly it fires"),
        *("Fires on", "Promotes", "Suppresses", "Strongest", "Claimed by the label", "Invented <kind>"),
        *("Nearest latents", "What others call it", "A. Person"),
    ):
        assert part in text, part
    assert tab.evaluate("document.querySelectorAll('.histogram rect').length") == 5
    marks = tab.evaluate(
        "[...document.querySelectorAll('.contexts')][0].querySelectorAll('mark').values()"
        ".map(m => [m.innerText, m.dataset.tip, m.style.getPropertyValue('--strength')]).toArray()"
    )
    assert marks[0] == ["s", '"s"  2.00', "1.000"]
    assert marks[1] == ["é", '"é"  0.250 + 0.500', "0.250"]  # both tokens of one character
    tab.hover("mark")
    tab.wait("!document.getElementById('tip').hidden")
    assert tab.evaluate("document.getElementById('tip').innerText") == '"s"  2.00'
    near = tab.evaluate("document.querySelector('.near a').getAttribute('href')")
    tab.evaluate("document.querySelector('.near a').click()")
    tab.wait(f"document.querySelector('.eyebrow').innerText === 'LATENT {near[1:]}'")


def test_a_latent_that_never_fires_has_a_page(tab: Page, folder: Path):
    feature(tab, folder, 7)
    assert "It never fires, so there are none." in tab.text()


@pytest.mark.parametrize("asked", ["-1", "200", "x", "1e1", "%3Cimg src=x onerror=alert(1)%3E"])
def test_a_latent_that_does_not_exist_is_said_to_be_none(tab: Page, folder: Path, asked: str):
    feature(tab, folder, 0)
    tab.evaluate(f"location.hash = {json.dumps(asked)}")
    tab.wait("document.querySelector('.failure') !== null")
    assert "numbered from 0 to 199" in tab.text()


def test_hostile_texts_are_shown_and_do_nothing(tab: Page, folder: Path):
    before = len(tab.complaints)
    for latent in (0, 1, 4, 12):
        feature(tab, folder, latent)
        assert "document.title='owned'" in tab.text()
        assert tab.evaluate("document.title").startswith(f"{latent}: ")
        assert (
            tab.evaluate(
                "document.querySelectorAll('img, iframe, body script[src*=x], [onerror], [onmouseover]').length"
            )
            == 0
        )
        tab.hover("h1 bdi")
    index(tab, folder)
    assert "owned" in tab.text()
    assert tab.evaluate("document.querySelectorAll('img, [onerror]').length") == 0
    assert "⟨202E⟩" in tab.text()  # named, not obeyed
    assert tab.complaints[before:] == []


def test_data_that_are_missing_are_a_plain_message(tab: Page, folder: Path, tmp_path: Path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "data" / "block-0.js").unlink()
    tab.call("Page.navigate", url=(broken / "feature.html").as_uri() + "#3")
    tab.wait("document.querySelector('.failure') !== null")
    assert "block-0.js is missing or damaged: write the pages again." in tab.text()
    (broken / "data" / "index.js").write_text("Pages.index({")
    tab.call("Page.navigate", url=(broken / "index.html").as_uri())
    tab.wait("document.querySelector('.failure') !== null")
    assert "write the pages again" in tab.text()


CONTRAST = """
(() => {
  const channel = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const rgb = (...colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = c => { const [r, g, b] = c.map(channel); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const grounds = e => e ? [...grounds(e.parentElement), getComputedStyle(e).backgroundColor] : [];
  const passed = '.hidden, .skip, noscript, option, [aria-hidden=true], a:not([href])';
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.closest(passed)) continue;
    const ground = light(rgb(...grounds(e))), ink = light(rgb(...grounds(e), getComputedStyle(e).color));
    const ratio = (Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05);
    if (ratio < 4.5) found.push([e.tagName, e.className, e.innerText.slice(0, 30), ratio.toFixed(2)]);
  }
  return found;
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_has_enough_contrast(tab: Page, folder: Path, dark: bool):
    tab.look(dark=dark)
    for open_page in (lambda: index(tab, folder), lambda: feature(tab, folder, 1)):
        open_page()
        found: Any = tab.evaluate(CONTRAST)
        assert found == []
    tab.look()


def test_every_control_has_a_name_and_nothing_sticks_out_on_a_phone(tab: Page, folder: Path):
    nameless = (
        "[...document.querySelectorAll('a[href], button, input, select')].filter(e => e.checkVisibility() && "
        "!(e.getAttribute('aria-label') || e.innerText?.trim() || e.closest('label')?.innerText.trim() || "
        "e.labels?.[0]?.textContent.trim())).length"
    )
    tab.look(width=390, height=800)
    for open_page in (lambda: index(tab, folder), lambda: feature(tab, folder, 1)):
        open_page()
        assert tab.evaluate(nameless) == 0
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.look()
