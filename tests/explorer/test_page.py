"""The page against the real server, by Playwright in Chromium: what a visitor does, and what hostile rows cannot do."""

import json
import os
import re
import threading
from pathlib import Path

import pytest

from chromium import CHROMIUM
from conftest import corpus_rows
from whence.explorer.serving import opened, serving
from whence.indexing.build import index

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("WHENCE_NEEDS_BROWSER"), reason="there is no Chromium"
)

HOSTILE = [
    "<script>window.HACKED = 1</script><img src=x onerror='window.HACKED = 2'>",
    "javascript:alert(1) <a href='javascript:window.HACKED=3'>click</a> \x1b[31mred\x1b[0m \u202etxet\u202c",
    "</textarea></pre><svg onload='window.HACKED=4'> http://evil.example/?q=1",
]
WIDTHS = (390, 1280, 1920)
ASKED = "#prompt=5+and+3%3F&completion=+yes%2C+12+and+more"
PATIENCE = 30_000
LONGEST_ROW = int(os.environ.get("WHENCE_LONGEST_ROW", "60_000"))
"""Characters; with 10_000_000 the index takes minutes, and the pages are the same."""


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    """The address of a server of an index with duplicates, hostile rows and one of many characters."""
    rows = [row | {"source": "sums" if n % 3 else None, "level": "easy" if n % 2 else "hard"}
            for n, row in enumerate(corpus_rows(40))]  # fmt: skip
    rows += [{"id": f"same-{n}", "prompt": "7 and 7?", "completion": " yes, 14", "source": "same"} for n in range(3)]
    rows += [{"id": f"<b>{n}</b>", "prompt": text, "completion": f" yes {text}", "source": text[:60]}
             for n, text in enumerate(HOSTILE)]  # fmt: skip
    rows += [{"id": "long", "prompt": "word " * (LONGEST_ROW // 5), "completion": " no", "source": "long"}]
    out = tmp_path_factory.mktemp("page") / "index"
    index(tiny_llama, rows, out, max_tokens=64, progress=False)
    with serving(opened([out]), port=0) as served:
        thread = threading.Thread(target=served.run)
        thread.start()
        yield served.address
        served.stop()
        thread.join()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                  "--disable-background-networking", "--disable-component-update"],
        )  # fmt: skip
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, server):
    """Open the page at an address of its own; afterwards nothing was said on the console or asked of others."""
    contexts, problems = [], []

    def note(request):
        if not request.url.startswith((server, "data:", "blob:")):
            problems.append(request.url)

    def visit(fragment="", **options):
        context = chromium.new_context(viewport={"width": options.pop("width", 1280), "height": 900}, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", note)
        page.goto(server + fragment)
        page.wait_for_selector("#prompt")
        if "prompt=" in fragment:
            page.wait_for_selector(".example")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [problem for problem in problems if "410" not in problem] == []  # Chromium names every answer of an error


def ids(page, side="helpful"):
    return page.eval_on_selector_all(f"[data-side={side}] .example .id", "nodes => nodes.map(node => node.textContent)")


def chip(page, place):
    return page.locator("#answer .chip").nth(place)


def drag(page, first, last):
    """Hold the mouse down from one part of the page to another, each of which has come to rest."""
    first.hover()
    page.mouse.down()
    last.hover()
    page.mouse.up()


def changes(page, before, side="helpful"):
    """Wait until other rows are shown."""
    page.wait_for_function(
        "([side, before]) => { const now = [...document.querySelectorAll(`[data-side=${side}] .example .id`)]"
        ".map(node => node.textContent); return now.length && JSON.stringify(now) !== before; }",
        arg=[side, json.dumps(before, separators=(",", ":"), ensure_ascii=False)],
    )
    return ids(page, side)


def accessible(page, name):
    found = axe.Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]})
    assert found.violations_count == 0, f"{name}: {found.generate_report()}"


# -- what a visitor does


def test_a_question_is_typed_and_its_answer_streams(visit):
    page = visit()
    page.fill("#prompt", "5 and 3?")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#answer .chip")
    page.wait_for_selector(".example")
    assert page.locator("[data-side=helpful] .example").count() == 10
    assert page.locator("[data-side=opposing] .example").count() == 10
    page.wait_for_selector(".example .token")
    page.wait_for_url("**completion=*")


