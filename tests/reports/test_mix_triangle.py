"""The triangle of mixtures on a law's page, in a real browser: what it reads out is what the law predicts."""

import re

import numpy as np
import pytest
from test_mix_page import fitted
from test_trace_page import HOSTILE

from whence.mixing.pipeline import mix_law
from whence.mixing.tables import MixtureTable
from whence.reports.mix_page import mix_page
from whence.reports.mix_triangle import MOST_NUMBERS, STEPS, grids, nodes
from whence.reports.svg import MINUS


def shown(browser):
    """Shares at the corners, the sentence, and the losses read here, by set."""
    shares = browser.value("[...document.querySelectorAll('#try .sliders output')].map(box => box.textContent)")
    losses = browser.value(
        "[...document.querySelectorAll('#try .numbers tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    words = browser.value("document.querySelector('#try .found').textContent")
    return [float(share.rstrip("%")) / 100 for share in shares], words, losses


def open_page(browser, tmp_path, result, **options):
    file = tmp_path / "mix.html"
    file.write_text(mix_page(result), encoding="utf-8")
    browser.open(file, **options)


def slide(browser, corner, count):
    browser.value(
        f"(slider => {{ slider.value = {count}; slider.dispatchEvent(new Event('input')); }})"
        f"(document.querySelectorAll('#try input')[{corner}])"
    )
    browser.settle()


@pytest.mark.parametrize("law", ["exp", "ridge"])
def test_it_reads_what_the_law_predicts(browser, tmp_path, law):
    result = fitted(law)
    open_page(browser, tmp_path, result)
    corners = grids(result)[0]["corners"]
    for corner, count in ((0, 0), (0, 7), (2, STEPS), (1, 3)):
        slide(browser, corner, count)
        shares, words, losses = shown(browser)
        mixture = np.zeros((1, 3))
        mixture[0, corners] = np.round(np.array(shares) * STEPS) / STEPS
        predicted = result.law.predict(mixture)[0]
        assert [float(line[1].replace(MINUS, "-")) for line in losses] == pytest.approx(
            predicted.tolist(), abs=6e-4, rel=6e-4
        )
        stated = float(re.search(r"mean loss ([^,]+),", words)[1].replace(MINUS, "-"))
        assert stated == pytest.approx(float(predicted @ result.weights), abs=6e-4, rel=6e-4)
        cap = [f"d0 is above its cap of {100 * result.caps['d0']:.1f}%." in words]
        assert cap == [mixture[0, 0] > result.caps["d0"] + 5e-4]
    assert browser.errors() == []


def test_it_opens_on_the_suggestion_itself(browser, tmp_path):
    """Which lies between the nodes of the grid, here exactly at a cap."""
    result = fitted(caps={"d0": 0.33})
    open_page(browser, tmp_path, result)
    shares, words, losses = shown(browser)
    corners = grids(result)[0]["corners"]
    assert shares == pytest.approx(result.best.mixture[corners].tolist(), abs=6e-4)
    assert words.endswith("as that of the suggested mixture.") and {line[3] for line in losses} == {"0.000"}
    for line, predicted in zip(losses, result.best.predicted.tolist(), strict=True):
        assert float(line[1].replace(MINUS, "-")) == pytest.approx(predicted, abs=6e-4, rel=6e-4)
    assert browser.value("document.querySelectorAll('#try circle.lowest').length") == 1


def test_a_press_on_a_corner_is_that_domain_alone(browser, tmp_path):
    result = fitted(caps={})
    open_page(browser, tmp_path, result)
    x, y = browser.value(
        "(point => [point.x, point.y])(new DOMPoint(24, 372)"
        ".matrixTransform(document.querySelector('#try svg').getScreenCTM()))"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x + 3, y=y + 1, button="left", clickCount=1)
    browser.settle()
    assert shown(browser)[0] == [0, 1, 0]
    assert "was tried." in shown(browser)[1]


def test_the_keyboard_moves_it(browser, tmp_path):
    open_page(browser, tmp_path, fitted())
    browser.value("document.querySelector('#try input').focus()")
    browser.press("End")
    assert shown(browser)[0] == [1, 0, 0]
    browser.press("Home")
    assert shown(browser)[0][0] == 0 and sum(shown(browser)[0]) == pytest.approx(1, abs=2e-3)


def many(domains, sets, rows=40):
    draw = np.random.default_rng(0)
    mixtures = draw.dirichlet(np.ones(domains), rows)
    losses = 3 + np.exp(mixtures @ draw.normal(size=(domains, sets)))
    names = tuple(f"d{number} {HOSTILE[number % len(HOSTILE)]}" for number in range(domains))
    return MixtureTable(
        mixtures=mixtures, losses=losses, domains=names, sets=tuple(f"s{number}" for number in range(sets)),
        row_names=tuple(f"row {number}" for number in range(rows)),
    )  # fmt: skip


def test_other_domains_keep_their_suggested_shares(browser, tmp_path):
    result = mix_law(many(6, 2), law="ridge", folds=4)
    drawn = grids(result)
    for grid in drawn:
        others = np.delete(result.best.mixture, grid["corners"]).sum()
        assert grid["share"] + others == pytest.approx(1, abs=1e-4)
        mixture = result.best.mixture.copy()
        mixture[grid["corners"]] = grid["share"] * nodes()[5]
        assert grid["losses"][5] == pytest.approx(result.law.predict(mixture[None])[0].tolist(), rel=1e-4)
    open_page(browser, tmp_path, result)
    assert browser.value("document.querySelectorAll('#try option').length") == len(drawn) > 1
    browser.value(
        "(select => { select.value = 1; select.dispatchEvent(new Event('change')); })"
        "(document.querySelector('#try select'))"
    )
    assert sum(shown(browser)[0]) == pytest.approx(drawn[1]["share"], abs=2e-3)
    assert browser.errors() == [] and browser.value("window.HACKED === undefined")


def test_many_sets_make_no_endless_page():
    result = mix_law(many(6, 30), law="ridge", folds=4)
    assert sum(len(grid["losses"]) * 30 for grid in grids(result)) <= MOST_NUMBERS


def test_two_domains_have_no_triangle():
    assert 'id="try"' not in mix_page(mix_law(many(2, 2), law="exp", folds=4))


@pytest.mark.parametrize("width", [390, 700, 1280])
def test_nothing_breaks_at_any_width(browser, tmp_path, width):
    open_page(browser, tmp_path, fitted(), width=width)
    assert browser.broken() == []
