"""A row of a corpus that is given back as a query has the row's own tokens, and loses nothing in silence."""

import json

import pandas
import pytest

from conftest import save_tiny_llama, write_jsonl
from tiny_tokenizers import byte_level
from whence.corpus.layouts import layout
from whence.corpus.tokens import encode, encode_prompt, encode_query
from whence.errors import CorpusError, SettingError
from whence.indexing.build import index
from whence.models.loading import load_model
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query, encode_queries, queries_of

CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHAT = (
    "{{ bos_token }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}"
    "[{{ m.role[0] }}]{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def talk(*turns, **columns):
    return {"messages": list(turns), **columns}


ASKED, ANSWERED = turn("user", "q"), turn("assistant", "ok")
INSTRUCTION = {"instruction": "say", "output": "yes"}
EITHER = [
    {"prompt": "5 and 3?", "completion": " yes"},
    {"prompt": "", "completion": " yes"},
    {"prompt": "how many?", "completion": 7},
    INSTRUCTION,
    INSTRUCTION | {"input": "n"},
    INSTRUCTION | {"instruction": "", "input": "n"},
    INSTRUCTION | {"instruction": ""},
    INSTRUCTION | {"system": "Be."},
    INSTRUCTION | {"system": "Be.", "input": "n", "tools": TOOLS},
    INSTRUCTION | {"history": [["q", "a"], ["r", "b"]], "input": "n", "system": "Be."},
    INSTRUCTION | {"history": '[["q", "a"]]', "prompt": "another"},
    talk(ASKED, ANSWERED),
    talk(ASKED, ANSWERED, prompt="another", system="another"),
    talk(turn("system", "Be."), ASKED, ANSWERED),
    talk(ASKED, ANSWERED, ASKED, turn("assistant", "so", weight=1)),
    talk(turn("system", "Be."), ASKED, turn("assistant", "a", weight=0), turn("user", "r"), turn("assistant", "b")),
    talk(ASKED, ASKED, ANSWERED),
    talk(ASKED, turn("assistant", "one"), turn("assistant", "two")),
]
OF_A_TEMPLATE = [
    talk(turn("developer", "Be."), ASKED, ANSWERED),
    talk(ASKED, ANSWERED, tools=TOOLS),
    talk(ASKED, turn("assistant", "ok", tool_calls=CALLS)),
    talk(ASKED, turn("assistant", None, tool_calls=CALLS), tools=TOOLS),
    talk(ASKED, turn("assistant", "", tool_calls=CALLS)),
    talk(ASKED, turn("assistant", "ok", reasoning_content="so that")),
    talk(ASKED, turn("assistant", None, tool_calls=CALLS), turn("tool", "x", name="f"), turn("assistant", "b")),
    talk(ASKED, turn("assistant", "a", reasoning_content="t"), turn("user", "r"), ANSWERED),
]


def of_last_answer(encoded):
    """Where a row's last answer is supervised, and nothing before it."""
    supervised = encoded.supervised
    end = len(supervised) - supervised[::-1].index(True)
    start = end - supervised[:end][::-1].index(False)
    return [is_target and place >= start for place, is_target in enumerate(supervised)]


def as_query(row, tokenizer, kind):
    (query,) = queries_of([row])
    assert query.completion is not None
    return encode_query(query.prompt, query.completion, tokenizer, kind=kind, context=query.context)


@pytest.mark.parametrize("chat", [None, CHAT])
def test_a_row_given_back_has_its_own_tokens_and_asks_about_its_last_answer(chat):
    tokenizer = byte_level(bos=True, chat=chat)
    for row in [*EITHER, *(OF_A_TEMPLATE if chat else [])]:
        whole, query = encode(row, tokenizer), as_query(row, tokenizer, layout(row))
        assert query.ids == whole.ids, row
        expected = whole.supervised if len(answers(row)) == 1 else of_last_answer(whole)
        if row is EITHER[-1] and not chat:  # Alpaca writes two answers in a row without a mark between them
            expected = [*[False] * (len(whole.ids) - 4), *[True] * 4]
        assert query.supervised == expected, row


def answers(row):
    turns = [message for message in row.get("messages", []) if message["role"] == "assistant"]
    return turns or [row] * (1 + len(row.get("history") or []))


@pytest.mark.parametrize("chat", [None, CHAT])
def test_the_same_request_without_its_answer_is_the_beginning_of_the_row(chat):
    tokenizer = byte_level(bos=True, chat=chat)
    for row in [*EITHER[3:-1], *(OF_A_TEMPLATE if chat else [])]:
        turns = {"messages": row["messages"][:-1]} if "messages" in row else {"output": None, "prompt": None}
        (query,) = queries_of([row | turns])
        assert query.completion is None
        opened = encode_prompt(query.prompt, tokenizer, chat=True, context=query.context)
        whole = encode(row, tokenizer)
        assert opened == whole.ids[: of_last_answer(whole).index(True)], row


def test_what_a_corpus_cannot_hold_is_refused_in_a_line():
    calls = talk(ASKED, turn("assistant", "ok", tool_calls=CALLS))
    with pytest.raises(CorpusError, match="`tool_calls`, and the tokenizer has no chat template"):
        as_query(calls, byte_level(), "messages")
    with pytest.raises(CorpusError, match="the role 'developer'"):
        as_query(talk(turn("developer", "Be."), ASKED, ANSWERED), byte_level(), "messages")
    for row in (calls, talk(turn("system", "Be."), ASKED, ANSWERED)):
        with pytest.raises(CorpusError, match="rows of this corpus are plain text"):
            as_query(row, byte_level(), "prompt")
    with pytest.raises(SettingError, match=r"^query 0: a part of a message is image"):
        queries_of([talk(turn("user", [{"type": "image", "url": "q"}]), ANSWERED)])
    with pytest.raises(SettingError, match=r"^query 0: messages are a list of objects"):
        queries_of([{"messages": "a"}])


def test_reasoning_without_a_template_is_told(caplog):
    tokenizer = byte_level()
    tokenizer.name_or_path = "plain"
    as_query(talk(ASKED, turn("assistant", "ok", reasoning_content="so")), tokenizer, "messages")
    assert [message[:40] for message in caplog.messages] == ["plain: without a chat template the `reas"]


def test_columns_that_the_row_does_not_read_are_told(caplog):
    queries_of(
        [INSTRUCTION | {"tools": TOOLS}, {"prompt": "a", "input": "n"}, INSTRUCTION | {"input": "n"}], flag="--x"
    )
    (message,) = caplog.messages
    assert message.startswith("--x: not read") and "`input`, `tools` (in up to 1 of 3 rows)" in message


def test_a_contrast_to_a_call_is_another_answer_in_words(tmp_path):
    loaded = load_model(save_tiny_llama(tmp_path, context=512))
    loaded.tokenizer.chat_template = CHAT
    row = talk(ASKED, turn("assistant", "ok", tool_calls=CALLS), contrast="no", span="Rome")
    (found,) = encode_queries(queries_of([row]), loaded, kind="messages")
    assert [sequence.encoded.ids for sequence in found.sequences] == [
        encode(row, loaded.tokenizer).ids,
        encode(talk(ASKED, turn("assistant", "no")), loaded.tokenizer).ids,
    ]
    assert "".join(token for token, on in zip(found.answer.tokens, found.answer.asked, strict=True) if on) == "Rome"
    assert found.answer.completion.startswith('ok\n[{"type": "function"')
    (shown,) = encode_queries(queries_of([INSTRUCTION | {"input": "n"}]), loaded, kind="instruction")
    assert shown.answer.prompt == "say\n\nn"


@pytest.mark.parametrize("chat", [False, True])
def test_a_row_given_back_scores_1_with_itself(tmp_path, chat):
    rows = [INSTRUCTION | {"id": f"r{n}", "instruction": f"say {n * 37}", "input": f"n{n}"} for n in range(5)]
    rows += [row | {"id": f"s{n}", "system": f"Be {n}."} for n, row in enumerate(rows)]
    save_tiny_llama(tmp_path / "model", context=512, chat=chat)
    built = index(tmp_path / "model", rows, tmp_path / "index", projection="identity", codec="float32", progress=False)
    hits = trace(built, queries=write_jsonl(tmp_path / "queries.jsonl", rows[3:7]), top=1, null=False).hits
    best = [hit for hit in hits if hit.rank == 1]
    assert [hit.id for hit in best] == ["r3", "r4", "s0", "s1"]
    assert [hit.score for hit in best] == pytest.approx([1] * 4, abs=1e-5)


def test_missing_values_and_tables_in_memory_are_read_as_in_a_file(tmp_path):
    nan = float("nan")
    rows = [{"prompt": "a", "completion": nan, "span": nan}, {"prompt": "c", "completion": "d", "span": "d"}]
    expected = [Query("a"), Query("c", "d", "d")]
    table = pandas.DataFrame(rows)
    table.to_csv(tmp_path / "queries.csv", index=False)
    for origin in (rows, table, (*rows,), write_jsonl(tmp_path / "q.jsonl", rows), tmp_path / "queries.csv"):
        assert queries_of(origin) == expected
    table = pandas.DataFrame([{"prompt": "", "completion": "b"}])
    table.to_csv(tmp_path / "queries.csv", index=False)
    assert queries_of(table) == queries_of(tmp_path / "queries.csv") == [Query("", "b")]
    with pytest.raises(SettingError, match=r"^--queries: no query in it"):
        queries_of(pandas.DataFrame([]))


def test_a_question_has_the_tools_of_its_row(printed, tmp_path):
    """Rows that differ in their tools alone: with them a question is its row, in a file of one or of many."""
    model, rows = save_tiny_llama(tmp_path / "model", chat=True), []
    for name in "fghijk":
        rows.append(talk(ASKED, ANSWERED, id=name, tools=[{"type": "function", "function": {"name": name * 3}}]))
    index(
        model,
        rows,
        tmp_path / "index",
        chat_template=CHAT,
        projection="two_sided",
        width=16,
        codec="float32",
        progress=False,
    )
    one, many = tmp_path / "one.json", write_jsonl(tmp_path / "many.jsonl", rows[4:5])
    words = ("--top", 1, "--no-null", "--json")
    for asked in (("--messages", one), ("--queries", many)):
        one.write_text(json.dumps(rows[4]))
        first = json.loads(printed("trace", tmp_path / "index", *asked, *words)[1])["rows"][0]
        assert (first["id"], first["score"]) == ("j", pytest.approx(1, abs=1e-4)), asked
    one.write_text(json.dumps({"messages": rows[4]["messages"]}))
    assert json.loads(printed("trace", tmp_path / "index", "--messages", one, *words)[1])["rows"][0]["score"] < 0.999


BOTH = [ASKED, turn("assistant", "a"), turn("user", "r")]
PAIRS = [
    {"prompt": "q", "chosen": "ok", "rejected": "no"},
    {"chosen": "q ok", "rejected": "q no"},
    {"instruction": "q", "input": "n", "system": "Be.", "chosen": "ok", "rejected": "no"},
    {"prompt": [turn("system", "Be."), ASKED], "chosen": [ANSWERED], "rejected": [turn("assistant", "no")]},
    {"prompt": "q", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, turn("assistant", "no")]},
    {"chosen": [*BOTH, ANSWERED], "rejected": [*BOTH, turn("assistant", "no")]},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "ok"},
     "rejected": {"from": "gpt", "value": "no"}},
    {"input": {"messages": [ASKED], "tools": TOOLS}, "preferred_output": [ANSWERED],
     "non_preferred_output": [turn("assistant", "no")]},
    {"prompt": "q", "messages": [ASKED, ANSWERED], "chosen": [ASKED, ANSWERED],  # UltraFeedback
     "rejected": [ASKED, turn("assistant", "no")], "score_chosen": 8.0},
    {"system": "Be.", "prompt": "q", "chosen": "ok", "rejected": "no"},  # Truthy-DPO
    {"system": "", "prompt": "q", "chosen": "ok", "rejected": "no"},
    {"prompt": "q", "conversation": [{"input": "q", "output": "ok"}],  # Capybara by distilabel
     "chosen": [ASKED, ANSWERED], "rejected": [ASKED, turn("assistant", "no")]},
]  # fmt: skip


