"""Columns and keys that decide a text are read, refused or named; every turn is closed; a day is one day."""

import datetime

import pytest

from tiny_tokenizers import byte_level, marked
from whence.corpus import templates
from whence.corpus.layouts import row_text
from whence.corpus.reading import open_corpus
from whence.corpus.templates import date_of, prepare, template_text, templated, written_by
from whence.corpus.tokens import encode, encode_prompt, encode_query, render
from whence.errors import CorpusError, SettingError
from whence.storage import Place

TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHAT = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<a>{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c }}{% endfor %}"
    "{{ eos_token }}{% else %}<u>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
WITHOUT_TOOLS = CHAT.partition("{% endfor %}")[2].replace("{% for c in m.tool_calls or [] %}{{ c }}{% endfor %}", "")
LIKE_PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)
LIKE_GPT_OSS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
CLOSES_BETWEEN = WITHOUT_TOOLS.replace("{{ eos_token }}", "{% if not loop.last %}{{ eos_token }}{% endif %}")
BLANK_BEHIND = WITHOUT_TOOLS.replace("{{ eos_token }}", "{{ eos_token }} ")
STRIPS_THOUGHTS = WITHOUT_TOOLS.replace(
    "{{ m['content'] }}{{ eos", "{{ m['content'] if loop.last else m['content'].split('|')[-1] }}{{ eos"
)
DATED = "  {{ strftime_now('%d %b %Y') }}{% if strftime_now is defined %}\n{{ strftime_now(format='%-d') }}{% endif %}"


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def supervised(row, tokenizer):
    encoded = encode(row, tokenizer)
    return tokenizer.decode([token for token, on in zip(encoded.ids, encoded.supervised, strict=True) if on])


TALK = {"messages": [user("x"), assistant("y"), user("z"), assistant("w")]}


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        (LIKE_PHI3, "y<|end|>w<|end|>\n</s>"),
        (LIKE_GPT_OSS, "<|message|>y<|end|><|message|>w<|return|>"),
        (CLOSES_BETWEEN, "y</s>w"),
        (BLANK_BEHIND, "y</s>w</s>"),
    ],
)
def test_every_turn_of_the_assistant_is_closed(chat, expected):
    assert supervised(TALK, byte_level(chat=chat)) == expected
    longer = {"messages": [*TALK["messages"], user("q")]}
    assert supervised(longer, byte_level(chat=chat)).count("<|end|>" if "<|end|>" in chat else "</s>") == 2


def test_reasoning_that_a_template_strips_is_told_with_the_flag(caplog):
    tokenizer = byte_level(chat=STRIPS_THOUGHTS)
    tokenizer.name_or_path = "strips"
    row = {"messages": [user("x"), assistant("t|y"), user("z"), assistant("t|w")]}
    for _ in range(2):
        assert supervised(row, tokenizer) == "y</s>t|w</s>"
    (message,) = caplog.messages
    assert message.startswith("strips: ") and "of the assistant" in message and "--chat-template" in message