def test_tokens_are_chosen_by_a_drag_and_rows_rank_anew(visit):
    page = visit(ASKED)
    whole = ids(page)
    drag(page, chip(page, 1), chip(page, 2))
    page.wait_for_url("**tokens=1-3*")
    chosen = changes(page, whole)
    url = page.url
    page.reload()
    page.wait_for_selector(".example")
    assert (ids(page), page.url) == (chosen, url)
    page.go_back()
    page.wait_for_function("() => !document.querySelector('.chip.chosen')")


def test_the_space_before_a_token_belongs_to_it(visit):
    page = visit(ASKED)
    # This tokenizer has spaces as tokens of their own, so a space is drawn as other tokenizers have it.
    chip(page, 1).evaluate("chip => chip.before(Object.assign(document.createElement('span'), "
                           "{className: 'gap', textContent: '   '}))")  # fmt: skip
    drag(page, page.locator("#answer .gap"), chip(page, 2))
    page.wait_for_url("**tokens=1-3*")


def test_the_keyboard_alone_asks_points_and_opens_a_row(visit):
    page = visit()
    page.focus("#prompt")
    page.keyboard.type("5 and 3?")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".example")
    _tab_to(page, ".chip")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_url("**tokens=1-2*")
    page.keyboard.press("Shift+ArrowRight")
    page.wait_for_url("**tokens=1-3*")
    page.keyboard.press("Escape")
    page.wait_for_url(lambda url: "tokens=" not in url)
    _tab_to(page, ".example .id")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open] .whole")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    page.wait_for_function(IS_ON_A_ROW)


def test_the_keyboard_alone_hears_what_each_token_did(visit):
    page = visit(ASKED)
    page.wait_for_selector(".example .token")
    page.focus("#prompt")
    _tab_to(page, ".example .parts")
    assert "arrow keys tell what each did" in page.evaluate("() => document.activeElement.getAttribute('aria-label')")
    said = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight"):
        page.keyboard.press(key)
        page.wait_for_selector("#tip:not([hidden])")
        assert page.evaluate("() => document.activeElement.getAttribute('aria-describedby')") == "tip"
        said.append(page.inner_text("#tip"))
    assert said[0] == said[2] != said[1], "forth and back"
    assert said[3] == said[4], "it stays at the end"
    assert all("on the answer" in words and "token " in words for words in said)
    page.keyboard.press("Escape")
    page.wait_for_selector("#tip", state="hidden")
    accessible(page, "tokens by keyboard")
    page.keyboard.press("Tab")
    assert page.evaluate("() => !document.activeElement.closest('.token')"), "the list is left by one step"


IS_ON_A_ROW = "() => document.activeElement.matches('.example .id')"


@pytest.mark.parametrize("is_open", [False, True], ids=["in the list", "below a dialog"])
def test_the_focus_outlives_the_row_that_it_was_on(visit, is_open):
    page = visit(ASKED)
    leaving = page.locator("[data-side=helpful] .example .id").nth(4)
    leaving.press("Enter") if is_open else leaving.focus()
    if is_open:
        page.wait_for_selector("dialog[open] .whole")
    page.evaluate("sources => (location.hash += `&sources=${encodeURIComponent(sources)}`)", json.dumps(["same"]))
    page.wait_for_function("() => document.querySelectorAll('[data-side=helpful] .example').length === 1")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    page.wait_for_function(IS_ON_A_ROW)


def _tab_to(page, selector):
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate(f"() => document.activeElement.matches('{selector}')"):
            return
    raise AssertionError(f"no tab leads to {selector}")


def test_another_answer_is_typed_over_this_one(visit):
    page = visit(ASKED)
    page.click("#edit")
    page.fill("#typed", " no, 7")
    page.click("text=Ask: why the answer, and not this")
    page.wait_for_selector(".alternative")
    page.wait_for_selector(".example")
    page.wait_for_url("**contrast=*")


def test_rows_are_filtered(visit):
    page = visit(ASKED)
    page.click('[data-key="filters"]')
    page.click('[data-key="source-same"]')
    page.wait_for_function("() => document.querySelectorAll('[data-side=helpful] .example').length === 1")
    assert ids(page) == ["same-0"]
    assert "3 copies" in page.inner_text("[data-side=helpful]")
    page.fill("#must-occur", "nobody wrote this")
    page.wait_for_selector("text=No row passes these filters")
    page.click("text=Clear all")
    page.wait_for_function("() => document.querySelectorAll('[data-side=helpful] .example').length === 10")


def test_methods_stand_side_by_side(visit):
    page = visit(ASKED)
    page.click('[data-key="view-methods"]')
    page.wait_for_selector("text=Gradient cosine and BM25 share")
    assert page.locator(".methods section").count() == 2
    assert page.locator("text=EK-FAC is not ready").count()


