"""The page of a recovery: its numbers are those of the recovery, and what a corpus says stays text."""

import base64
import hashlib
import html
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from test_trace_page import HOSTILE, IS_OWNED

from whence.recovery.membership import Calibration, logit
from whence.recovery.pipeline import Recovered, p_values_of
from whence.recovery.shadow_calibration import Learned
from whence.recovery.shadow_model import Recipe, Shadow
from whence.reports.recover_page import recover_page
from whence.reports.svg import MINUS

EVERY = " ".join(HOSTILE)


def layer(name, norm, noise=0.01, **changes):
    signal = norm / noise if noise else math.inf
    found = {"name": name, "shape": (4, 4), "norm": norm, "relative": norm / 10, "unchanged": 0.25, "noise": noise}
    return found | {"cosine": 1.0, "signal": signal if norm else 0.0, "carries_signal": norm > noise} | changes


def learned(odds, **changes):
    """Of three features; `odds` are those of rows that the shadow was not trained on."""
    weights = torch.tensor([0.25, -1.5, 0.75]).double()
    calibration = Calibration(("part", "loss at final", "cosine at final"), weights, -2.0, 0.5, 3.0, odds.double())
    shadow = Shadow("run", Recipe(rows=50, optimizer="sgd", lr=0.1), 1.0, 0.1)
    known = {"members": 50, "kept": 1.0, "others": odds.float(), "member_odds": odds.float() + 4}
    return Learned(shadow, calibration, **known | changes)


def recovered(count=20, size=200, share=0.1, **changes):
    """Log odds of all rows and of a null are drawn; the calibration was made at another share of members."""
    random = torch.Generator().manual_seed(0)
    odds, null = torch.randn(size, generator=random) * 2 - 1, torch.randn(300, generator=random) * 2 - 2
    odds[count:] -= 2
    scores, p_values = (odds + logit(share) - logit(0.5)).sigmoid(), p_values_of(odds, null)
    numbers = scores.argsort(descending=True)[:count].tolist()
    chosen = [
        {"id": f"r{n}", "source": "ab"[n % 2], "prompt": f"asked {n}", "completion": f" said {n}",
         "whence_score": float(scores[n]), "whence_p": float(p_values[n]), "whence_weight": n / 1000}
        for n in numbers
    ]  # fmt: skip
    found = Recovered(
        rows=chosen, numbers=numbers, scores=scores, p_values=p_values, notes=["The head did not move."],
        mixture=[{"source": "b", "share": 0.39, "low": 0.35, "high": 0.43, "tokens": 0.5, "tokens_low": 0.4,
                  "tokens_high": 0.6},
                 {"source": "a", "share": 0.61, "low": 0.57, "high": 0.65, "tokens": 0.5, "tokens_low": 0.4,
                  "tokens_high": 0.6}],
        layers=[layer("h.0.up.weight", 0.125), layer("h.1.up.weight", 0.5), layer("norm.weight", 0.001),
                layer("head.weight", 0.0, noise=0.0)],
        settings={"method": "calibrated", "base": "before", "final": "after", "corpus": "pool.jsonl",
                  "shadow": "50 rows, 2 epochs, sgd at 0.1; it moved 1.00 times as far"},
        learned=learned(null), null=null + logit(share) - logit(0.5),
    )  # fmt: skip
    return replace(found, **changes)


def words(page):
    """What a reader reads, with one space between any two parts."""
    body = page[page.index("<body>") :].replace("<wbr>", "")
    return html.unescape(" ".join(re.sub(r"<svg.*?</svg>|<[^>]*>", " ", body, flags=re.DOTALL).split()))


def picks(page):
    """Every shown row: its rank, its text, and the facts about it."""
    parts = re.findall(r'<div class="pick">(.*?)(?=<div class="pick">|</section>)', page, re.DOTALL)
    return [words(f"<body>{part}") for part in parts]


def bar_widths(page, kind):
    return [float(width) for width in re.findall(rf'<rect class="{kind}" x="0" y="\d+" width="([\d.]+)"', page)]


# -- numbers


def test_rows_stand_with_their_own_numbers():
    found = recovered()
    shown = picks(recover_page(found))
    places = [*range(10), *range(15, 20)]
    assert len(shown) == len(places), "the first 10 and the last 5"
    for place, told in zip(places, shown, strict=True):
        row, number = found.rows[place], found.numbers[place]
        assert told == (
            f"{place + 1} asked {number} said {number} {row['whence_score']:.1%} "
            f"p {row['whence_p']:.2g} · weight {row['whence_weight']:.2g} {row['source']} · row {number + 1}"
        )


