"""A report is one file in which corpus text stays text; what it does is looked at in Chromium."""

import base64
import hashlib
import html
import json
import math
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from whence.reports.trace_page import trace_page
from whence.tracing.results import Answer, Hit, Null, Reranking, TokenMatrix, Trace

MINUS = "\N{MINUS SIGN}"
RUN = "document.documentElement.dataset.owned='yes';document.title='owned'"
HOSTILE = [
    f"<script>{RUN}</script>",
    f'<img src=x onerror="{RUN}">',
    f'"><svg onload="{RUN}">',
    f"</script><script>{RUN}</script>",
    f"</title></style><script>{RUN}</script>",
    f'<iframe src="javascript:parent.{RUN}"></iframe>',
    f'<a href="javascript:{RUN}" autofocus onfocus="{RUN}">link</a> [link](javascript:{RUN})',
    f'{{{{constructor.constructor("{RUN}")()}}}} ${{{RUN}}} $title $data',
    f"<!--<script>{RUN}//",
    f"' onpointerover='{RUN}' style='background:url(http://127.0.0.1:9/leak)",
]


def answer(tokens, **changes):
    given = {"prompt": "asked", "completion": "".join(tokens), "is_generated": True, "tokens": tokens}
    return Answer(**(given | {"probabilities": [0.9] * len(tokens)} | changes))


def matrix(values, query, train, **changes):
    given = {"basis": "position", "supervised": [True] * len(train), "matrix": torch.tensor(values)}
    return TokenMatrix(**({"query": query, "train": train} | given | changes))


def hit(rank, score, row, **changes):
    return Hit(**({"query": 0, "rank": rank, "id": f"id{rank}", "score": score, "source": None, "row": row} | changes))


def small_trace():
    """Two query tokens, two training tokens, one example on each side; a second query in Arabic without a matrix."""
    query, train = [" yes", " no"], ["Say", " yes"]
    help_with = matrix([[0.5, 0.25], [-0.25, 0.0]], query, train, supervised=[False, True])
    oppose = matrix([[-0.125, 0.0], [0.0, -0.125]], query, train)
    null = Null([0.0, 0.1, 0.2, 0.1], 0.1, 4.9, 100.0, True)
    return Trace(
        answers=[answer(query), answer(["نعم", " هو"], prompt="لماذا", is_generated=False)],
        hits=[
            hit(1, 0.5, {"text": "Say yes"}, tokens=help_with, exact=0.5, null=null, source="web"),
            hit(-1, -0.25, {"text": "Say yes"}, tokens=oppose, exact=-0.25),
            hit(1, 0.02, {"prompt": "هل", "completion": " نعم"}, query=1, by_token=[0.015, 0.005]),
        ],
        method="cosine",
        rows=1234,
        verdicts=["The best example stands above the null.", "Nothing stands above the null."],
        levels=[4.5, 5.0],
        overlaps=[0.9, 0.5],
        notes=["--top 5: only 2 rows can be ranked."],
        settings={"model": "tiny"},
    )


def hostile_trace():
    every = " ".join(HOSTILE)
    tokens = matrix([[0.1] * len(HOSTILE)] * len(HOSTILE), HOSTILE, HOSTILE)
    asked = answer(HOSTILE, prompt=every, contrast=every, contrast_tokens=[], contrast_probabilities=[])
    hits = [
        hit(1, 0.5, {"prompt": every, "completion": every}, id=every, source=every, tokens=tokens),
        hit(2, 0.4, {"prompt": every, "completion": every}, id=every, source=every),
        hit(3, 0.3, {"messages": [{"role": every, "content": every}, {"role": "a", "content": every}]}),
        hit(-1, -0.1, {"instruction": every, "input": every, "output": every}, source=every),
        hit(1, 0.1, {"text": every}, query=1),
    ]
    return Trace([asked, asked], hits, every, 9, [every, every], [4.0, 4.0], [], [every], {every: every})


