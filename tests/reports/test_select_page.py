"""The selection's report in a real browser: the slider of the budget, and rows that would run."""

import random
import re

import pytest

from whence.reports.select_page import select_page
from whence.selection.pipeline import select

TASKS = [{"prompt": "the cat", "completion": " sat on a mat"}]
HOSTILE = "<script>window.HACKED = 1</script><img src=x onerror='window.HACKED = 2'></script>"


@pytest.fixture(scope="module")
def pool():
    draw, words = random.Random(0), "the cat sat on a mat dog ran far away over hills".split()  # noqa: SIM905
    rows = []
    for number in range(300):
        answer = HOSTILE if number == 3 else " ".join(draw.choices(words, k=4))
        source = ("stories", "letters", HOSTILE, "notes")[number % 4]
        rows.append({"prompt": " ".join(draw.choices(words, k=6)), "completion": f" {answer}", "source": source})
    return rows


@pytest.fixture
def opened(browser, pool, tmp_path):
    """A page of 40 chosen rows."""
    file = tmp_path / "select.html"
    file.write_text(select_page(select(pool, TASKS, method="bm25", count=40)), encoding="utf-8")
    browser.open(file)
    return file


def table(browser):
    """The numbers of each source."""
    return browser.value(
        "[...document.querySelectorAll('#sources tbody tr')]"
        ".map(row => [...row.querySelectorAll('td.n')].map(cell => cell.textContent))"
    )


def slide(browser, place):
    browser.value(
        f"(slider => {{ slider.value = {place}; slider.dispatchEvent(new Event('input')); }})"
        "(document.getElementById('size'))"
    )
    browser.settle()


def test_the_slider_shows_another_choice(browser, opened, pool):
    assert browser.value("document.querySelector('#budget output').textContent") == "40 rows"
    assert browser.value("document.querySelector('#budget .say').textContent").startswith(
        "As chosen: 13.3% of the 300 "
    )
    as_drawn = table(browser)
    sizes = browser.value("JSON.parse(document.getElementById('data').textContent).steps.map(step => step[0])")
    assert (sizes[0], sizes[-1]) == (1, 300)
    for place in (0, len(sizes) // 2, len(sizes) - 1):
        slide(browser, place)
        again = select(pool, TASKS, method="bm25", count=sizes[place])
        counts = sorted(int(line[0].replace(",", "")) for line in table(browser))
        sources = [again.candidates.sources[row] for row in again.selection.rows]
        assert counts == sorted(sources.count(source) for source in {row["source"] for row in pool})
        words = browser.value("document.querySelector('#budget .say').textContent")
        assert f"--count {sizes[place]}." in words and f"of the {len(again.order)} that may be chosen" in words
    slide(browser, sizes.index(40))
    assert table(browser) == as_drawn
    assert browser.errors() == [] and browser.value("window.HACKED === undefined")


def test_the_keyboard_moves_the_slider(browser, opened):
    browser.value("document.getElementById('size').focus()")
    browser.press("Home")
    assert browser.value("document.querySelector('#budget output').textContent") == "1 row"


def test_what_python_draws_is_what_the_script_draws(browser, opened):
    """Without a script the page is of the choice."""
    page = opened.read_text(encoding="utf-8")
    lines = page[page.index('id="sources"') :].split("</table>")[0].split("<tbody>")[1].split("<tr>")[1:]
    assert [re.findall(r'<td class="n">([^<]*)</td>', line) for line in lines] == table(browser)
    assert '<div class="budget" id="budget" hidden>' in page


@pytest.mark.parametrize("width", [390, 700, 1280])
def test_nothing_breaks_at_any_width(browser, opened, width):
    browser.open(opened, width=width)
    assert browser.broken() == []