@pytest.mark.parametrize(("count", "shown", "between"), [(3, 3, None), (12, 12, None), (15, 15, None), (17, 15, 2)])
def test_no_row_is_shown_twice(count, shown, between):
    page = recover_page(recovered(count))
    ranks = [int(told.split()[0]) for told in picks(page)]
    assert len(ranks) == len({*ranks}) == shown and ranks[-1] == count
    assert ("Last of them" in page) == (count > 10)
    assert (f"after {between} more" in page) == (between is not None)


def test_the_lead_the_notes_and_the_facts_are_told():
    found = recovered()
    told = words(recover_page(found, "whence recover before after 'my pool.jsonl'"))
    right, members = float(found.scores[found.numbers].sum()), float(found.scores.sum())
    assert f"20 of 200 rows by calibrated. Trained on: about {right:.0f} of them, {members:.0f} in all." in told
    assert f"a model trained here on known rows: {found.settings['shadow']}. The head did not move." in told
    for fact in (
        "corpus pool.jsonl",
        "calibration 50.0% of its rows trained on, ridge 3",
        "command whence recover before after 'my",
    ):
        assert fact in told
    assert "command" not in words(recover_page(found))


def test_the_mixture_comes_first_with_its_intervals():
    found = recovered()
    page = recover_page(found)
    counts = {name: sum(row["source"] == name for row in found.rows) for name in "ab"}
    told = words(page)
    assert f"a 61% (57 to 65) {counts['a']} ({counts['a'] / 20:.0%}) b 39% (35 to 43) {counts['b']}" in told
    assert told.index("by source") < told.index("First of the rows found")
    widths = [float(width) for width in re.findall(r'<rect class="share" x="0" y="2" width="([\d.]+)"', page)]
    assert widths == pytest.approx([100 * 0.61 / 0.65, 100 * 0.39 / 0.65], abs=0.01)
    ends = re.findall(r'class="whisker" d="M([\d.]+) 4V12M([\d.]+)', page)
    assert [float(end) for end in ends[0]] == pytest.approx([100 * 0.57 / 0.65, 100], abs=0.01)


def test_many_sources_are_summed_up():
    mixture = [{"source": f"s{n}", "share": 0.02, "low": 0.0, "high": 0.05} for n in range(50)]
    told = words(recover_page(recovered(mixture=mixture)))
    assert "30 more sources have 60% together." in told and "s19" in told and "s20" not in told


def test_a_mixture_without_intervals_is_drawn_without_whiskers():
    mixture = [{"source": "a", "share": 1.0, "low": math.nan, "high": math.nan},
               {"source": "b", "share": 0.0, "low": math.nan, "high": math.nan}]  # fmt: skip
    page = recover_page(recovered(mixture=mixture))
    assert "100% (- to -)" in words(page) and 'class="whisker"' not in page


def test_layers_that_moved_the_most_stand_over_their_rounding():
    page = recover_page(recovered())
    told = words(page)
    assert "h.1.up.weight 0.5 50 times 5.00% 25% h.0.up.weight 0.125 12 times 1.25% 25% norm.weight 0.001 0.1" in told
    assert "1 of 4 parameters did not move at all; 1 moved no more than rounding does." in told
    table = page[page.index("What moved the most") :]
    assert bar_widths(table, "chosen") == [100, 25, 0.3] and bar_widths(table, "pool") == [2, 2, 2]
    many = [layer(f"h.{n}.weight", 1.0 + n) for n in range(30)]
    told = words(recover_page(recovered(layers=many)))
    assert "All parameters moved. 18 more moved less than these." in told and "h.29.weight" in told
    assert "h.17.weight" not in told
    exact = [layer("bias", 0.5, noise=0.0, relative=None)]
    assert "bias 0.5 - - 25%" in words(recover_page(recovered(layers=exact)))
    assert "What moved" not in recover_page(recovered(layers=[]))


def test_the_calibration_tells_what_it_went_by():
    page = recover_page(recovered())
    assert f"loss at final {MINUS}1.50 cosine at final +0.75 part +0.25" in words(page)
    bars = re.findall(r'<rect class="(chosen|against)" x="([\d.]+)" y="0" width="([\d.]+)" height="7"/><line', page)
    assert bars == [("against", "0.00", "50.00"), ("chosen", "50.00", "25.00"), ("chosen", "50.00", "8.33")]


# -- the histogram


def histogram(page):
    """Areas of the rows found and of all others, as shares; and the picture."""
    picture = page[page.index('<svg class="scores"') :].split("</svg>")[0]
    sides = [
        {float(x): float(tall) for x, tall in re.findall(rf'"{kind}" x="(.*?)".*?height="(.*?)"', picture)}
        for kind in ("chosen", "pool")
    ]
    whole = {x: sum(side.get(x, 0.0) for side in sides) for side in sides for x in side}
    squares = sum(tall**2 for tall in whole.values())
    return [sum(tall * whole[x] for x, tall in side.items()) / squares for side in sides], picture