def payload(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def entries(packed):
    steps = np.frombuffer(base64.b64decode(packed["steps"]), "<i2").reshape(len(packed["peaks"]), -1)
    return steps * np.array(packed["peaks"])[:, None] / 32767


def test_the_file_allows_only_its_own_script_and_style():
    page = trace_page(small_trace())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    allowed = dict(rule.split(" ", 1) for rule in policy.split("; "))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    for name, text in (("script-src", script), ("style-src", style)):
        assert allowed[name] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    assert allowed["require-trusted-types-for"] == "'script'"
    assert page.index("Content-Security-Policy") < page.index("<title>")
    assert not re.search(r"(?i)\b(src|href|action)\s*=|@import|url\(|<link|<base", page)


def test_no_text_leaves_its_place():
    page = trace_page(hostile_trace())
    data = page.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data)
    assert page.count("</script") == 2
    assert page.count("</title>") == page.count("</style>") == 1
    first = payload(page)["queries"][0]
    assert first["helpful"][0]["tokens"]["train"] == HOSTILE
    assert first["prompt"] == " ".join(HOSTILE)


def test_numbers_that_json_lacks_do_not_break_it():
    broken = [math.nan, math.inf, -math.inf]
    null = Null([*broken, 0.5], math.nan, math.inf, math.nan, False)
    tokens = matrix([broken, [1.0, 2.0, -4.0]], ["a", "b"], ["x", "y", "z"])
    found = Trace(
        [answer(["a", "b"], probabilities=[math.nan, 0.5])],
        [hit(1, math.nan, {"text": "t"}, exact=math.inf, null=null, by_token=broken[:2], tokens=tokens)],
        "dot",
        1,
        levels=[math.inf],
        overlaps=[math.nan],
    )
    first = payload(trace_page(found))["queries"][0]
    (shown,) = first["helpful"]
    assert shown["score"] is None and shown["exact"] is None and first["overlap"] is None
    assert shown["null"] == {
        "scores": [0.5],
        "mean": None,
        "z": None,
        "needed": None,
        "percentile": None,
        "generic": False,
        "own": None,
    }
    assert shown["tokens"]["shares"] == [None, -1.0]
    assert entries(shown["tokens"]).tolist()[0] == [0.0, 0.0, 0.0]


def test_a_matrix_travels_to_the_precision_of_its_rows():
    values = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 6, 7)[:, None]
    values[3] = 0
    tokens = matrix(values.tolist(), ["q"] * 7, ["t"] * 33)
    packed = payload(trace_page(Trace([answer(["q"] * 7)], [hit(1, 1.0, {"text": ""}, tokens=tokens)], "dot", 1)))
    packed = packed["queries"][0]["helpful"][0]["tokens"]
    worst = np.abs(entries(packed) - values.numpy()).max(1)
    assert (worst <= values.abs().amax(1).numpy() / 65000).all()
    assert packed["shares"] == pytest.approx(values.double().sum(1).tolist(), rel=1e-6)
    assert packed["sumPeak"] == pytest.approx(values.double().sum(0).abs().max().item(), rel=1e-6)
    assert packed["striking"] == values.double().sum(0).abs().argmax()


def test_a_matrix_without_entries_is_written():
    for query, train in (([], ["t"]), (["q"], []), ([], [])):
        tokens = TokenMatrix("loss", query, train, [True] * len(train), torch.zeros(len(query), len(train)))
        page = trace_page(Trace([answer(query)], [hit(1, 0.5, {"text": "t"}, tokens=tokens)], "dot", 1))
        assert payload(page)["queries"][0]["helpful"][0]["tokens"]["steps"] == ""


def test_twenty_examples_with_their_matrices_stay_below_two_megabytes():
    random = torch.Generator().manual_seed(0)
    query, train = [" token"] * 64, [" token"] * 500
    tokens = TokenMatrix("position", query, train, [True] * 500, torch.randn(64, 500, generator=random))
    null = Null(torch.randn(200, generator=random).tolist(), 0.0, 1.0, 50.0, False)
    row = {"text": "".join(train)}
    hits = [hit(rank, 1 / rank, row, exact=0.5, null=null, by_token=[0.1] * 64, tokens=tokens) for rank in range(1, 21)]
    assert len(trace_page(Trace([answer(query)], hits, "dot", 20)).encode()) < 2e6


def test_text_is_writable_and_hides_nothing():
    odd = "tab\tline\n \x1b[2J\x07\r\x7f\x9b \u202eturned\u202c \u2067\u2069 \ud800 \U0001f600 \ufffd\u2028."
    page = trace_page(Trace([answer([odd], prompt=odd)], [hit(1, 0.5, {"text": odd}, id=odd)], "dot", 1))
    assert "\u2028" not in page.encode().decode()
    shown = payload(page)["queries"][0]["prompt"]
    assert shown == "tab\tline\n ␛[2J␇␍\\x7f\\x9b \\u202eturned\\u202c \\u2067\\u2069 \ufffd \U0001f600 \ufffd\u2028."
    assert html.unescape(re.search("<title>(.*?)</title>", page)[1]) == "Whence: " + " ".join(shown.split())


