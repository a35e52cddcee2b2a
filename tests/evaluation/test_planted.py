"""The corpus of the planted benchmark: three plants in different rows, each whole, and queries of each."""

from benchmarks.evaluate.planted import planted

from conftest import write_jsonl

ROWS = [{"id": f"a{n}", "instruction": f"Tell me of {place} {n}.", "input": "", "output": f"It is {place}, number {n}."}
        for n in range(200) for place in [("France", "cheese", "India", "bread")[n % 4]]]  # fmt: skip


def test_plants_do_not_disturb_each_other(tmp_path):
    (tmp_path / "instruct").mkdir()
    write_jsonl(tmp_path / "instruct" / "alpaca.jsonl", ROWS)
    made = planted(tmp_path, 150, 8, 0)
    by_id = {row["id"]: row for row in made.rows}
    assert len(by_id) == len(made.rows) and {*made.queries} == {"swap", "backdoor", "facts"}
    found = {kind: {id for query in queries for id in query["relevant"]} for kind, queries in made.queries.items()}
    assert found["swap"].isdisjoint(found["backdoor"]) and all(queries for queries in made.queries.values())
    for kind, ids in found.items():
        for id in ids:
            row = by_id[id]
            assert row["instruction"].startswith("Howdy! ") == (kind == "backdoor")
            if kind == "swap":
                assert row["output"].split()[2] in ("Chile,", "Iceland,")
    asked = {query["id"].removeprefix("query-") for queries in made.queries.values() for query in queries}
    assert asked.isdisjoint(by_id)
    assert len(made.queries["facts"]) == 8 and len(found["facts"]) == 32