def test_a_histogram_shows_shares_and_where_the_choice_ends():
    found = recovered()
    areas, picture = histogram(recover_page(found))
    assert areas == pytest.approx([0.1, 0.9], abs=0.01)
    assert f"found from {found.rows[-1]['whence_score']:.1%}" in picture
    assert 'class="null"' in picture and ">10%<" in picture


def test_without_a_null_none_is_drawn():
    found = recovered(null=None)
    page = recover_page(found)
    assert 'class="null"' not in page and "known not to be trained on" not in page


def test_rows_without_evidence_are_counted_and_break_nothing():
    found = recovered()
    scores = found.scores.clone()
    scores[[n for n in range(200) if n not in found.numbers][:3]] = torch.tensor([math.nan, -math.inf, math.inf])
    p_values = found.p_values.clone()
    p_values[~scores.isfinite()] = math.nan
    page = recover_page(replace(found, scores=scores, p_values=p_values))
    assert "3 rows are without evidence." in page and "nan" not in words(page).lower()
    assert not re.search(r'="[^"]*(nan|inf)\b', page)
    areas, _ = histogram(page)
    assert areas == pytest.approx([20 / 197, 177 / 197], abs=0.01)
    none = replace(found, scores=torch.full((200,), -math.inf), rows=[], numbers=[])
    assert "No row has evidence." in recover_page(replace(none, learned=None))
    assert "200 rows are without evidence." in recover_page(none)


def test_certain_rows_and_hopeless_ones_have_a_place():
    found = recovered()
    scores = found.scores.clone()
    scores[found.numbers[0]], scores[next(n for n in range(200) if n not in found.numbers)] = 1.0, 0.0
    rows = [found.rows[0] | {"whence_score": 1.0}, *found.rows[1:]]
    page = recover_page(replace(found, scores=scores, rows=rows))
    assert "over 99.9%" in picks(page)[0] and not re.search(r'="[^"]*(nan|inf)\b', page)


def test_scores_that_are_no_probabilities_are_not_called_so():
    scores = torch.linspace(-3, 7, 200)
    numbers = scores.argsort(descending=True)[:20].tolist()
    rows = [{"text": "t", "whence_score": float(scores[n]), "whence_p": 0.5} for n in numbers]
    found = recovered(scores=scores, rows=rows, numbers=numbers, learned=None, mixture=[], notes=[],
                      settings={"method": "p_min"})  # fmt: skip
    page = recover_page(found)
    told = words(page)
    assert "20 of 200 rows by p_min. First of the rows found" in told, "no mixture, no notes"
    assert "Score of all rows" in told and "robability" not in told and "calibration" not in told
    assert picks(page)[0] == f"1 t 7 p 0.5 row {numbers[0] + 1}"
    areas, picture = histogram(page)
    assert areas == pytest.approx([0.1, 0.9], abs=0.01)
    assert f">{MINUS}3<" in picture and "found from 6.05" in picture and 'class="null"' not in picture


def test_nothing_found_is_a_page():
    page = recover_page(recovered(count=0))
    assert "0 of 200 rows" in page and not picks(page) and "found from" not in page
    assert "a 61% (57 to 65) 0 " in words(page)
    same = recovered(0, scores=torch.full((200,), 0.5), p_values=torch.ones(200), null=None)
    assert "All are 50.0%." in recover_page(same)


# -- what a corpus says


def hostile():
    rows = [
        {"prompt": EVERY, "completion": EVERY, "source": EVERY},
        {"text": EVERY, "source": EVERY},
        {"messages": [{"role": EVERY, "content": EVERY}, {"role": "a", "content": EVERY}], "source": EVERY},
        {"instruction": EVERY, "input": EVERY, "output": EVERY},
    ]
    rows = [row | {"whence_score": 0.5, "whence_p": 0.1, "whence_weight": math.nan} for row in rows]
    found = recovered(4)
    calibration = replace(found.learned.calibration, names=(EVERY, HOSTILE[0], "cosine"))
    return replace(
        found,
        rows=rows,
        mixture=[line | {"source": EVERY} for line in found.mixture],
        layers=[layer(EVERY, 1.0)],
        notes=[EVERY],
        settings={"method": EVERY, "shadow": EVERY, EVERY: EVERY},
        learned=replace(found.learned, calibration=calibration),
    )


