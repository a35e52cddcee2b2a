"""The page of an ablation: its numbers are those of the ablation, and names stay text."""

import html
import itertools
import json
import math
import re
from dataclasses import replace

import pytest
from test_recover_page import words
from test_trace_page import HOSTILE, IS_OWNED

from whence.ablation.candidates import Candidate
from whence.ablation.pipeline import Ablation, Cell
from whence.ablation.rank_agreement import Agreement
from whence.reports.ablate_page import ROWS, ablate_page
from whence.reports.svg import COLOURS, MINUS, REST

EVERY = " ".join(HOSTILE)
COST = {"pool tokens": 800_000.0, "candidates": 10.0, "tokens of training every candidate": 1_600_000.0,
        "break-even candidates": 4.5, "reading seconds": 12.0}  # fmt: skip


def agreement(spearman=0.9, **changes):
    found = Agreement(candidates=10, pearson=0.95, spearman=spearman, spearman_interval=(0.71, 0.97), kendall=0.8,
                      regret=0.012, spread=0.345)  # fmt: skip
    return replace(found, **changes)


def ablated(partitions="abcd", sets=("a", "z"), *, truth=True, mixtures=None, **changes):
    """Every partition alone and all pairs, unless mixtures are given; losses go by the number of candidate and set."""
    names = list(partitions)
    if mixtures is None:
        mixtures = [{name: 1.0} for name in names] + [{a: 0.5, b: 0.5} for a, b in itertools.combinations(names, 2)]
    candidates = [Candidate(" + ".join(weights), weights, float(len(weights))) for weights in mixtures]
    cells = [
        Cell(
            mixture=candidate.name, set=name, contained=name in candidate.weights, merged=2.0 + 0.05 * number + place,
            low=1.9 + 0.05 * number + place, high=2.1 + 0.05 * number + place, bits_per_byte=0.7 + 0.01 * number,
            mean=2.1 + 0.05 * number, mean_ppl=2.2, best=1.9, ngram=None, parent=2.12 + place,
            truth=1.5 + 0.03 * number + place if truth else None,
        )
        for place, name in enumerate(sets)
        for number, candidate in enumerate(candidates)
    ]  # fmt: skip
    by_proxy = {"merged": agreement(), "mean": agreement(0.42), "best": agreement(-0.1)}
    found = {
        name: {
            "all": by_proxy,
            "contained": {"merged": agreement(0.55, candidates=4)},
            "not contained": {"merged": agreement(0.3)},
        }
        for name in (*sets, "all sets")
    }
    made = Ablation(cells, candidates, found if truth else {}, COST, ["Merged losses rank mixtures."])
    return replace(made, **changes)


def lines(page):
    """Rows of the heat map: the name, then texts and classes of its cells."""
    body = page[page.index('<div class="heat">') :].split("</tbody>")[0].split("<tbody>")[1]
    found = {}
    for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL):
        name = re.search(r'<td class="name"[^>]*>(.*?)</td>', row)[1]
        found[html.unescape(name)] = re.findall(r'<td class="(n(?: [^"]*)?)"(?: title="[^"]*")?>(.*?)</td>', row)
    return found


def section(page, title):
    return next(part for part in page.split("<section>") if part.startswith(f"<h2>{title}"))


def test_the_heat_map_has_every_perplexity_and_marks_the_best():
    found = ablated()
    shown = lines(ablate_page(found))
    assert [*shown] == [candidate.name for candidate in found.candidates] + ["the parent"], "the best first"
    for number, candidate in enumerate(found.candidates):
        texts = [text for _, text in shown[candidate.name]]
        gained = f"{0.05 * number - 0.12:+.3f}".replace("-", MINUS)
        assert texts == [f"{math.exp(2 + 0.05 * number):.1f}", f"{math.exp(3 + 0.05 * number):.1f}", gained]
    kinds = [kinds for row in shown.values() for kinds, _ in row]
    assert [kind for kind in kinds if "best" in kind] == [kind for kind, _ in shown["a"][:2]]
    assert [text for _, text in shown["the parent"]] == [f"{math.exp(2.12):.1f}", f"{math.exp(3.12):.1f}"]


def test_colours_are_of_the_difference_from_the_parent():
    shown = lines(ablate_page(ablated()))
    kinds = [row[0][0].removesuffix(" best") for row in shown.values()]
    assert kinds[9] == "n above s10", "0.33 above the parent is the farthest"
    assert kinds[0] == "n below s6" and kinds[2] == "n below s2" and kinds[3] == "n above s3", "roots of shares"
    assert kinds[-1] == "n", "the parent has none"
    flat = ablated(sets=("a",), truth=False)
    flat = replace(flat, cells=[replace(cell, merged=cell.parent) for cell in flat.cells])
    assert {row[0][0].removesuffix(" best") for row in lines(ablate_page(flat)).values()} == {"n"}