@pytest.mark.parametrize(
    "text", ["{% if p.type == 'text' %}{{ p.text }}{% endif %}", "{{ p['text'] + p['type'][4:] }}"]
)
def test_a_template_that_writes_parts_alone_is_given_parts(text):
    parts = f"{{% for p in m['content'] %}}{text}{{% endfor %}}"
    tokenizer = byte_level(chat=WITHOUT_TOOLS.replace("{{ m['content'] }}", parts))
    encoded = encode(TALK, tokenizer)
    assert marked(encoded, tokenizer) == "<u> x <a> [y] [</s>] <u> z <a> [w] [</s>]"
    row = {"messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TALK["messages"]]}
    assert encode(row, tokenizer) == encoded
    assert encode(row, byte_level(chat=WITHOUT_TOOLS)) == encoded


def test_tools_go_into_the_template_as_objects_or_as_text():
    tokenizer = byte_level(chat=CHAT)
    row = {"messages": [user("x"), assistant("y")]}
    assert marked(encode(row | {"tools": TOOLS}, tokenizer), tokenizer) == "f <u> x <a> [y] [</s>]"
    text = '[{"type": "function", "function": {"name": "f"}}]'
    assert encode(row | {"tools": text}, tokenizer) == encode(row | {"tools": TOOLS}, tokenizer)
    assert (
        encode(row | {"tools": None}, tokenizer) == encode(row | {"tools": "[]"}, tokenizer) == encode(row, tokenizer)
    )
    for tools in ("f", 3, ["f"]):
        with pytest.raises(CorpusError, match="`tools` is a list"):
            encode(row | {"tools": tools}, tokenizer)
    with pytest.raises(CorpusError, match="has `tools`, and the tokenizer has no chat template"):
        encode(row | {"tools": TOOLS}, byte_level())
    query = encode_query("x", "y", tokenizer, kind="messages", context={"tools": TOOLS})
    assert query == encode(row | {"tools": TOOLS}, tokenizer)
    assert query.ids[:4] == encode_prompt("x", tokenizer, chat=True, context={"tools": TOOLS})


def test_tool_calls_that_a_template_does_not_write_are_no_target(caplog):
    tokenizer = byte_level(chat=WITHOUT_TOOLS)
    tokenizer.name_or_path = "toolless"
    call = assistant(None, tool_calls=["c"])
    assert supervised({"messages": [user("x"), call]}, tokenizer) == ""
    assert supervised({"messages": [user("x"), call, user("z"), assistant("w")]}, tokenizer) == "w</s>"
    assert encode({"messages": [user("x"), assistant("y")], "tools": TOOLS}, tokenizer).supervised_count == 2
    assert [message.partition(" (")[2].partition(")")[0] for message in caplog.messages] == [
        "of the assistant's tool calls",
        "of the list of tools",
    ]
    assert supervised({"messages": [user("x"), call]}, byte_level(chat=CHAT)) == "c</s>"


@pytest.mark.parametrize("chat", [None, CHAT])
def test_turn_of_weight_0_is_not_supervised(chat):
    tokenizer = byte_level(chat=chat)
    row = {"messages": [user("x"), assistant("bad", weight=0), user("z"), assistant("w", weight=1)]}
    assert supervised(row, tokenizer) == "w</s>"
    row["messages"][3]["weight"] = 0
    assert supervised(row, tokenizer) == ""
    with pytest.raises(CorpusError, match=r"has the weight 0\.5; 0 or 1 is expected"):
        encode({"messages": [user("x"), assistant("y", weight=0.5)]}, tokenizer)


@pytest.mark.parametrize("chat", [None, CHAT])
def test_system_and_history_come_before_an_instruction(chat):
    tokenizer = byte_level(chat=chat)
    row = {"instruction": "z", "output": "w", "system": "s", "history": [["x", "y"]]}
    same = {"messages": [{"role": "system", "content": "s"}, *TALK["messages"]]}
    assert encode(row, tokenizer) == encode(same, tokenizer)
    plain = {"instruction": "z", "output": "w"}
    assert encode(plain | {"system": "", "history": []}, tokenizer) == encode(plain, tokenizer)
    query = encode_query("z", "w", tokenizer, kind="instruction", context={"history": [["x", "y"]]})
    assert query.ids == encode(row | {"system": None}, tokenizer).ids
    for column, value in (("history", "x"), ("history", [["x"]]), ("system", 3)):
        with pytest.raises(CorpusError, match=f"`{column}` is"):
            encode(plain | {column: value}, tokenizer)


def test_columns_that_may_be_text_and_rejected_answers_are_told_once(caplog):
    row = {"id": 1, "instruction": "Sum up.", "context": "It rains.", "output": "Rain.", "category": "a b c d e"}
    kto = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, False)]
    for rows in ([row], kto, [row], kto):
        list(open_corpus(rows))
    assert len(caplog.messages) == 2
    assert "`context` (in up to 1 of 1 rows)" in caplog.messages[0]
    assert "2 of 3 rows are labelled false" in caplog.messages[1]
    assert [encode(row, byte_level()).supervised_count for row in kto] == [2, 0, 0]
    list(open_corpus([kto[0] | {"label": 0, "text": "q r s t"}]))
    assert "`label`, `text` (in up to 1 of 1 rows)" in caplog.messages[2], "a number may be a class"


def test_beginning_that_a_text_and_the_tokenizer_write_is_read_once_and_told(caplog):
    tokenizer = byte_level(bos=True)
    tokenizer.name_or_path = "beginner"
    for plain in ({"text": "ab"}, {"prompt": "a", "completion": "b"}):
        first = next(iter(plain))
        assert encode(plain | {first: f"<s>{plain[first]}"}, tokenizer) == encode(plain, tokenizer)
    assert encode_prompt("<s>a", tokenizer, chat=False) == encode_prompt("a", tokenizer, chat=False)
    assert [message.partition(",")[0] for message in caplog.messages] == ["beginner: texts begin with <s>"]
    assert encode({"text": "<s>ab"}, byte_level()).ids == encode({"text": "ab"}, tokenizer).ids