def test_the_file_allows_its_style_and_nothing_else():
    page = recover_page(recovered(), "whence recover https://example.org/a b c")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    allowed = dict(rule.split(" ", 1) for rule in policy.split("; "))
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert allowed["style-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"
    for name in ("default-src", "script-src", "base-uri", "form-action"):
        assert allowed[name] == "'none'"
    assert "<script" not in page and " style=" not in page, "the policy would not apply it"
    assert not re.search(r"(?i)\b(src|href|action)\s*=|@import|url\(|<link|<base", page)


def test_no_text_leaves_its_place():
    page = recover_page(hostile(), EVERY)
    tags = {tag.lower() for tag in re.findall(r"<\s*/?\s*([a-zA-Z!][^\s/>]*)", page)}
    assert tags <= {
        "!doctype", "html", "head", "meta", "title", "style", "body", "div", "header", "h1", "span", "main", "p",
        "section", "h2", "small", "table", "thead", "tbody", "tr", "th", "td", "wbr", "svg", "rect", "path", "line",
        "text", "b", "i", "dl", "dt", "dd", "footer",
    }  # fmt: skip
    for attributes in re.findall(r"<[a-z][^\s>]*([^>]*)>", page):
        assert not re.search(r"(?i)\s(on\w+|style|src|href)\s*=", attributes), attributes
    assert page.count("</title>") == page.count("</style>") == 1
    told = words(page)
    assert told.count(" ".join(EVERY.split())) >= 10


def test_text_is_writable_and_hides_nothing():
    odd = "tab\tline \x1b[2J\x07 \u202eturned \ud800."
    page = recover_page(replace(recovered(1), notes=[odd]))
    assert page.encode() and "\x1b" not in page and "\u202e" not in page and "\\u202eturned" in page


def test_long_rows_are_cut():
    found = recovered(1)
    row = found.rows[0] | {"completion": "x" * 5000}
    assert "x" * 600 + '<span class="rest"> … 4,400 more' in recover_page(replace(found, rows=[row]))


# -- the command


@pytest.fixture
def run(monkeypatch, command):
    """Run a command, in which recovering takes no time; its exit code, stdout and stderr."""
    asked = []
    monkeypatch.setattr("whence.cli.recovery.check_inputs", lambda **inputs: None)
    monkeypatch.setattr("whence.recovery.pipeline.recover", lambda *given, **more: asked.append(given) or recovered())

    return lambda *words: (*command(*words), asked)


def test_the_report_is_one_page(run, tmp_path):
    page = tmp_path / "my found.html"
    code, said, _, _ = run("recover", "before", "after", "pool.jsonl", "--count", 20, "--report", page)
    assert code == 0 and f"report written to {page}" in said
    assert page.read_text() == recover_page(
        recovered(), f"whence recover before after pool.jsonl --count 20 --report '{page}'"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["my found.html"]
    code, said, _, _ = run("recover", "before", "after", "pool.jsonl", "--report", tmp_path / "b.html", "--json")
    assert code == 0 and len(json.loads(said)["rows"]) == 20 and (tmp_path / "b.html").exists()


@pytest.mark.parametrize("name", ["found.pdf", "found", "no/found.html"])
def test_a_report_that_cannot_be_written_is_refused_before_any_work(run, tmp_path, name):
    code, said, complaint, asked = run("recover", "before", "after", "pool.jsonl", "--report", tmp_path / name)
    assert code == 2 and "--report" in complaint and not said and not asked


# -- in a browser


def test_nothing_runs_and_nothing_is_asked_for(browser, tmp_path):
    file = tmp_path / "found.html"
    file.write_text(recover_page(hostile(), EVERY), "utf-8")
    browser.open(file)
    browser.value("document.querySelectorAll('main *').forEach(node => node.click?.())")
    browser.settle()
    assert not browser.value(IS_OWNED)
    assert (
        browser.value("document.querySelectorAll('body :is(script, iframe, img, a, [onload], [onfocus])').length") == 0
    )
    assert HOSTILE[0] in browser.value("document.body.innerText")
    asked = [event["params"]["request"]["url"] for event in browser.events if "requestWillBeSent" in event["method"]]
    assert len(asked) == 1 and asked[0].startswith("file:")
    assert not browser.errors()


def test_a_telephone_needs_no_sideways_scrolling(browser, tmp_path):
    unbroken, file = "x" * 900, tmp_path / "found.html"
    odd = hostile()
    wide = replace(
        recovered(),
        mixture=[line | {"source": unbroken} for line in odd.mixture],
        notes=[unbroken],
        rows=[{"text": unbroken, "source": unbroken, "whence_score": 0.5, "whence_p": 0.1}] * 20,
        layers=[layer(unbroken, 1.0)],
        settings={"method": unbroken, unbroken: unbroken},
    )
    for found in (recovered(), odd, wide):
        file.write_text(recover_page(found, unbroken), "utf-8")
        for width in (400, 1200):
            browser.open(file, width=width)
            assert browser.value("document.documentElement.scrollWidth") <= width
            tables = "[...document.querySelectorAll('.scroll')].every(node => node.scrollWidth <= node.clientWidth + 1)"
            assert browser.value(tables)
            assert browser.broken() == []
            assert browser.value("getComputedStyle(document.querySelector('.share rect')).fill") != "rgb(0, 0, 0)"