def test_a_cell_tells_all_of_itself():
    page = html.unescape(ablate_page(ablated()))
    told = "b on a: 2.050 nats a token (1.950 to 2.150), the parent 2.120, difference −0.070; perplexity 7.8"  # noqa: RUF001
    assert f'title="{told}; trained for real 1.530 nats"' in page
    assert f'title="{told}"' in html.unescape(ablate_page(ablated(truth=False)))


def test_bits_stand_in_the_cells_where_they_are_asked_for():
    page = ablate_page(ablated(), bits=True)
    assert [text for _, text in lines(page)["b"][:2]] == ["0.710", "0.710"] and "Bits per byte of the merged" in page
    assert [text for _, text in lines(page)["the parent"]] == ["-", "-"]


def test_a_mixture_is_a_bar_of_its_shares():
    page = ablate_page(ablated(mixtures=[{"a": 0.25, "b": 0.75}, {"c": 1.0}, {"d": 1.0}]))
    bars = re.findall(r'<svg class="stack".*?</svg>', page)
    drawn = re.findall(r'x="([\d.]+)" y="0" width="([\d.]+)" height="10" fill="(.*?)"', bars[0])
    assert drawn == [("0.00", "25.00", COLOURS[0]), ("25.00", "75.00", COLOURS[1])]
    assert "<title>a 25.0%, b 75.0%</title>" in bars[0] and len(bars) == 3
    legend = page[page.index('<p class="legend-of">') :].split("</p>")[0]
    assert re.findall(r'fill="(.*?)".*?</svg>(.*?)</span>', legend) == [*zip(COLOURS[:4], "abcd", strict=True)]


def test_more_partitions_than_colours_are_put_together():
    names = [f"p{number}" for number in range(14)]
    mixtures = [{name: 1.0} for name in names] + [{"p13": 0.5, "p12": 0.5}]
    page = ablate_page(ablated(mixtures=mixtures, sets=("x",), truth=False))
    legend = page[page.index('<p class="legend-of">') :].split("</p>")[0]
    assert len(re.findall("fill=", legend)) == 10 and "5 others" in legend and ">p13<" in legend
    rest = [bar for bar in re.findall(r'<svg class="stack".*?</svg>', page) if REST in bar]
    assert len(rest) == 5 and "others 100.0%" in rest[0]


def test_many_mixtures_are_cut_and_it_is_said_but_none_that_is_best():
    mixtures = [{f"p{number % 20}": 0.4 + number / 1000, "q": 0.6 - number / 1000} for number in range(70)]
    found = ablated(mixtures=mixtures, sets=("x", "y"), truth=False)
    candidates = [replace(one, name=f"m{number}") for number, one in enumerate(found.candidates)]
    names = [one.name for one in candidates] * 2
    cells = [replace(cell, mixture=name) for cell, name in zip(found.cells, names, strict=True)]
    cells[69] = replace(cells[69], merged=1.0)  # the last is the best on x, and far worse on y
    cells[139] = replace(cells[139], merged=50.0)
    page = ablate_page(replace(found, candidates=candidates, cells=cells))
    assert [*lines(page)] == [*(f"m{number}" for number in range(ROWS)), "m69", "the parent"]
    assert "29 more mixtures of larger mean loss are not shown. -o FILE writes all." in words(page)
    assert "not shown" not in ablate_page(ablated())


def test_three_partitions_are_a_triangle():
    found = ablated("abc", truth=False)
    third = dict.fromkeys("abc", 1 / 3)
    found = ablated("abc", truth=False, mixtures=[*(one.weights for one in found.candidates), third])
    page = ablate_page(found)
    pictures = re.findall(r'<svg class="triangle".*?</svg>', page, re.DOTALL)
    assert len(pictures) == 2 and "<title>Mixtures of a, b, c on z</title>" in pictures[1]
    dots = re.findall(r'<circle class="point below s(\d+)" cx="(.*?)" cy="(.*?)".*?<title>(.*?) on a:', pictures[0])
    places = {name: (float(x), float(y), int(strength)) for strength, x, y, name in dots}
    (ax, ay, _), (bx, by, _), (cx, cy, _) = (places[name] for name in "abc")
    assert places["a + b"][:2] == pytest.approx(((ax + bx) / 2, (ay + by) / 2), abs=0.06)
    assert places["a + b + c"][:2] == pytest.approx(((ax + bx + cx) / 3, (ay + by + cy) / 3), abs=0.1)
    assert places["a"][2] == 10 and places["a + b + c"][2] == 1, "the lower the loss, the stronger"
    assert len(dots) == 7 and re.findall(r'class="ring" cx="(.*?)"', pictures[0]) == [f"{ax:.1f}"]
    assert ">best a<" in page and "perplexity 7.4 to 10.0" in page and 'class="legend-of"' not in page