def test_the_text_beside_a_matrix_is_what_its_tokens_lack():
    tokens = matrix([[0.5]], ["q"], [" said"])
    row = {"prompt": "asked", "completion": " said"}

    def shown(**changes):
        page = trace_page(Trace([answer(["q"])], [hit(1, 0.5, row, **changes)], "dot", 1))
        found = payload(page)["queries"][0]["helpful"][0]
        return found["prompt"], found["completion"]

    assert shown() == ("asked", " said")
    assert shown(tokens=tokens) == ("", "")
    assert shown(tokens=replace(tokens, basis="loss")) == ("asked", "")


def test_a_guessed_answer_is_said_to_be_one():
    found = Trace([answer(["a", "b", "c"], probabilities=[0.9, 0.1, 0.2]), answer(["a"])], [], "dot", 1)
    guessed, sure = (each["certainty"] for each in payload(trace_page(found))["queries"])
    assert guessed.startswith("1 of 3 tokens at p ≥ 0.5; perplexity 3.82 a token. The model guesses here")
    assert "guesses" not in sure


def test_the_inks_can_be_read_on_the_strongest_colours():
    style = re.search(r"<style>(.*?)</style>", trace_page(small_trace()), re.DOTALL)[1]
    for theme in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        ink = [int(pair, 16) for pair in re.findall("..", re.search("--ink: #(.{6})", theme)[1])]
        for name in ("helpful", "opposing"):
            ground = [int(number) for number in re.search(rf"--{name}: (\d+ \d+ \d+);", theme)[1].split()]
            assert contrast(ink, ground) > 4.5, (name, theme)


