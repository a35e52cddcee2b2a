"""The shapes in which training data comes: what each becomes, which of its tokens are supervised, and what is said."""

import json

import pytest

from tiny_tokenizers import byte_level
from whence.corpus.columns import columns_called, original
from whence.corpus.layouts import question_in, row_text, shown_text
from whence.corpus.preferences import take_preferences
from whence.corpus.reading import conversation_in, open_corpus
from whence.corpus.shapes import SHAPES
from whence.corpus.templates import supervise
from whence.corpus.tokens import encode, with_text
from whence.corpus.unread import unread_columns
from whence.corpus.unsupervised import reason
from whence.errors import CorpusError, SettingError
from whence.tracing.queries import queries_of

CHAT = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<a>{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% endfor %}</s>{% elif m['role'] == 'user' %}<u>{{ m['content'] }}"
    "{% else %}({{ m['role'] }}){{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def said(speaker, value, **more):
    return {"from": speaker, "value": value} | more


X, Y = byte_level()("xy")["input_ids"]
LONG = "four words and more"
TOOL = {"type": "function", "function": {"name": "f"}}
TURNS = [user("x"), assistant("y"), user("z"), assistant("w")]
ROWS = {
    # TRL
    "text": ({"text": "xy"}, "xy</s>", "y</s>"),
    "prompt and completion": ({"prompt": "x", "completion": "y"}, "xy</s>", "y</s>"),
    "messages": ({"messages": TURNS}, "<u>x<a>y</s><u>z<a>w</s>", "y</s>w</s>"),
    "messages of parts": (
        {"messages": [user([{"type": "text", "text": "x"}, {"text": "z"}]), assistant([{"text": "y"}])]},
        "<u>xz<a>y</s>", "y</s>",
    ),
    "messages as JSON text": ({"messages": json.dumps(TURNS[:2])}, "<u>x<a>y</s>", "y</s>"),
    "messages with tools": ({"messages": TURNS[:2], "tools": [TOOL]}, "[f]<u>x<a>y</s>", "y</s>"),
    "messages and system": ({"messages": TURNS[:2], "system": "s"}, "(system)s<u>x<a>y</s>", "y</s>"),
    "conversational prompt": ({"prompt": TURNS[:3], "completion": TURNS[3:]}, "<u>x<a>y</s><u>z<a>w</s>", "w</s>"),
    "prompt and messages": ({"prompt": "x", "completion": [assistant("y")]}, "<u>x<a>y</s>", "y</s>"),
    "preference": ({"prompt": "x", "chosen": "y", "rejected": "n"}, "xy</s>", "y</s>"),
    "preference, prompt in both": ({"chosen": "x y", "rejected": "x n"}, "x y</s>", " y</s>"),
    "conversational preference": (
        {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [assistant("n")]}, "<u>x<a>y</s>", "y</s>",
    ),
    "conversational preference, prompt in both": (
        {"chosen": TURNS, "rejected": [*TURNS[:3], assistant("n")]}, "<u>x<a>y</s><u>z<a>w</s>", "w</s>",
    ),
    "UltraFeedback": (
        {"prompt": "x", "chosen": TURNS[:2], "rejected": [user("x"), assistant("n")], "score_chosen": 8.5},
        "<u>x<a>y</s>", "y</s>",
    ),
    "KTO": ({"prompt": "x", "completion": "y", "label": True}, "xy</s>", "y</s>"),
    "conversational KTO": ({"prompt": TURNS[:1], "completion": TURNS[1:2], "label": True}, "<u>x<a>y</s>", "y</s>"),
    "token ids": ({"input_ids": [X, Y, 1], "labels": [-100, Y, 1], "attention_mask": [1, 1, 1]}, "xy</s>", "y</s>"),
    "token ids and the assistant's mask": ({"input_ids": [X, Y, 1], "assistant_masks": [0, 1, 1]}, "xy</s>", "y</s>"),
    "token ids and the completion's mask": ({"input_ids": [X, Y, 1], "completion_mask": [0, 1, 1]}, "xy</s>", "y</s>"),
    "token ids alone": ({"input_ids": [X, Y, 1]}, "xy</s>", "y</s>"),
    # LLaMA-Factory
    "Alpaca": ({"instruction": "x", "input": "z", "output": "y"}, "<u>x\nz<a>y</s>", "y</s>"),
    "Alpaca with system and history": (
        {"instruction": "z", "input": "", "output": "w", "system": "s", "history": [["x", "y"]]},
        "(system)s<u>x<a>y</s><u>z<a>w</s>", "y</s>w</s>",
    ),
    "Alpaca preference": (
        {"instruction": "x", "input": "z", "chosen": "y", "rejected": "n"}, "<u>x\nz<a>y</s>", "y</s>",
    ),
    "ShareGPT": (
        {"conversations": [said("human", "x"), said("gpt", "y")], "system": "s"}, "(system)s<u>x<a>y</s>", "y</s>",
    ),
    "ShareGPT with tools": (
        {"conversations": [said("human", "x"), said("function_call", '{"name": "f", "arguments": {}}'),
                           said("observation", "o"), said("gpt", "y")], "tools": json.dumps([TOOL])},
        "[f]<u>x<a>f</s>(tool)o<a>y</s>", "f</s>y</s>",
    ),
    "ShareGPT preference": (
        {"conversations": [said("human", "x")], "chosen": said("gpt", "y"), "rejected": said("gpt", "n")},
        "<u>x<a>y</s>", "y</s>",
    ),
    # axolotl, OpenAI, and sets of their own
    "conversations of roles": ({"conversations": TURNS[:2]}, "<u>x<a>y</s>", "y</s>"),
    "a conversation": ({"conversation": TURNS[:2]}, "<u>x<a>y</s>", "y</s>"),
    "weights in ShareGPT": (
        {"conversations": [said("human", "x"), said("gpt", "y", weight=0), said("human", "z"), said("gpt", "w")]},
        "<u>x<a>y</s><u>z<a>w</s>", "w</s>",
    ),
    "segments": (
        {"segments": [{"label": False, "text": "<u>x"}, {"label": True, "text": "y</s>"}]}, "<u>xy</s>", "y</s>",
    ),
    "messages of parts, some not trained on": (
        {"messages": [user("x"), assistant(
            [{"text": "n", "train": False}, {"text": "n", "weight": 0}, {"value": "y"}])]},
        "<u>x<a>nny</s>", "y</s>",
    ),
    "LIMA": ({"conversations": ["x", "y", "z", "w"], "source": "s"}, "<u>x<a>y</s><u>z<a>w</s>", "y</s>w</s>"),
    "XTuner, an answer without loss": (
        {"conversation": [{"input": "x", "output": "y", "output_with_loss": False},
                          {"input": "z", "output": "w", "output_with_loss": True}]},
        "<u>x<a>y</s><u>z<a>w</s>", "w</s>",
    ),
    "Capybara, XTuner": (
        {"conversation": [{"system": "s", "input": "x", "output": "y"}, {"input": "z", "output": "w"}]},
        "(system)s<u>x<a>y</s><u>z<a>w</s>", "y</s>w</s>",
    ),
    "an object of lists": ({"conversations": {"from": ["human", "gpt"], "value": ["x", "y"]}}, "<u>x<a>y</s>", "y</s>"),
    "Pygmalion": (
        {"conversations": [{"role": "human", "value": "x"}, {"role": "bot", "value": "y"}]}, "<u>x<a>y</s>", "y</s>",
    ),
    "Gemini": (
        {"messages": [{"role": "user", "parts": [{"text": "x"}]}, {"role": "model", "parts": [{"text": "y"}]}]},
        "<u>x<a>y</s>", "y</s>",
    ),
    "OpenAI's preference": (
        {"input": {"messages": TURNS[:1], "tools": [TOOL]}, "preferred_output": TURNS[1:2],
         "non_preferred_output": [assistant("n")]}, "[f]<u>x<a>y</s>", "y</s>",
    ),
    "Dolly": ({"instruction": "x", "context": "z", "response": "y", "category": "qa"}, "<u>x\nz<a>y</s>", "y</s>"),
    "instruction, input, response": ({"instruction": "x", "input": "z", "response": "y"}, "<u>x\nz<a>y</s>", "y</s>"),
    "OpenOrca": ({"system_prompt": "s", "question": "x", "response": "y"}, "(system)s<u>x<a>y</s>", "y</s>"),
    "question and answer": ({"question": "x", "answer": "y"}, "<u>x<a>y</s>", "y</s>"),
    "query and response": ({"query": "x", "response": "y"}, "<u>x<a>y</s>", "y</s>"),
    "prompt and response": ({"prompt": "x", "response": "y"}, "<u>x<a>y</s>", "y</s>"),
    "messages and response": ({"prompt": TURNS[:3], "response": "w"}, "<u>x<a>y</s><u>z<a>w</s>", "w</s>"),
    "question and messages": ({"question": "x", "answer": [assistant("y")]}, "<u>x<a>y</s>", "y</s>"),
    "Nemotron": ({"input": TURNS[:1], "output": "y", "system_prompt": "s"}, "(system)s<u>x<a>y</s>", "y</s>"),
    "Orca's preference": (
        {"system": "s", "question": "x", "chosen": "y", "rejected": "n"}, "(system)s<u>x<a>y</s>", "y</s>",
    ),
    "a prompt's preference with a system": (
        {"system": "s", "prompt": "x", "chosen": "y", "rejected": "n"}, "(system)s<u>x<a>y</s>", "y</s>",
    ),
    "a query's preference": ({"query": "x", "chosen": "y", "rejected": "n"}, "<u>x<a>y</s>", "y</s>"),
    "an input's preference": ({"input": "x", "chosen": "y", "rejected": "n"}, "<u>x<a>y</s>", "y</s>"),
    "a question and conversations": (
        {"question": "x", "chosen": TURNS[:2], "rejected": [user("x"), assistant("n")]}, "<u>x<a>y</s>", "y</s>",
    ),
    "Aya, FLAN, xP3": ({"inputs": "x", "targets": "y", "language": "English"}, "<u>x<a>y</s>", "y</s>"),
    "input and output": ({"input": "x", "output": "y"}, "<u>x<a>y</s>", "y</s>"),
    "problem and solution": ({"problem": "x", "solution": "y"}, "<u>x<a>y</s>", "y</s>"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(chat=CHAT)


def supervised(row, tokenizer):
    encoded = encode(row, tokenizer)
    targets = [token for token, on in zip(encoded.ids, encoded.supervised, strict=True) if on]
    return tokenizer.decode(encoded.ids), tokenizer.decode(targets)


@pytest.mark.parametrize("name", ROWS)
def test_each_shape_is_the_text_that_its_trainer_makes(name, tokenizer):
    row, text, targets = ROWS[name]
    (example,) = open_corpus([row])
    assert supervised(example.row, tokenizer) == (text, targets)
    assert example.row == row, "a row stays as it came"
    shown = shown_text(with_text(row, tokenizer))
    assert "".join(shown.values()).replace("</s>", "")[-1] in "yw" and row_text(with_text(row, tokenizer))


def test_every_shape_is_in_the_table():
    read = {tuple(shape.columns) for shape in SHAPES}
    known = {shape.columns for row, *_ in ROWS.values() for shape in SHAPES if {*shape.columns} <= row.keys()}
    assert read == known


def test_what_is_read_as_what_is_told_once(caplog):
    rows = [{"question": "x", "answer": "y"}] * 3 + [{"messages": TURNS}]
    for _ in range(2):
        list(open_corpus(rows))
    (line,) = caplog.messages
    assert line == (
        "4 rows in memory: 3 of 4 rows are read as a question and its answer (`question` and `answer`) (--map reads "
        "columns otherwise)."
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": LONG, "answer": ["x", "y"]}, "`answer` holds a list, and text is expected. Say which"),
        ({"article": "a b c d", "summary": "a", "id": "1"}, "--map prompt=article,completion=summary"),
        ({"content": "a b c d", "stars": 3}, "--map text=content"),
        ({"stars": 3}, "--map messages=COLUMN"),
        ({"prompt": "x", "response_0": LONG, "response_1": LONG + "!"}, "--map completion=response_0"),
        (
            {"qid": 1, "question": LONG, "date": "d", "response_j": LONG * 2, "response_k": LONG * 3},
            "--map prompt=question,completion=response_j",
        ),
        ({"hexsha": "f" * 40, "content": LONG, "repo_name": "x/y"}, "--map text=content"),
        ({"input persona": LONG, "synthesized text": LONG}, "--map 'prompt=input persona,completion=synthesized text'"),
        ({"winner": "a", "conversation_a": TURNS, "conversation_b": TURNS}, "--map messages=conversation_a"),
        (
            {"context": LONG, "question": "x", "answers": {"text": ["y"]}},
            "--map prompt=context,completion=COLUMN (a column of text, which `answers` is not)",
        ),
        (
            {"inputs": [3, 1], "inputs_pretokenized": "x", "targets": [4], "targets_pretokenized": "y"},
            "`inputs` holds a list, and text is expected. Say which column is which: "
            "--map prompt=inputs_pretokenized,completion=targets_pretokenized",
        ),
        ({"messages": [user([{"type": "image", "url": "u"}]), assistant("y")]}, "a part of a message is image"),
        ({"conversations": [said("human", "x"), said("function_call", "f(")]}, "`function_call` turn holds JSON"),
        ({"conversations": [{"user": "x"}]}, "messages are a list of objects with `role` and `content`"),
    ],
)
def test_a_row_that_is_not_read_is_refused_with_the_flag_or_the_place(row, words):
    with pytest.raises(CorpusError) as caught:
        list(open_corpus([row]))
    assert words in str(caught.value) and str(caught.value).startswith("row 0:") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"question": "x", "answer": 1, "choices": ["y", "n"], "subject": "s"}, ["choices"]),
        ({"text": LONG, "title": "a title of words", "url": "u"}, ["title"]),
        ({"text": "x", "role": "prompter", "parent_id": "p"}, ["role"]),
        ({"text": "x", "translation": {"de": LONG}, "scores": {"good": 1.0}}, ["translation"]),
        (
            {"prompt": "x", "completion": "y", "answers": {"text": ["z"]}, "predicted_answer": "145"},
            ["answers", "predicted_answer"],
        ),
        ({"prompt": "x", "completion": "y", "tools": "[]", "moderation": [{"flagged": False}]}, ["tools"]),
        (
            {"messages": TURNS, "prompt": "x", "problem": "q", "chosen": TURNS, "rejected": TURNS[:2]},
            ["problem", "rejected"],
        ),
        (
            {"messages": [user(LONG + "!"), assistant("y")], "question": LONG, "reasoning": "y", "thinking": "o"},
            ["thinking"],
        ),
        ({"prompt": TURNS[:1], "response": "y", "system": "s", "tools": "[]", "history": [["a", "b"]]}, ["history"]),
        ({"instruction": "x", "output": "y", "system_prompt": "s", "tools": "[]"}, ["tools"]),
        ({"query": "x", "response": '[{"name": "f"}]', "tools": "[]"}, ["tools"]),
        ({"question": "x", "chosen": "y", "rejected": "n", "tools": "[]"}, ["tools"]),
        ({"prompt": "x", "chosen": "y", "rejected": "n", "system": "s", "tools": "[]"}, ["tools"]),
        ({"chosen": "x y", "rejected": "x n", "system": "s"}, ["system"]),
        ({"conversation": [{"input": "x", "output": "y", "train": False}]}, ["messages[].train"]),
        ({"question": "x", "chosen": TURNS[:2], "rejected": TURNS[:2], "tools": "[]", "system": "s"}, []),
    ],
)
def test_a_column_that_may_hold_text_is_named_unless_its_text_is_read(row, names):
    (example,) = open_corpus([row])
    assert unread_columns(example.row) == names