def test_template_with_a_date_writes_one_day(monkeypatch, tmp_path):
    tokenizer = byte_level(chat=DATED)
    prepare(tokenizer, date="2024-07-06")
    assert templated([user("x")], tokenizer) == "  06 Jul 20246"
    place = Place.at(tmp_path / "work")
    monkeypatch.setattr(templates, "today", lambda: "2026-11-28")
    assert date_of(place, byte_level(chat=CHAT)) is None and not (tmp_path / "work").exists()
    assert date_of(place, tokenizer) == "2026-11-28"
    monkeypatch.setattr(templates, "today", lambda: "2027-03-09")
    assert date_of(place, tokenizer) == "2026-11-28"
    with pytest.raises(SettingError, match="were written with 2026-11-28"):
        date_of(place, tokenizer, "2027-03-09")
    assert date_of(Place.at(tmp_path / "of a run"), tokenizer, trained="2020-01-02") == "2020-01-02"
    with written_by(None, "2026-11-28"):
        prepare(tokenizer)
    assert tokenizer.template_date == "2026-11-28"
    prepare(tokenizer)
    assert tokenizer.template_date == "2027-03-09"
    with pytest.raises(SettingError, match="a day as YYYY-MM-DD is expected"):
        prepare(tokenizer, date="tomorrow")


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  {% if true %}a{% endif %}\n", "{% if true %}\nb{% endif %}"])
def test_a_fixed_day_changes_nothing_else_of_a_template(start):
    tokenizer = byte_level(chat=start + CHAT + "{{ strftime_now('%Y') }}\n")
    whole = templated([user("x")], tokenizer)
    prepare(tokenizer)
    assert templated([user("x")], tokenizer) == whole == f"{whole[:-4]}{datetime.date.today().year}"


def test_two_signs_of_per_cent_are_one_and_begin_nothing():
    tokenizer = byte_level(chat=CHAT + "{{ strftime_now('100%% %Y %%Y') }}")
    prepare(tokenizer, date="2020-01-02")
    assert templated([user("x")], tokenizer).endswith("100% 2020 %Y")


def test_conversations_that_differ_in_calls_or_tools_are_no_duplicates():
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"city": city}}} for city in ("Oslo", "Rome")]
    rows = [{"messages": [user("x"), assistant("", tool_calls=[call])]} for call in calls]
    rows += [rows[0] | {"tools": TOOLS}, {"messages": [user("x"), assistant("", reasoning_content="so")]}]
    assert len({row_text(row) for row in rows}) == 4 and all("x" in row_text(row) for row in rows)


def test_another_template_is_a_file_or_text(tmp_path):
    (tmp_path / "a.jinja").write_text(CHAT)
    tokenizer = byte_level()
    prepare(tokenizer, tmp_path / "a.jinja")
    assert tokenizer.chat_template == CHAT == template_text(CHAT)
    for text, message in (("no template", "no Jinja template in it"), (None, "cannot be read")):
        (tmp_path / "a.jinja").write_text(text) if text else (tmp_path / "a.jinja").unlink()
        with pytest.raises(SettingError, match=message):
            template_text(tmp_path / "a.jinja")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<' + role + '>' + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}",
        "{% for m in messages %}{% if m.role == 'human' %}<user>{{ m.content }}</s>{% elif m.role == 'model' %}<model>"
        "{{ m.content }}</s>{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}",
    ],
    ids=["it writes names of its own", "it knows no others"],
)
def test_a_template_is_given_the_names_of_the_roles_that_it_knows(template):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    for names in (("user", "assistant"), ("human", "gpt"), ("user", "model"), ("Prompter", "Bot")):
        rendered = render({"messages": [{"role": names[n % 2], "content": f"t{n}"} for n in range(4)]}, tokenizer)
        assert rendered.text == "<user>t0</s><model>t1</s><user>t2</s><model>t3</s>"
        assert [rendered.text[start:end] for start, end in rendered.spans] == ["t1</s>", "t3</s>"]