@pytest.mark.parametrize("partitions", ["ab", "abcd"])
def test_others_are_none(partitions):
    page = ablate_page(ablated(partitions))
    assert "triangle" not in page[page.index("<body>") :] and 'class="legend-of"' in page


def test_what_is_known_of_three_only_is_a_triangle_even_of_a_larger_pool():
    mixtures = [{"a": 0.5, "b": 0.5, "d": 0.0}, {"c": 1.0}, {"a": 0.2, "b": 0.8}]
    assert 'class="triangle"' in ablate_page(ablated(mixtures=mixtures, truth=False))


def test_truth_is_drawn_against_the_merge():
    page = ablate_page(ablated())
    part = section(page, "Do merged losses rank")
    pictures = re.findall(r'<svg class="scatter".*?</svg>', part, re.DOTALL)
    heads = [words(f"<body>{head}") for head in re.findall(r"<figcaption>.*?</figcaption>", part)]
    assert heads == [f"{name} Spearman 0.90 (0.71 to 0.97) regret 0.012 · mean 0.42" for name in "az"]
    inside, outside = (re.findall(rf'<circle class="{kind}" cx="(.*?)" cy="(.*?)"', pictures[0])
                       for kind in ("inside", "outside"))  # fmt: skip
    assert (len(inside), len(outside)) == (4, 6), "alone and in three pairs"
    points = sorted((float(x), float(y)) for x, y in [*inside, *outside])
    steps = {(round(b[0] - a[0]), round(a[1] - b[1])) for a, b in itertools.pairwise(points)}
    assert steps == {(20, 20)} and points[0][0] == pytest.approx(34 + 200 * 0.06 / 1.12, abs=0.06)
    ring = re.findall(r'class="ring" cx="(.*?)" cy="(.*?)"', pictures[0])
    assert [(float(x), float(y)) for x, y in ring] == points[:1]
    assert f'y1="{points[0][1]:.1f}"' in re.search(r'<line class="least".*?/>', pictures[0])[0]
    assert re.findall('class="(?:inside)"', pictures[1]) == []


def test_without_truth_there_is_no_scatter():
    page = ablate_page(ablated(truth=False))
    body = page[page.index("<body>") :]
    assert "scatter" not in body and "Agreement" not in body and "trained for real" not in body
    assert "no mixture was trained." in body


def test_too_few_mixtures_are_drawn_without_a_correlation():
    page = ablate_page(ablated(agreements={}))
    assert "too few mixtures for a correlation" in page and "Agreement with" not in page


def test_agreement_is_told_by_set_and_group():
    part = section(ablate_page(ablated()), "Agreement with")
    rows = [words(f"<body>{row}") for row in re.findall(r"<tr.*?</tr>", part, re.DOTALL)]
    assert rows[0] == "evaluation set n merged 95% mean midpoint best ngram Pearson Kendall regret spread"
    assert rows[1] == f"a 10 0.90 0.71 to 0.97 0.42 - {MINUS}0.10 - 0.95 0.80 0.012 0.345"
    assert rows[2] == "contained 4 0.55 0.71 to 0.97 - - - - 0.95 0.80 0.012 0.345"
    assert rows[-2].startswith("all sets 10 0.90") and len(rows) == 7, "who is all is not told twice"
    assert '<path class="whisker" d="M71.00 8H97.00"/>' in part and '<path class="place" d="M90.00 8h0"/>' in part


def test_cost_notes_and_facts_are_told():
    told = words(ablate_page(ablated(), "whence ablate pool --eval held"))
    assert "10 mixtures on 2 evaluation sets" in told and "Merged losses rank mixtures." in told
    assert "10 mixtures were read in 12 s; the pool took 800,000 tokens of training, all mixtures would take " in told
    assert "1,600,000: the pool is cheaper from 5 mixtures on." in told
    assert "partitions a, b, c, d" in told and "command whence ablate pool --eval held" in told
    assert "cheaper" not in words(ablate_page(ablated(cost={})))


def test_what_is_not_finite_breaks_nothing():
    found = ablated()
    cells = [replace(cell, merged=math.inf, truth=math.nan) if number % 10 == 9 else cell
             for number, cell in enumerate(found.cells)]  # fmt: skip
    page = ablate_page(replace(found, cells=cells))
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page) and "nan" not in words(page).lower().replace("nats", "")


# -- names


def hostile(partitions):
    names = [f"{EVERY}{number}" for number in range(partitions)]
    sets = (names[0], f"{EVERY}z")
    return ablated(names, sets, notes=[EVERY])


