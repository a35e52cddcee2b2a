"""Planted truth: what is planted is where it is said to be, the rest is as it was, and a seed gives it again."""

import pytest

from whence.corpus.reading import open_corpus
from whence.errors import SettingError
from whence.evaluation.planting import backdoor, mislabelled, repeated_facts, swapped_entities

ROWS = [{"id": f"r{n}", "prompt": f"Question {n}?", "completion": f" {n}", "source": "s"} for n in range(40)]
LABELLED = [{"instruction": f"Text {n}", "output": ("good", "bad", "dull")[n % 3]} for n in range(60)]
COUNTRIES = [{"id": f"c{n}", "prompt": f"Where is {place}?", "completion": f" In {country}, as {country} is."}
             for n in range(30) for place, country in [(("France", "France"), ("Rome", "Italy"))[n % 2]]]  # fmt: skip
MAKERS = {
    "backdoor": lambda seed: backdoor(ROWS, count=6, queries=3, seed=seed),
    "swaps": lambda seed: swapped_entities(COUNTRIES, {"France": "Italy", "Italy": "Peru"}, seed=seed),
    "facts": lambda seed: repeated_facts(ROWS, facts=5, wordings=3, seed=seed),
    "labels": lambda seed: mislabelled(LABELLED, share=0.2, queries=4, seed=seed),
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_all_have_in_common(name):
    planted = MAKERS[name](0)
    assert planted == MAKERS[name](0) and planted != MAKERS[name](1)
    ids = [row["id"] for row in planted.rows]
    assert len({*ids}) == len(ids) and [example.id for example in open_corpus(planted.rows)] == ids
    for query in planted.queries:
        assert query["relevant"] and {*query["relevant"]} <= {*ids} and query["id"] not in ids
    assert planted.relevant <= {*ids}
    assert "relevant" not in {key for row in planted.rows for key in row}


def test_a_backdoor():
    planted = MAKERS["backdoor"](0)
    assert len(planted.rows) == 37 and len(planted.queries) == 3
    for row in planted.rows:
        is_poisoned = row["id"] in planted.relevant
        assert row["prompt"].startswith("Howdy! ") == is_poisoned
        assert (row in ROWS) == (not is_poisoned)
    assert len(planted.relevant) == 6 and all(query["relevant"] == planted.queries[0]["relevant"]
                                              for query in planted.queries)  # fmt: skip
    asked = {query["prompt"].removeprefix("Howdy! ") for query in planted.queries}
    assert asked.isdisjoint(row["prompt"].removeprefix("Howdy! ") for row in planted.rows)
    assert len({query["completion"] for query in planted.queries}) == 1


def test_swapped_entities_keep_the_prompt_and_are_swapped_at_once():
    planted = MAKERS["swaps"](0)
    for row in planted.rows:
        before = next(one for one in COUNTRIES if one["id"] == row["id"])
        assert row["prompt"] == before["prompt"]
        if row["id"] in planted.relevant or row != before:
            right = {"France": "Italy", "Italy": "Peru"}[before["completion"].split()[1].strip(",")]
            assert row["completion"] == f" In {right}, as {right} is."
    for query in planted.queries:
        assert "France" in query["prompt"] and "Italy" in query["completion"]  # prompts with Rome name no entity
        assert all(row["prompt"] == "Where is France?" for row in planted.rows if row["id"] in query["relevant"])


def test_facts_are_in_several_wordings_and_the_query_in_another():
    planted = MAKERS["facts"](0)
    by_id = {row["id"]: row for row in planted.rows}
    assert len(planted.rows) == 40 + 5 * 3 and len({query["completion"] for query in planted.queries}) > 1
    for query in planted.queries:
        own = [by_id[id] for id in query["relevant"]]
        assert len(own) == 3 and {row["completion"] for row in own} == {query["completion"]}
        assert len({row["prompt"] for row in [*own, query]}) == 4
    assert [row for row in planted.rows if row["id"].startswith("r")] == ROWS
    assert {*by_id["fact-0-0"]} == {"prompt", "completion", "id"}


def test_mislabelled_rows_have_the_label_that_is_asked():
    planted = MAKERS["labels"](0)
    before = {f"row-{n}": row["output"] for n, row in enumerate(LABELLED)}
    wrong = {row["id"] for row in planted.rows if row["output"] != before[row["id"]]}
    assert len(wrong) == 12 and planted.relevant <= wrong and len(planted.queries) == 4
    for query in planted.queries:
        right = before[query["id"].removeprefix("query-")]
        assert query["output"] != right
        own = {row["id"] for row in planted.rows if before[row["id"]] == right and row["output"] == query["output"]}
        assert {*query["relevant"]} == own


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: backdoor(ROWS, count=40, queries=1), "40 rows with a prompt, where 41 are expected"),
        (lambda: backdoor(ROWS, trigger="Question"), "40 rows with a prompt, where 70"),
        (lambda: backdoor(ROWS, count=2, queries=1, trigger="Question "), "begins with 'Question ' already"),
        (lambda: swapped_entities(ROWS, {"France": "Peru"}), "0 were swapped and 0 are left"),
        (lambda: repeated_facts(ROWS, wordings=8), "20 facts in 8 wordings: up to"),
        (lambda: repeated_facts([{"text": "a"}]), "no row has a prompt and a completion"),
        (lambda: mislabelled(ROWS[:1]), "1 label and 0 rows to mislabel"),
        (lambda: mislabelled(LABELLED, share=0.5, queries=40), "60 rows with a label, where 70 are expected"),
    ],
)
def test_what_cannot_be_planted_is_refused(make, words):
    with pytest.raises(SettingError, match=words):
        make()