def test_a_rejected_answer_is_named_where_it_is_not_read():
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rejected = [turns[0], {"role": "assistant", "content": "n"}]
    row = {"prompt": "x", "messages": turns, "chosen": turns, "rejected": rejected}
    assert unread_columns(row) == ["rejected"]
    assert unread_columns(row, "contrast") == []


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"input_ids": [X, 999]}, "holds 999"),
        ({"input_ids": ["x"]}, "is a list of token ids"),
        ({"input_ids": [X, Y], "labels": [Y, -100]}, "unshifted"),
        ({"input_ids": [X, Y], "labels": [X]}, "unshifted"),
        ({"input_ids": [X, Y], "completion_mask": [1]}, "`completion_mask` holds a 0 or 1 for each"),
        ({"segments": [{"text": "x"}]}, "`segments` is a list of objects"),
    ],
)
def test_ids_and_segments_of_another_form_are_refused(columns, words, tokenizer):
    with pytest.raises(CorpusError, match=words):
        encode(columns, tokenizer)


def test_a_long_row_of_ids_loses_its_right(tokenizer):
    encoded = encode({"input_ids": [X, Y, X, Y], "labels": [-100, Y, X, -100]}, tokenizer, 3)
    assert (encoded.ids, encoded.supervised, encoded.cut) == ([X, Y, X], [False, True, True], 1)