@pytest.mark.parametrize("partitions", [3, 4])
def test_no_name_leaves_its_place(partitions):
    page = ablate_page(hostile(partitions), EVERY)
    tags = {tag.lower() for tag in re.findall(r"<\s*/?\s*([a-zA-Z!][^\s/>]*)", page)}
    assert tags <= {
        "!doctype", "html", "head", "meta", "title", "style", "body", "div", "header", "h1", "span", "main", "p",
        "section", "h2", "table", "thead", "tbody", "tr", "th", "td", "svg", "rect", "path", "line", "circle", "text",
        "figure", "figcaption", "b", "i", "dl", "dt", "dd", "footer",
    }  # fmt: skip
    for attributes in re.findall(r'<[a-z][^\s>]*((?:[^>"]|"[^"]*")*)>', page):
        bare = re.sub(r'"[^"]*"', '""', attributes)
        assert re.fullmatch(r'(\s[\w-]+="")*\s*/?|\s*charset="" */?', bare) or "lang" in bare, attributes
        assert not re.search(r"(?i)\s(on\w+|style|src|href)\s*=", bare), attributes
    assert page.count("</style>") == 1 and "<script" not in page
    assert words(page).count(" ".join(EVERY.split())) >= 10


def test_text_is_writable_and_hides_nothing():
    odd = "tab\tline \x1b[2J\x07 \u202eturned \ud800."
    page = ablate_page(ablated([odd, "b", "c"], (odd,)))
    assert page.encode() and "\x1b" not in page and "\u202e" not in page and "\\u202eturned" in page


# -- the command


@pytest.fixture
def run(monkeypatch, command):
    """Run a command, in which an ablation takes no time; its exit code, stdout, stderr, and what was asked."""
    asked = []
    monkeypatch.setattr("whence.cli.ablation.check_inputs", lambda **inputs: None)
    monkeypatch.setattr("whence.ablation.pipeline.ablate", lambda *given, **more: asked.append(given) or ablated())

    return lambda *words: (*command(*words), asked)


def test_the_report_is_one_page(run, tmp_path):
    page = tmp_path / "found.html"
    code, said, _, _ = run("ablate", "pool", "--eval", "held", "--report", page)
    assert code == 0 and "report written to" in said
    assert page.read_text() == ablate_page(ablated(), f"whence ablate pool --eval held --report {page}")
    code, said, _, _ = run("ablate", "pool", "--eval", "held", "--bits", "--report", page, "--json")
    assert code == 0 and len(json.loads(said)["rows"]) == 20 and "Bits per byte" in page.read_text()
    code, _, complaint, asked = run("ablate", "pool", "--eval", "held", "--report", tmp_path / "found.pdf")
    assert code == 2 and "--report" in complaint and len(asked) == 2


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_what_ablate_writes_is_a_table_for_a_mixing_law(run, tmp_path, ending):
    from whence.mixing.tables import read_mixture_table

    cells = tmp_path / f"cells.{ending}"
    assert run("ablate", "pool", "--eval", "held", "-o", cells)[0] == 0
    table, found = read_mixture_table(cells), ablated()
    assert table.domains == ("a", "b", "c", "d") and table.sets == ("a", "z") and table.column == "truth"
    shares = [[one.weights.get(name, 0.0) for name in "abcd"] for one in found.candidates]
    assert table.mixtures.tolist() == shares
    assert table.losses.T.ravel().tolist() == [cell.truth for cell in found.cells]
    code, said, complaint, _ = run("mix", "law", cells, "--law", "ridge", "--json")
    assert code == 0, complaint
    assert [row["domain"] for row in json.loads(said)["rows"]] == [*"abcd"]


def test_without_truth_the_law_is_of_merged_losses():
    from whence.mixing.pipeline import mix_law
    from whence.mixing.tables import read_mixture_table

    found = ablated(truth=False)
    table = read_mixture_table(found.rows())
    assert table.column == "merged" and table.losses[:, 0].tolist() == [cell.merged for cell in found.cells[:10]]
    assert any("which were not trained" in note for note in mix_law(found.rows(), law="ridge").notes)


# -- in a browser


def test_nothing_runs_and_a_telephone_needs_no_sideways_scrolling(browser, tmp_path):
    file = tmp_path / "found.html"
    for found in (hostile(3), hostile(4), ablated(["x" * 300, "b", "c"], ("y" * 300, "b"))):
        file.write_text(ablate_page(found, EVERY), "utf-8")
        for width in (400, 1200):
            browser.open(file, width=width)
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.broken() == []
        assert not browser.value(IS_OWNED)
        assert browser.value("document.querySelectorAll('body :is(script, iframe, img, a)').length") == 0
        fill = "getComputedStyle(document.querySelector('td.below')).backgroundColor"
        assert browser.value(fill) not in ("rgba(0, 0, 0, 0)", "rgb(0, 0, 0)")
    assert not browser.errors()