@pytest.mark.parametrize("row", PAIRS)
def test_a_pair_as_a_question_is_its_row_on_either_side(row):
    tokenizer = byte_level(bos=True, chat=CHAT)
    (chosen,), (contrast,) = queries_of([row]), queries_of([row], preferences="contrast")
    assert chosen.contrast is None and chosen.completion.strip() == contrast.completion.strip() == "ok"
    whole = encode(row, tokenizer, preferences="contrast")
    for query, side in ((contrast, whole), (contrast.contrast, whole.rejected)):
        encoded = encode_query(query.prompt, query.completion, tokenizer, kind=layout(row), context=query.context)
        assert (encoded.ids, encoded.supervised) == (side.ids, side.supervised)
    assert encode(row, tokenizer).ids == whole.ids and encode(row, tokenizer).rejected is None


def test_messages_before_a_pair_are_its_prompt():
    """As axolotl's `chat_template` for preferences has them."""
    tokenizer = byte_level(bos=True, chat=CHAT)
    row = {"messages": [ASKED], "chosen": ANSWERED, "rejected": turn("assistant", "no")}
    whole = encode(row, tokenizer, preferences="contrast")
    for side, answer in ((whole, ANSWERED), (whole.rejected, turn("assistant", "no"))):
        assert side.ids == encode({"messages": [ASKED, answer]}, tokenizer).ids


def test_a_pair_whose_sides_go_apart_earlier_has_another_prompt_on_either_side():
    row = {"chosen": [ASKED, turn("assistant", "a"), turn("user", "r"), ANSWERED], "rejected": [ASKED, ANSWERED]}
    (query,) = queries_of([row], preferences="contrast")
    assert (query.prompt, query.completion) == ("r", "ok")
    assert (query.contrast.prompt, query.contrast.completion, query.contrast.context) == ("q", "ok", None)
    with pytest.raises(SettingError, match="query 0: `rejected` and `chosen`: one of the two ends without an answer"):
        queries_of([row | {"rejected": [ASKED, ANSWERED, ASKED]}], preferences="contrast")
    with pytest.raises(SettingError, match="--preferences both: choose one of chosen, contrast"):
        queries_of([row], preferences="both")
    with pytest.raises(SettingError, match="have two layouts, messages and prompt"):
        queries_of([row | {"rejected": "no"}], preferences="contrast")