@pytest.mark.parametrize(
    ("name", "last", "everything"),
    [
        ("messages", "w</s>", "x<a>y</s><u>z<a>w</s>"),
        ("Alpaca with system and history", "w</s>", "(system)s<u>x<a>y</s><u>z<a>w</s>"[1:]),
        ("ShareGPT", "y</s>", "(system)s<u>x<a>y</s>"[1:]),
        ("prompt and completion", "y</s>", "y</s>"),
        ("segments", "y</s>", "xy</s>"),
        ("token ids", "y</s>", "y</s>"),
        ("text", "y</s>", "y</s>"),
    ],
)
def test_supervise(name, last, everything):
    for chosen, expected in (("last", last), ("all", everything)):
        tokenizer = byte_level(chat=CHAT)
        supervise(tokenizer, chosen)
        assert supervised(ROWS[name][0], tokenizer)[1] == expected
    with pytest.raises(SettingError, match="--supervise user: choose one of assistant, last, all"):
        supervise(byte_level(), "user")


@pytest.mark.parametrize("chat", [None, CHAT])
def test_no_earlier_answer_stands_in_for_a_last_one_of_weight_0(chat):
    """As LLaMA-Factory: `mask_history` takes the last turn, whose `loss_mask` may leave nothing."""
    tokenizer = byte_level(chat=chat)
    supervise(tokenizer, "last")
    silent = {"weight": 0}
    row = {"messages": [*TURNS[:3], assistant("w") | silent]}
    assert supervised(row, tokenizer)[1] == ""
    assert reason(row, tokenizer) == "give the last turn of the assistant the weight 0"
    row = {"messages": [user("x"), assistant("y") | silent, user("z"), assistant("w") | {"weight": 1}]}
    assert supervised(row, tokenizer)[1] == "w</s>"
    assert supervised({"messages": TURNS[:3]}, tokenizer)[1] == ("y</s>" if chat else "y")


