"""The page of a mixing law: its numbers are those of the law, and names stay text."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from test_ablate_page import section
from test_mixing import planted, table_of
from test_recover_page import words
from test_trace_page import HOSTILE

from whence.mixing.pipeline import mix_law
from whence.reports.mix_page import POINTS, mix_page
from whence.reports.svg import MINUS, number

EVERY = " ".join(HOSTILE)


def fitted(law="exp", rows=24, **changes):
    table = table_of(planted(seed=5), rows, noise=0.01)
    return mix_law(table, law=law, folds=4, **({"caps": {"d0": 0.3}} | changes))


@pytest.fixture(scope="module")
def found():
    return fitted(targets={"s0": 1.0}, before={"s0": 3.0})


@pytest.fixture(scope="module")
def page(found):
    return mix_page(found, "whence mix law table.csv")


def rows(part):
    return [words(f"<body>{row}") for row in re.findall(r"<tr.*?</tr>", part.split("<tbody>")[1], re.DOTALL)]


def test_the_law_is_told_with_what_it_is_worth(found, page):
    told, whole = words(page), found.held_out.overall
    assert "exp law of 24 mixtures of 3 domains Graded on 4 held-out folds, on 2 evaluation sets: Spearman" in told
    assert f"Spearman {whole.spearman:.2f} (" in told and f"error {whole.error:.3f} (" in told
    assert found.notes and all(note in told for note in found.notes)
    assert "command whence mix law table.csv" in told and "caps d0 0.3" in told and "targets s0 1" in told


def test_suggested_shares_stand_beside_those_tried_and_caps(found, page):
    part = section(page, "The mixture that it suggests")
    lines = sorted(found.rows, key=lambda line: -line["suggested"])
    for told, line in zip(rows(part), lines, strict=True):
        shares = " ".join(f"{line[name]:.1%}" for name in ("suggested", "best_tried", "mean"))
        tried = f"{line['least_tried']:.0%} to {line['most_tried']:.0%}"
        assert told == f"{line['domain']} {shares} {tried}{' 30.0%' if line['domain'] == 'd0' else ''}"
    largest = max(line[name] for line in lines for name in ("suggested", "best_tried", "mean"))
    for kind, name in (("chosen", "suggested"), ("pool", "best_tried")):
        widths = [float(width) for width in re.findall(rf'<rect class="{kind}" .*?width="([\d.]+)"', part)]
        assert widths == pytest.approx([max(0.3, 100 * line[name] / largest) for line in lines], abs=0.01)
    assert re.findall(r'<path class="cap" d="M([\d.]+)', part) == [f"{30 / largest:.2f}"]
    assert f"a mean loss of {found.best.objective:.4g} of the suggested mixture" in words(f"<body>{part}")
    assert "cap" not in section(mix_page(fitted(caps={})), "The mixture that it suggests")


def test_points_are_held_out_predictions_and_measured_losses(found, page):
    part = section(page, "What it predicts")
    heads = [words(f"<body>{head}") for head in re.findall(r"<figcaption>.*?</figcaption>", part)]
    pictures = re.findall(r'<svg class="scatter".*?</svg>', part, re.DOTALL)
    for place, (name, head, drawn) in enumerate(zip(found.table.sets, heads, pictures, strict=True)):
        grade = found.held_out.sets[name]
        (low, high), (below, above) = grade.error_interval, grade.spearman_interval
        assert head == (
            f"{name} Spearman {grade.spearman:.2f} ({below:.2f} to {above:.2f}) "
            f"error {grade.error:.3f} ({low:.3f} to {high:.3f})"
        )
        told = re.findall(r"<title>row (\d+): predicted ([\d.]+), measured ([\d.]+)</title>", drawn)
        assert [(int(row), float(x), float(y)) for row, x, y in told] == [
            (row, round(found.held_out.predicted[row, place], 3), round(found.table.losses[row, place], 3))
            for row in range(24)
        ]
        circles = np.array(re.findall(r'<circle cx="(.*?)" cy="(.*?)"', drawn), dtype=float)
        errors = found.held_out.predicted[:, place] - found.table.losses[:, place]
        off = (circles[:, 0] - 34) - (214 - circles[:, 1])  # from the diagonal, in the picture's units
        assert np.corrcoef(off, errors)[0, 1] > 0.99


def test_many_points_are_thinned_and_it_is_said():
    found = fitted("ridge", rows=POINTS + 100)
    page = mix_page(found)
    assert f"{POINTS} of {POINTS + 100} mixtures are drawn." in page
    assert page.count("<circle") == 2 * POINTS and "<title>row" not in page
    assert "mixtures are drawn" not in mix_page(fitted())


def test_losses_are_told_by_set(found, page):
    part = section(page, "Losses on each set")
    for told, line in zip(rows(part), found.set_rows, strict=True):
        losses = " ".join(f"{line[name]:.3f}" for name in ("suggested", "mean", "best_tried"))
        assert told == f"{line['set']} {losses} {line['weight']:.0%}"
    assert part.count('class="unasked"') == 1, "s1 is not in the objective"


def test_constants_are_those_of_the_law(found, page):
    part = section(page, "The law's constants")
    for place, told in enumerate(rows(part)):
        law = found.law
        numbers = [number(float(value), ".3g") for value in (law.c[place], np.exp(law.b[place]))]
        numbers += [number(float(value), ".2f") for value in law.t[place]]
        assert told == " ".join([law.sets[place], *numbers])
    colours = re.findall(r'<td class="n (below|above)[^"]*" title="(.*?)"', part)
    assert all((kind == "below") == (MINUS in told.split(": ")[1]) for kind, told in colours) and len(colours) == 6


def test_ridge_tells_two_tables_and_trees_none(monkeypatch):
    found = fitted("ridge")
    page = mix_page(found)
    for name, values in (("u", found.law.u), ("v", found.law.v)):
        told = rows(section(page, f"The law's constants {name}"))[1]
        assert told.split()[2:] == [number(float(value), ".2f") for value in values[1]]
    monkeypatch.setattr("whence.mixing.simplex.DRAWS", 10_000)
    assert "constants" not in mix_page(fitted("lightgbm", rows=40))


def test_critical_ratios_are_told(found, page):
    told = rows(section(page, "Loss on s0 stays at 3 or below"))
    for line, (domain, ratio) in zip(told, found.critical["s0"].items(), strict=True):
        share = "none" if ratio.share is None else f"{ratio.side} {ratio.share:.1%}"
        assert line == f"{domain} {share} {ratio.reason}".strip()
    assert "stays at" not in mix_page(fitted())


def test_what_cannot_be_ranked_is_said():
    table = table_of(planted(seed=5), 24, noise=0.01)
    losses = table.losses.copy()
    losses[:, 1] = 2.0
    page = mix_page(mix_law(replace(table, losses=losses), folds=4))
    assert "s1 no rank correlation error 0.000" in words(page) and not re.search(r'="[^"]*\b(nan|inf)\b', page)


def test_no_name_leaves_its_place():
    table = table_of(planted(seed=5), 24, noise=0.01)
    names = tuple(f"{EVERY}{number}" for number in range(3))
    odd = replace(table, domains=names, sets=names[:2], row_names=tuple(f"{EVERY}{row}" for row in range(24)))
    page = mix_page(mix_law(odd, folds=4, caps={names[0]: 0.3}, before={names[0]: 3.0}), EVERY)
    page = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    tags = {tag.lower() for tag in re.findall(r"<\s*/?\s*([a-zA-Z!][^\s/>]*)", page)}
    assert tags <= {
        "!doctype", "html", "head", "meta", "title", "style", "body", "div", "header", "h1", "span", "main", "p",
        "section", "h2", "table", "thead", "tbody", "tr", "th", "td", "svg", "rect", "path", "line", "circle", "text",
        "figure", "figcaption", "b", "i", "dl", "dt", "dd", "footer", "label", "select",
    }  # fmt: skip
    assert page.count("</style>") == 1 and "<script" not in page and "<img" not in page
    assert words(page).count(" ".join(EVERY.split())) >= 6


def test_the_report_is_one_page(command, tmp_path):
    page, table = tmp_path / "law.html", table_of(planted(seed=5), 24, noise=0.01)
    rows = [
        {f"mixture/{name}": share for name, share in zip(table.domains, shares, strict=True)}
        | {f"loss/{name}": loss for name, loss in zip(table.sets, losses, strict=True)}
        for shares, losses in zip(table.mixtures.tolist(), table.losses.tolist(), strict=True)
    ]
    file = tmp_path / "table.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    code, said, _ = command("mix", "law", file, "--folds", 4, "--report", page)
    assert code == 0 and "report written to" in said
    told = words(page.read_text())
    assert "exp law of 24 mixtures of 3 domains" in told and f"command whence mix law {file} --folds 4" in told
    code, _, complaint = command("mix", "law", file, "--report", tmp_path / "law.txt")
    assert code == 2 and "--report" in complaint