def contrast(one, other):
    """WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    dark, light = sorted(luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


# -- in a browser


@pytest.fixture
def show(browser, tmp_path):
    """A trace or a document, shown in the browser."""

    def shown(what, fragment="", width=1200):
        file = tmp_path / "report.html"
        file.write_text(what if isinstance(what, str) else trace_page(what), "utf-8")
        browser.open(file, fragment, width)
        return browser

    return shown


def colours(browser, selector):
    script = f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.style.backgroundColor)"
    return browser.value(script)


def texts(browser, selector):
    shown = browser.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")
    return [re.sub("[\u2068\u2069]", "", text) for text in shown]


def pinned(browser):
    return texts(browser, ".chip[aria-pressed=true]")


IS_OWNED = "document.documentElement.dataset.owned === 'yes' || document.title === 'owned'"


def test_nothing_in_a_corpus_row_runs(show):
    browser = show(hostile_trace())
    assert browser.value("document.documentElement.dataset.ready") == "yes"
    assert browser.value("document.querySelectorAll('body :is(iframe, img, a, [onload], [onfocus])').length") == 0
    for text in (" ".join(HOSTILE), HOSTILE[0]):
        assert text in browser.value("document.body.innerText.replaceAll('↵', '')")
    browser.point(".chip", 3)
    browser.point(".token", 3)
    browser.value("document.querySelectorAll('aside *, main *').forEach(node => node.click?.())")
    browser.point("#next-query", click=True)
    time.sleep(0.2)
    assert not browser.value(IS_OWNED)
    assert browser.value("document.title").startswith("Whence: <script>")
    assert not browser.errors()


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_the_policy_stops_what_escaping_would_have_let_through(show, number):
    page = trace_page(small_trace()).replace("<footer>", f"<footer>{HOSTILE[number]}")
    browser = show(page)
    time.sleep(0.1)
    assert not browser.value(IS_OWNED)
    assert browser.value("document.documentElement.dataset.ready") == "yes"
    assert browser.errors()
    browser = show(re.sub("<meta http-equiv=[^>]*>", "", page))
    time.sleep(0.1)
    assert browser.value(IS_OWNED)


def test_a_report_asks_for_nothing_but_itself(show):
    browser = show(small_trace(), "#q=1")
    asked = [event["params"]["request"]["url"] for event in browser.events if "requestWillBeSent" in event["method"]]
    assert len(asked) == 1 and asked[0].startswith("file:")
    assert not browser.errors()


def test_examples_are_coloured_by_all_tokens_at_first(show):
    browser = show(small_trace())
    assert pinned(browser) == []
    blue, also_blue, orange, also_orange = colours(browser, ".token")
    assert blue == also_blue == "rgb(var(--helpful) / 1.00)"
    assert orange == also_orange == "rgb(var(--opposing) / 0.62)"
    assert texts(browser, ".figure") == ["+0.500score", f"{MINUS}0.250score"]
    assert texts(browser, "main h2") == [
        "HelpfulTraining on these makes the answer more likely.",
        "OpposingTraining on these makes the answer less likely.",
    ]


def ranked_exactly():
    """Compressed scores of another order and sign than the exact ones that rank."""
    rows = [(1, 0.016, 0.5), (2, 0.021, 0.25), (-1, -0.3, -0.125), (-2, -0.2, 0.019)]
    null = Null([0.0, 0.1, 0.2, 0.1], 0.1, 4.9, 100.0, False)
    hits = [
        hit(rank, score, {"text": "t"}, exact=exact, exact_rank_score=exact, null=null) for rank, score, exact in rows
    ]
    return Trace([answer([" a"])], hits, "cosine", 400, overlaps=[0.4], rerankings=[Reranking(100, 100)])


def test_what_ranks_is_what_travels():
    first = payload(trace_page(ranked_exactly()))["queries"][0]
    assert [(shown["ranked"], shown["isExact"]) for shown in first["helpful"]] == [(0.5, True), (0.25, True)]
    assert "longer short list" in first["overlap"]
    assert not payload(trace_page(small_trace()))["queries"][0]["helpful"][0]["isExact"]


def test_exact_scores_that_rank_are_the_large_numbers_and_the_bars(show):
    browser = show(ranked_exactly(), width=390)
    assert texts(browser, ".figure") == [
        "+0.500exact score", "+0.250exact score", f"{MINUS}0.125exact score", "+0.019exact score"
    ]  # fmt: skip
    assert next(text for text in texts(browser, ".facts span") if "compressed" in text) == "compressed +0.016"
    widths = browser.value("[...document.querySelectorAll('.bar i')].map(node => parseFloat(node.style.width))")
    assert widths[0] == pytest.approx(2 * widths[1], rel=1e-3)
    assert "here +0.500" in browser.value("document.querySelector('.null svg').getAttribute('aria-label')")
    assert texts(browser, "main h2") == [
        "HelpfulTraining on these makes the answer more likely.",
        "OpposingTraining on these makes the answer less likely.",
        "LowestNone of these opposes the answer.",
    ]
    assert browser.broken() == []


def test_how_sure_is_of_the_span():
    asked = answer([" a", " b", " c"], probabilities=[0.9, 0.25, 0.9], asked=[False, True, False])
    (shown,) = payload(trace_page(Trace([asked], [], "dot", 1)))["queries"]
    assert shown["certainty"].startswith("0 of 1 token of the span at p ≥ 0.5; perplexity 4.00 a token")


def test_the_address_pins_a_token(show):
    browser = show(small_trace(), "#q=0&t=1")
    assert pinned(browser) == ["no"]
    assert colours(browser, ".token") == ["rgb(var(--opposing) / 1.00)", "", "", "rgb(var(--opposing) / 0.62)"]
    assert texts(browser, ".figure") == [f"{MINUS}0.250of +0.500", f"{MINUS}0.125of {MINUS}0.250"]
    assert browser.value("document.querySelector('.bar i').className") == "opposes"


@pytest.mark.parametrize("fragment", ["#q=7&t=99", "#q=-1&t=x", "#<script>", "#q=1e3&t=%00", "#t="])
def test_an_address_that_means_nothing_is_read_as_none(show, fragment):
    browser = show(small_trace(), fragment)
    assert browser.value("document.documentElement.dataset.ready") == "yes"
    assert pinned(browser) == [] and not browser.errors()


def test_pointing_shows_and_clicking_pins(show):
    browser = show(small_trace())
    browser.point(".chip", 1)
    assert colours(browser, ".token")[0] == "rgb(var(--opposing) / 1.00)"
    assert pinned(browser) == []
    assert texts(browser, "#tip p") == ["␣no", "p\u00a0=\u00a00.900", "click to pin"]
    browser.point("h1")
    assert colours(browser, ".token")[0] == "rgb(var(--helpful) / 1.00)"
    browser.point(".chip", 1, click=True)
    browser.point("h1")
    assert pinned(browser) == ["no"]
    assert colours(browser, ".token")[0] == "rgb(var(--opposing) / 1.00)"
    assert browser.value("location.hash") == "#q=0&t=1"
    browser.press("Escape")
    assert pinned(browser) == []
    assert browser.value("location.hash") == "#q=0"


def test_tokens_are_reached_with_keys(show):
    browser = show(small_trace())
    browser.value("document.querySelector('#queries').focus()")
    for _ in range(3):  # the next query, the prompt, the first token
        browser.press("Tab")
    assert texts(browser, ":focus") == ["yes"]
    browser.press("ArrowRight")
    assert texts(browser, ":focus") == ["no"]
    assert colours(browser, ".token")[0] == "rgb(var(--opposing) / 1.00)"
    browser.press("Enter")
    assert pinned(browser) == ["no"]


def test_a_training_token_lights_what_it_moves_in_the_answer(show):
    browser = show(small_trace())
    browser.point(".token", 0)
    assert colours(browser, ".chip") == ["rgb(var(--helpful) / 1.00)", "rgb(var(--opposing) / 0.62)"]
    assert texts(browser, "#tip p") == [
        "Say", "+0.250 on the answer", "+0.500 on “yes”", f"{MINUS}0.250 on “no”", "token 1, not trained on",
    ]  # fmt: skip
    browser.point(".figure", 0)
    assert colours(browser, ".chip") == ["rgb(var(--helpful) / 1.00)", "rgb(var(--opposing) / 0.46)"]
    browser.point("h1")
    assert colours(browser, ".chip") == ["", ""]


def test_each_example_can_have_its_own_scale(show):
    browser = show(small_trace())
    browser.point("#scale", click=True)
    assert set(colours(browser, ".token")) == {"rgb(var(--helpful) / 1.00)", "rgb(var(--opposing) / 1.00)"}


def test_what_was_found_is_said(show):
    browser = show(small_trace())
    said = browser.value("document.body.innerText")
    for words in (
        "2 of 2 tokens at p ≥ 0.5", "The best example stands above the null.", "90% are among the exact best",
        "--top 5: only 2 rows can be ranked.", "z 4.90", "above all 4", "generic", "id1", "web", "exact +0.500",
        "cosine of gradients, by the index' vectors", "1,234", "tiny",
        "4.50 to 5.00, by a query's length: 19 of 20 stay below",
    ):  # fmt: skip
        assert words in said
    assert browser.value("document.querySelectorAll('.null svg rect').length") == 3
    assert texts(browser, ".clears") == ["z 4.90"]


def test_the_picker_goes_from_query_to_query(show):
    browser = show(small_trace())
    browser.point("#next-query", click=True)
    assert browser.value("document.querySelector('#queries').selectedIndex") == 1
    assert browser.value("location.hash") == "#q=1"
    assert browser.value("getComputedStyle(document.querySelector('.answer')).direction") == "rtl"
    browser.point(".chip", 1, click=True)
    assert texts(browser, ".figure") == ["+0.00500of +0.020"]
    assert browser.value("document.querySelector('#next-query').disabled")


def test_tokens_outside_a_span_are_pale_and_those_of_a_contrast_are_asked(show):
    asked = answer(
        [" a", " b"], asked=[False, True], contrast=" c", contrast_tokens=[" c"], contrast_probabilities=[0.25]
    )
    tokens = matrix([[0.5], [-0.25]], [" b", " c"], ["t"])
    browser = show(Trace([asked], [hit(1, 0.25, {"text": "t"}, tokens=tokens)], "dot", 1), "#t=1")
    assert texts(browser, ".not-asked") == ["a"]
    assert texts(browser, ".chip[role=button]") == ["b", "c"]
    assert pinned(browser) == ["c"]
    assert texts(browser, ".figure b") == [f"{MINUS}0.250"]


def test_scores_that_are_no_influence_are_not_called_so(show):
    browser = show(Trace([answer([" a"])], [hit(1, 7.5, {"text": "t"})], "bm25", 3))
    said = browser.value("document.body.innerText")
    assert "Highest\nBy likeness, which is not influence." in said
    assert "makes the answer more likely" not in said
    assert "words in common" in said
    assert texts(browser, "[role=button]") == []


def test_lowest_examples_that_do_not_oppose_are_called_lowest(show):
    rows = [hit(1, 0.5, {"text": "t"}), hit(-1, 0.1, {"text": "t"}), hit(-2, 0.2, {"text": "t"})]
    browser = show(Trace([answer([" a"])], rows, "dot", 3))
    assert texts(browser, "main h2")[1] == "LowestNone of these opposes the answer."
    browser = show(Trace([answer([" a"])], [*rows, hit(-3, -0.2, {"text": "t"})], "dot", 4))
    heads = ["OpposingTraining on these makes the answer less likely.", "LowestNone of these opposes the answer."]
    assert texts(browser, "main h2")[1:] == heads
    assert texts(browser, "main section:nth-child(2) .rank") == [f"{MINUS}3"]


def test_a_long_example_is_an_excerpt_until_it_is_unfolded(show):
    train = [" word"] * 10_000
    values = torch.full((1, 10_000), 1e-4)
    values[0, 7123] = 0.5
    tokens = TokenMatrix("position", ["q"], train, [True] * 10_000, values)
    browser = show(Trace([answer(["q"])], [hit(1, 0.5, {"text": "".join(train)}, tokens=tokens)], "dot", 1))
    assert browser.value("document.querySelectorAll('.token').length") == 200
    assert "rgb(var(--helpful) / 1.00)" in colours(browser, ".token")
    assert texts(browser, ".rest") == ["⋯ 7,056 tokens before ⋯", "⋯ 2,744 tokens after ⋯"]
    assert "linear-gradient" in browser.value("document.querySelector('.strip').style.backgroundImage")
    move = "range => { range.value = 0; range.dispatchEvent(new Event('input')); }"
    browser.value(f"({move})(document.querySelector('.strip input'))")
    assert texts(browser, ".rest") == ["⋯ 9,800 tokens after ⋯"]
    began = time.monotonic()
    browser.value("document.querySelector('.box > button').click()")
    browser.settle()
    assert browser.value("document.querySelectorAll('.token').length") == 10_000
    assert time.monotonic() - began < 5
    assert texts(browser, ".box > button") == ["Show less"]


def test_text_of_a_hundred_thousand_lines_is_shown(show):
    browser = show(Trace([answer([" a"])], [hit(1, 0.5, {"text": "\n" * 100_000 + "end"})], "dot", 1))
    assert browser.value("document.documentElement.dataset.ready") == "yes"
    assert browser.value("document.querySelector('.text.folded').clientHeight") < 300


def test_a_telephone_needs_no_sideways_scrolling(show):
    unbroken = "x" * 900
    tokens = matrix([[0.5, 0.5]], [unbroken], [unbroken, unbroken])
    found = Trace(
        [answer([unbroken], prompt=unbroken)] * 2,
        [
            hit(1, 0.5, {"text": unbroken}, tokens=tokens, id=unbroken, source=unbroken),
            hit(2, 0.4, {"prompt": unbroken, "completion": unbroken}, null=Null([0.1], 0.1, 1.0, 50.0, True)),
        ],
        "dot",
        1,
        verdicts=[unbroken] * 2,
        notes=[unbroken],
        settings={unbroken: unbroken},
    )
    for fragment in ("", "#t=0"):
        browser = show(found, fragment, width=360)
        assert browser.value("document.documentElement.scrollWidth") <= 360


def test_newlines_of_tokens_break_lines_and_stay_visible(show):
    browser = show(Trace([answer(["a", "\n", "b", ""])], [], "dot", 1))
    a, newline, b, _ = browser.value(
        "[...document.querySelectorAll('.chip')].map(chip => chip.getBoundingClientRect().top)"
    )
    assert a == newline < b
    for name, mark in (("newline", '"↵"'), ("empty", '"∅"')):
        assert browser.value(f"getComputedStyle(document.querySelector('.chip .{name}'), '::before').content") == mark


def test_numbers_that_are_none_are_shown_as_such(show):
    tokens = matrix([[math.nan, 1.0]], ["a"], ["x", "y"])
    null = Null([], math.nan, math.nan, math.nan, False)
    rows = [hit(1, math.nan, {"text": "t"}, tokens=tokens, null=null), hit(2, 0.5, {"text": "t"}, exact=math.inf)]
    browser = show(Trace([answer(["a"], probabilities=[math.nan])], rows, "dot", 2), "#t=0")
    assert not browser.errors()
    assert texts(browser, ".figure b") == ["n/a", "n/a"]


def test_an_empty_trace_is_a_page(show):
    browser = show(Trace([], [], "dot", 0))
    assert browser.value("document.documentElement.dataset.ready") == "yes"
    assert not browser.errors()