@pytest.mark.parametrize(
    ("row", "preferences", "words"),
    [
        ({"prompt": "a", "chosen": "good", "rejected": ""}, "contrast", "have an empty `rejected`, or one of a single"),
        ({"prompt": "a", "chosen": "", "rejected": "bad"}, "contrast", "have an empty `chosen`, or one of a single"),
        ({"prompt": "a", "chosen": "y", "rejected": "y"}, "contrast", "have the same tokens in `chosen` and `rej"),
        ({"prompt": "a", "chosen": "y", "rejected": None}, "contrast", "have no `rejected`"),
        ({"prompt": "a", "chosen": None, "rejected": None}, "chosen", "have no `chosen`"),
        (
            {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [assistant("")]}, "contrast",
            "have empty turns of the assistant in `rejected`",
        ),
        (
            {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [user("n")]}, "contrast",
            "have no message of the role `assistant` (or gpt, model, bot, chatbot, chatgpt, ai), but `user` in `rej",
        ),
    ],
)  # fmt: skip
def test_the_reason_of_a_pair_names_the_answer_that_lacks(row, preferences, words):
    tokenizer = byte_level()
    tokenizer.eos_token = None  # nothing closes an empty answer
    take_preferences(tokenizer, preferences)
    assert encode(row, tokenizer).supervised_count == 0
    assert reason(row, tokenizer).startswith(words)