def test_a_method_that_takes_no_notice_of_the_tokens_chosen_says_so(visit):
    page = visit(f"{ASKED}&method=bm25&tokens=1-3&contrast=+no")
    page.wait_for_selector(
        "#verdict:has-text('Left out: the tokens chosen and the contrast. BM25 compares whole texts.')"
    )
    page.click("#all-tokens")
    page.wait_for_selector("#verdict:has-text('Left out: the contrast. BM25')")


def test_the_corpus_is_searched(visit):
    page = visit()
    page.click('#views [data-key="search"]')
    page.fill("#words", "7 and 7")
    page.wait_for_selector(".hit")
    assert page.locator(".hit").count() >= 3
    page.reload()
    page.wait_for_selector(".hit")


@pytest.mark.parametrize(("label", "name", "beginning"), [
    ("These rows", "examples.jsonl", "{"),
    ("All rows without these", "corpus_without_examples.jsonl", "{"),
    ("The ranking", "ranking.jsonl", '{"query": 0, "rank": 1'),
    ("The report", "trace.html", "<!doctype html>"),
])  # fmt: skip
def test_what_is_shown_is_a_file(visit, tmp_path, label, name, beginning):
    page = visit(ASKED)
    page.click('[data-key="export"]')
    with page.expect_download() as coming:
        page.click(f'.files button:text-is("{label}")')
    assert coming.value.suggested_filename == name
    coming.value.save_as(tmp_path / name)
    assert Path(tmp_path / name).read_text(encoding="utf-8").startswith(beginning)
    page.wait_for_selector("pre:has-text('whence trace')")
    page.wait_for_selector("pre:has-text('import whence')")


def test_chance_is_measured_and_said(visit):
    page = visit(ASKED)
    page.wait_for_function("() => /above chance/.test(document.querySelector('#verdict').textContent)")


def test_pieces_that_stand_word_for_word_are_marked(visit):
    page = visit("#prompt=Which%3F&completion=+" + "word+" * 9)
    page.wait_for_selector(".piece")
    assert "stand word for word" in page.inner_text("#copied")


def test_an_answer_that_is_gone_is_asked_for_again(visit, monkeypatch):
    page = visit(ASKED)
    monkeypatch.setattr("whence.explorer.answers.MOST_ANSWERS", 1)
    visit("#prompt=Another%3F&completion=+one")
    before = ids(page)
    with page.expect_response("**/api/answers"):
        chip(page, 1).click()
    changes(page, before)
    monkeypatch.undo()


# -- how it looks, and to whom


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barrier_is_found(visit, scheme):
    page = visit(ASKED, color_scheme=scheme)
    page.wait_for_selector(".example .token")
    chip(page, 1).click()
    page.click('[data-key="filters"]')
    page.wait_for_timeout(400)
    accessible(page, "an answer, filters")
    if scheme == "dark":  # only colours are others
        return
    page.locator(".example .id").first.click()
    page.wait_for_selector("dialog[open] .whole")
    accessible(page, "a row")
    page.keyboard.press("Escape")
    page.click('[data-key="view-methods"]')
    page.wait_for_selector("text=Gradient cosine and BM25 share")
    accessible(page, "methods")
    page.click('#views [data-key="search"]')
    page.fill("#words", "yes")
    page.wait_for_selector(".hit")
    accessible(page, "search")


def test_no_width_needs_sideways_scrolling(visit, tmp_path):
    page = visit(ASKED)
    page.wait_for_selector(".example .token")
    for width in (360, *WIDTHS):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0, width


def test_hostile_rows_are_text(visit):
    page = visit(ASKED + "&top=50")
    page.wait_for_selector(".example .token")
    for name in ("&lt;b&gt;0", "&lt;b&gt;1", "&lt;b&gt;2"):
        row = page.locator(".example .id", has_text=re.sub("&lt;b&gt;", "<b>", name)).first
        row.click()
        page.wait_for_selector("dialog[open] .whole")
        page.keyboard.press("Escape")
    assert page.evaluate("() => window.HACKED") is None
    assert page.locator("main img, main script, main a, dialog a, dialog img").count() == 0
    shown = page.evaluate("() => document.body.innerText")
    assert "<script>window.HACKED" in shown
    assert not re.search("[\u202a-\u202e\x00-\x08\x1b]", shown), "control characters are shown as symbols"