def test_the_reason_of_weights_is_of_the_turns_that_are_supervised(tokenizer):
    row = {"messages": [user("x"), assistant("y"), user("z"), assistant("w") | {"weight": 0}]}
    assert reason(row, tokenizer, 1) == "are cut to 1 tokens, of which none is supervised"


def test_columns_of_other_names():
    rows = [{"q": "x", "a": "y", "n": 1}, {"prompt": "x", "completion": "y"}, {"q": "x", "a": "y", "prompt": ""}]
    names = {"prompt": "q", "completion": "a"}
    read = [example.row for example in open_corpus(rows, columns=names)]
    assert read == [{"prompt": "x", "completion": "y", "n": 1}, rows[1], {"prompt": "x", "completion": "y"}]
    assert original(read[0], names) == rows[0]
    with columns_called(names):
        corpus = open_corpus(rows)
    assert [example.row for example in corpus] == read, "the names belong to the corpus from then on"
    assert [(query.prompt, query.completion) for query in queries_of(rows[:1], columns=names)] == [("x", "y")]
    with pytest.raises(CorpusError, match="row 0: --map prompt=q: the row has a column `prompt` too"):
        list(open_corpus([{"q": "x", "a": "y", "prompt": "z"}], columns=names))
    for wrong, words in (
        ({"question_text": "q"}, "reads no column `question_text`"),
        ({"prompt": "q", "text": "q"}, "two"),
    ):
        with pytest.raises(SettingError, match=words):
            open_corpus(rows, columns=wrong)


def test_a_query_has_any_shape_that_asks(tmp_path):
    asked = [
        ({"question": "x"}, ("x", None, None)),
        ({"question": "x", "answer": "y", "system_prompt": "s"}, ("x", "y", {"system": "s"})),
        ({"conversations": [said("human", "x"), said("gpt", "y")]}, ("x", "y", None)),
        ({"conversations": [said("human", "x")], "system": "s"},
         ("x", None, {"messages": [{"role": "system", "content": "s"}, user("x")]})),
        ({"prompt": TURNS[:3]}, ("z", None, {"messages": TURNS[:3]})),
        ({"prompt": TURNS[:1], "completion": [assistant("y")]}, ("x", "y", None)),
        ({"prompt": "x", "system": "s"}, ("x", None, {"system": "s"})),
    ]  # fmt: skip
    queries = queries_of([row for row, _ in asked])
    assert [(query.prompt, query.completion, query.context) for query in queries] == [expected for _, expected in asked]
    file = tmp_path / "talk.json"
    for content, expected in (
        (TURNS[:3], {"messages": TURNS[:3]}),
        ({"conversations": TURNS[:1]}, {"conversations": TURNS[:1]}),
    ):
        file.write_text(json.dumps(content))
        assert conversation_in(str(file)) == expected
    file.write_text('["x"]')
    with pytest.raises(CorpusError, match="messages are a list of objects"):
        conversation_in(str(file))


def test_what_a_row_asks_last():
    """The command that a verb proposes asks it."""
    turns = [said("system", "Be brief."), said("human", "x"), said("gpt", "y"), said("human", "z"), said("gpt", "w")]
    asked = [
        ({"conversations": turns}, "z"),
        ({"conversations": json.dumps(turns[:3])}, "x"),
        ({"messages": [user("x"), assistant(""), {"role": "tool", "content": "8"}, assistant("y")], "tools": []}, "x"),
        ({"prompt": [user("x")], "chosen": [assistant("y")], "rejected": [assistant("n")]}, "x"),
        ({"instruction": "x", "input": "z", "system": "Be brief.", "history": [["a", "b"]], "output": "y"}, "x"),
        ({"instruction": "", "input": "z", "output": "y"}, "z"),
        ({"messages": [assistant("y")]}, None),
        ({"text": "a b"}, "a b"),
        ({"input_ids": [3, 4]}, None),
    ]
    for row, question in asked:
        assert question_in(row) == question, row
