"""What is supervised, worked by hand for each layout, and by an oracle that counts bytes."""

import functools
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tiny_tokenizers import Slow, byte_level, marked, trained
from whence.corpus.conversations import ALPACA_PREAMBLE
from whence.corpus.long_texts import kept_part
from whence.corpus.preferences import CONTRAST
from whence.corpus.tokens import (
    Encoded,
    bucketed,
    collate,
    encode,
    encode_prompt,
    encode_query,
    render,
)
from whence.errors import CorpusError

BASE_6M = Path(__file__).parents[3] / "shared" / "models" / "base-6m"
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a>{{ m['content'] }}{{ eos_token }}{% else %}"
    "<u>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
CLOSES_WITH_A_NEWLINE = CHAT.replace("{{ eos_token }}", "{{ eos_token + '\\n' }}")
FORGETS_EARLIER_ANSWERS = CHAT.replace("{{ m['content'] }}{{ eos", "{{ m['content'] if loop.last else '...' }}{{ eos")
ASKS_FOR_A_THOUGHT = CHAT.replace("%}<a>{% endif", "%}<a>t{% endif")
THINKS_LAST = CHAT.replace(
    "<a>{{ m['content'] }}", "<a>{{ 't' if loop.last }}{{ m['content'] }}{{ (m['tool_calls'] or ['']) | first }}"
)
REFUSES_PARTS = CHAT + "{% if messages | length < 4 %}{{ raise_exception('too short') }}{% endif %}"
LETTERS = st.sampled_from(list("abcthe ,\n\té日本😀\u0301\u200d"))
TEXTS = st.text(LETTERS, max_size=30)


def prompt_row(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (False, False, "a [b] [</s>]"),
        (True, False, "<s> [a] [b] [</s>]"),
        (False, True, "a [b] [</s>]"),
        (True, True, "<s> [a] [b] [</s>]"),
    ],
)
def test_text_is_all_supervised_and_closed_once(bos, eos, expected):
    tokenizer = byte_level(bos=bos, eos=eos)
    assert marked(encode({"text": "ab"}, tokenizer), tokenizer) == expected
    assert marked(encode({"text": "ab</s>"}, tokenizer), tokenizer).count("</s>") == 1 + eos


def test_text_without_an_end_of_sequence_token_is_left_open():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    assert marked(encode({"text": "ab"}, tokenizer), tokenizer) == "a [b]"


def test_empty_text_has_at_most_its_closing_token():
    assert encode({"text": ""}, byte_level()).supervised_count == 0
    assert marked(encode({"text": ""}, byte_level(bos=True)), byte_level(bos=True)) == "<s> [</s>]"


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [(False, False, "a b [c] [</s>]"), (True, False, "<s> a b [c] [</s>]"), (True, True, "<s> a b [c] [</s>]")],
)
def test_completion_and_its_end_are_supervised(bos, eos, expected):
    tokenizer = byte_level(bos=bos, eos=eos)
    assert marked(encode(prompt_row("ab", "c"), tokenizer), tokenizer) == expected


def test_prompt_and_completion_are_joined_as_they_stand_and_a_token_across_the_joint_is_supervised():
    tokenizer = byte_level([("b", "c"), ("a", "bc")])
    assert marked(encode(prompt_row("xb", "cy"), tokenizer), tokenizer) == "x [bc] [y] [</s>]"
    assert marked(encode(prompt_row("xa", "bcy"), tokenizer), tokenizer) == "x [abc] [y] [</s>]"
    assert marked(encode(prompt_row("a", "bc"), tokenizer), tokenizer) == "abc [</s>]"


def test_empty_sides():
    tokenizer = byte_level(bos=True)
    assert marked(encode(prompt_row("", "ab"), tokenizer), tokenizer) == "<s> [a] [b] [</s>]"
    assert marked(encode(prompt_row("ab", ""), tokenizer), tokenizer) == "<s> a b [</s>]"
    assert marked(encode(prompt_row("", "ab"), byte_level()), tokenizer) == "a [b] [</s>]"


def test_numbers_are_text_and_other_things_are_not():
    tokenizer = byte_level()
    assert marked(encode(prompt_row(1, 2.5), tokenizer), tokenizer) == "1 [2] [.] [5] [</s>]"
    with pytest.raises(CorpusError, match="a list stands where text is expected"):
        encode(prompt_row("a", ["b"]), tokenizer)


@pytest.mark.parametrize(
    ("prompt", "completion", "unsupervised"), [("a", "😀", 1), ("😀", "é", 4), ("é", "é", 2), ("😀", "😀!", 4)]
)
def test_every_byte_of_a_character_belongs_to_its_side(prompt, completion, unsupervised):
    tokenizer = byte_level()
    found = encode(prompt_row(prompt, completion), tokenizer).supervised
    assert found == [False] * unsupervised + [True] * (len(found) - unsupervised)


def test_token_made_of_bytes_of_two_characters_across_the_joint_is_supervised():
    tokenizer = byte_level([("©", "Ã")])  # the last byte of é and the first of the next é
    assert marked(encode(prompt_row("éé", "é"), tokenizer), tokenizer) == "Ã ©Ã [©Ã] [©] [</s>]"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("a ", "b", "a Ġ [b] [</s>]"),  # the offsets of a token of spaces are empty, at its end
        ("a", " ", "a [Ġ] [</s>]"),
        ("a", " b ", "a [Ġ] [b] [Ġ] [</s>]"),
        ("a  ", "c", "a ĠĠ [c] [</s>]"),
        ("a ", " c", "a [ĠĠ] [c] [</s>]"),
        ("a ", "d", "a [Ġd] [</s>]"),
        ("a", " d", "a [Ġd] [</s>]"),
        ("", " a", "Ġ [a] [</s>]"),
    ],
)
def test_trimmed_offsets_lose_no_space(prompt, completion, expected):
    tokenizer = byte_level([("Ġ", "Ġ"), ("Ġ", "d")], trim=True)
    assert marked(encode(prompt_row(prompt, completion), tokenizer), tokenizer) == expected


def test_trimmed_text_supervises_its_spaces():
    tokenizer = byte_level(trim=True)
    assert marked(encode({"text": "a b "}, tokenizer), tokenizer) == "a [Ġ] [b] [Ġ] [</s>]"


def test_further_special_tokens_in_front_belong_to_a_text_and_not_to_a_completion():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <u> $A", special_tokens=[("<s>", 0), ("<u>", 2)]
    )
    assert marked(encode({"text": "ab"}, tokenizer), tokenizer) == "<s> [<u>] [a] [b] [</s>]"
    assert marked(encode(prompt_row("a", "b"), tokenizer), tokenizer) == "<s> <u> a [b] [</s>]"


def test_first_piece_of_a_text_is_supervised_where_its_tokenizer_puts_a_space_before_it():
    core = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "▁b": 4, "b": 5}, merges=[("▁", "b")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    assert marked(encode({"text": "a b"}, tokenizer), tokenizer) == "<s> [▁] [a] [▁b] [</s>]"
    assert marked(encode(prompt_row("a", " b"), tokenizer), tokenizer) == "<s> ▁ a [▁b] [</s>]"
    assert marked(encode(prompt_row("a ", "b"), tokenizer), tokenizer) == "<s> ▁ a [▁b] [</s>]"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("ab", "c a", "a [bc] [ ] [a] [</s>]"),
        ("a", "bc", "a [bc] [</s>]"),
        ("abc", "", "a bc [</s>]"),
        ("bc ", "a", "bc   [a] [</s>]"),
        ("", "abc", "a [bc] [</s>]"),
    ],
)
def test_tokenizer_without_offsets_finds_the_same_boundary(prompt, completion, expected):
    tokenizer = Slow(["a", "b", "c", " ", "bc"])
    assert not tokenizer.is_fast
    assert marked(encode(prompt_row(prompt, completion), tokenizer), tokenizer) == expected


def test_truncation_and_padding_kept_in_a_tokenizer_file_do_not_apply():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert len(encode({"text": "abcdef"}, tokenizer).ids) == 7


@pytest.mark.parametrize("row", [prompt_row("a\ud800", "b\udfff"), {"text": "b\udc80b"}])
def test_lone_surrogates_become_question_marks(row):
    encoded = encode(row, byte_level())
    assert marked(encoded, byte_level()) in ("a ? [b] [?] [</s>]", "b [?] [b] [</s>]")


def test_instruction_goes_through_the_chat_template():
    tokenizer = byte_level(bos=True, eos=True, chat=CHAT)
    plain = {"instruction": "x", "output": "yz"}
    assert marked(encode(plain, tokenizer), tokenizer) == "<u> x <a> [y] [z] [</s>]"
    assert encode(plain | {"input": None}, tokenizer) == encode(plain | {"input": ""}, tokenizer)
    assert encode(plain, tokenizer) == encode(plain | {"input": ""}, tokenizer)
    assert marked(encode(plain | {"input": "w"}, tokenizer), tokenizer) == "<u> x Ċ w <a> [y] [z] [</s>]"


def test_instruction_without_a_template_is_in_alpacas_words():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    rendered = render(row, byte_level())
    assert rendered.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n3"
    )
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["3"]
    rendered = render(row | {"input": ""}, byte_level())
    assert rendered.text == f"{ALPACA_PREAMBLE[False]}\n\n### Instruction:\nAdd.\n\n### Response:\n3"
    encoded = encode(row, byte_level(bos=True))
    assert encoded.supervised_count == 2
    assert encoded.supervised[-2:] == [True, True]


@pytest.mark.parametrize("chat", [None, CHAT])
def test_instruction_may_be_empty(chat):
    tokenizer = byte_level(chat=chat)
    assert encode({"instruction": "", "output": "y"}, tokenizer).supervised_count == 2
    assert encode({"instruction": "", "input": "x", "output": "y"}, tokenizer) == encode(
        {"instruction": "x", "output": "y"}, tokenizer
    )


@pytest.mark.parametrize("chat", [CHAT, CLOSES_WITH_A_NEWLINE])
def test_only_the_assistants_turns_are_supervised(chat):
    tokenizer = byte_level(bos=True, chat=chat)
    row = {"messages": [user("x"), assistant("y"), user("z"), assistant("w"), user("q")]}
    expected = "<u> x <a> [y] [</s>] <u> z <a> [w] [</s>] <u> q"
    assert marked(encode(row, tokenizer), tokenizer).replace(" Ċ", "") == expected


def test_content_that_ends_in_newlines_keeps_its_closing_token():
    tokenizer = byte_level(chat=CHAT)
    encoded = encode({"messages": [user("x"), assistant("y\n")]}, tokenizer)
    assert marked(encoded, tokenizer) == "<u> x <a> [y] [Ċ] [</s>]"


def test_messages_without_a_template_are_in_alpacas_words():
    row = {"messages": [user("x"), assistant("y"), user("z"), assistant("w")]}
    rendered = render(row, byte_level())
    assert rendered.text == (
        f"{ALPACA_PREAMBLE[False]}\n\n### Instruction:\nx\n\n### Response:\ny"
        "\n\n### Instruction:\nz\n\n### Response:\nw"
    )
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["y", "w"]
    assert encode(row, byte_level()).supervised_count == 3
    single = encode({"messages": row["messages"][:2]}, byte_level())
    assert single == encode({"instruction": "x", "output": "y"}, byte_level())
    system = render({"messages": [{"role": "system", "content": "Be brief."}, *row["messages"][:2]]}, byte_level())
    assert system.text == "Be brief.\n\n### Instruction:\nx\n\n### Response:\ny"
    assert encode({"messages": row["messages"][:3]}, byte_level()).supervised_count == 1


def test_what_a_template_leaves_out_of_earlier_turns_is_not_supervised_and_told(caplog):
    tokenizer = byte_level(chat=FORGETS_EARLIER_ANSWERS)
    tokenizer.name_or_path = "forgetful"
    assert encode({"messages": [user("x"), assistant("y")]}, tokenizer).supervised_count == 2
    assert not caplog.messages
    row = {"messages": [user("x"), assistant("y"), user("z"), assistant("w")]}
    for _ in range(2):
        assert marked(encode(row, tokenizer), tokenizer) == "<u> x <a> . . . </s> <u> z <a> [w] [</s>]"
    assert [message.partition(":")[0] for message in caplog.messages] == ["forgetful"]


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"role": "tool", "content": "sunny"}, "the role 'tool'"),
        ({"role": "narrator", "content": "x"}, "the role 'narrator'"),
        (assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), "`tool_calls`"),
        (assistant("Let me see.", tool_calls=[{"function": {"name": "f"}}]), "`tool_calls`"),
        (assistant("", function_call={"name": "f"}), "`function_call`"),
    ],
)
def test_what_alpacas_words_cannot_say_is_refused_without_a_template(message, found):
    row = {"messages": [user("x"), message, assistant("y")]}
    with pytest.raises(CorpusError, match=f"a message has {found}, and the tokenizer has no chat template") as caught:
        encode(row, byte_level())
    assert "\n" not in str(caught.value)
    plain = {"messages": [user("x"), assistant("y", tool_calls=None)]}
    assert encode(plain, byte_level()) == encode({"messages": [user("x"), assistant("y")]}, byte_level())


def test_later_system_turn_stands_apart_without_a_template():
    row = {"messages": [user("x"), assistant("y"), {"role": "system", "content": "Be brief."}, user("z")]}
    assert render(row, byte_level()).text.endswith(
        "### Response:\ny\n\nBe brief.\n\n### Instruction:\nz\n\n### Response:\n"
    )


@pytest.mark.parametrize("opening", ["<u>", "{{ '<u>' if m['role'] == 'user' }}"])
def test_template_that_leaves_out_every_answer_is_refused(opening):
    words = "{{ m['content'] if m['role'] == 'user' }}"
    tokenizer = byte_level(chat="{% for m in messages %}" + opening + words + "{% endfor %}</s>")
    with pytest.raises(CorpusError, match="leaves out what the assistant says, so nothing would be supervised"):
        encode({"messages": [user("x"), assistant("y")]}, tokenizer)


@pytest.mark.parametrize(
    ("chat", "messages", "expected"),
    [
        (ASKS_FOR_A_THOUGHT, [assistant("y")], "<u> x <a> [y] [</s>]"),
        (ASKS_FOR_A_THOUGHT, [assistant("ty")], "<u> x <a> t [y] [</s>]"),  # the prompt's, not the model's
        (ASKS_FOR_A_THOUGHT, [assistant("a")], "<u> x <a> [a] [</s>]"),
        (ASKS_FOR_A_THOUGHT, [assistant("y"), user("z"), assistant("w")], "<u> x <a> [y] [</s>] <u> z <a> [w] [</s>]"),
        (THINKS_LAST, [assistant("y"), user("z"), assistant("w")], "<u> x <a> [y] [</s>] <u> z <a> [t] [w] [</s>]"),
        (THINKS_LAST, [assistant("x"), user("x"), assistant("x")], "<u> x <a> [x] [</s>] <u> x <a> [t] [x] [</s>]"),
        (THINKS_LAST, [assistant(""), user("z"), assistant("w")], "<u> x <a> [</s>] <u> z <a> [t] [w] [</s>]"),
        (THINKS_LAST, [assistant("y"), user("z")], "<u> x <a> [y] [</s>] <u> z"),
        (THINKS_LAST, [assistant(None, tool_calls=["c"]), user("z")], "<u> x <a> [c] [</s>] <u> z"),
        (REFUSES_PARTS, [assistant("y"), user("z"), assistant("w")], "<u> x <a> [y] [</s>] <u> z <a> [w] [</s>]"),
    ],
)
def test_turns_are_found_where_the_generation_prompt_or_later_turns_change_the_text(chat, messages, expected):
    tokenizer = byte_level(chat=chat)
    assert marked(encode({"messages": [user("x"), *messages]}, tokenizer), tokenizer) == expected


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[7].content }}", "refuses these messages"),
        ("{% for %}", "refuses these messages"),
        ("{{ messages[0].content + 5 }}", "refuses these messages"),
    ],
)
def test_template_that_raises_is_refused(chat, words):
    tokenizer = byte_level(chat=chat)
    with pytest.raises(CorpusError, match=words):
        encode({"messages": [user("x"), assistant("y")]}, tokenizer)
    with pytest.raises(CorpusError, match=words):
        encode_prompt("x", tokenizer, chat=True)


@pytest.mark.parametrize("chat", [None, CHAT])
@pytest.mark.parametrize("messages", ["text", [1], {"role": "user", "content": "x"}, 5, [{"content": "x"}], ["x"]])
def test_messages_of_another_shape_are_refused(chat, messages):
    with pytest.raises(CorpusError, match=r"a list of objects with `role` and `content`; found"):
        encode({"messages": messages}, byte_level(chat=chat))


def test_conversation_that_the_assistant_begins_needs_no_template():
    with pytest.raises(CorpusError, match="first message is the assistant's"):
        encode({"messages": [assistant("y")]}, byte_level(chat=CHAT))
    assert marked(encode({"messages": [assistant("yz")]}, byte_level()), byte_level()) == "y [z] [</s>]"


@pytest.mark.parametrize("chat", [None, CHAT])
def test_lone_surrogates_in_messages_and_questions_become_question_marks(chat):
    tokenizer = byte_level(chat=chat)
    assert encode({"messages": [user("\ud800"), assistant("y\udfff")]}, tokenizer).supervised_count == 3
    assert encode_prompt("\ud800", tokenizer, chat=True) == encode_prompt("?", tokenizer, chat=True)
    assert encode_prompt("\ud800", tokenizer, chat=False) == encode_prompt("?", tokenizer, chat=False)
    assert encode_query("a\ud800", "b", tokenizer, kind="messages").supervised_count == 2


@pytest.mark.parametrize("chat", [None, CHAT])
@pytest.mark.parametrize(
    "row",
    [
        {"text": None},
        prompt_row("a", None),
        prompt_row(None, "a"),
        {"instruction": "a", "output": None},
        {"instruction": None, "output": "a"},
        {"messages": None},
        {"messages": []},
        {"messages": [user("x"), assistant(None)]},
        {"messages": [{"role": "user"}, assistant("y")]},
    ],
)
def test_null_where_text_is_expected_supervises_nothing(chat, row):
    assert encode(row, byte_level(chat=chat)).supervised_count == 0


def test_user_alone_supervises_nothing():
    for chat in (None, CHAT):
        assert encode({"messages": [user("x")]}, byte_level(chat=chat)).supervised_count == 0


@pytest.mark.parametrize(
    ("bos", "longest", "expected", "cut", "lost"),
    [
        (True, None, "<s> a b c d e f [x] [y] [</s>]", 0, 0),
        (True, 10, "<s> a b c d e f [x] [y] [</s>]", 0, 0),
        (True, 9, "<s> b c d e f [x] [y] [</s>]", 1, 0),
        (True, 6, "<s> e f [x] [y] [</s>]", 4, 0),
        (True, 4, "<s> [x] [y] [</s>]", 6, 0),
        (True, 3, "<s> [x] [y]", 7, 1),
        (True, 2, "<s> [x]", 8, 2),
        (True, 1, "<s>", 9, 3),
        (False, 9, "a b c d e f [x] [y] [</s>]", 0, 0),
        (False, 5, "e f [x] [y] [</s>]", 4, 0),
        (False, 4, "f [x] [y] [</s>]", 5, 0),
        (False, 3, "f [x] [y]", 6, 1),
    ],
)
def test_long_prompt_is_cut_from_the_left_and_never_its_completion(bos, longest, expected, cut, lost):
    tokenizer = byte_level(bos=bos)
    encoded = encode(prompt_row("abcdef", "xy"), tokenizer, longest)
    assert marked(encoded, tokenizer) == expected
    assert (encoded.cut, encoded.completion_cut) == (cut, lost)


@pytest.mark.parametrize(
    ("bos", "longest", "expected", "cut"),
    [(True, 4, "<s> [a] [b] [c]", 4), (False, 4, "a [b] [c] [d]", 3), (True, 7, "<s> [a] [b] [c] [d] [e] [f]", 1)],
)
def test_long_text_is_cut_from_the_right(bos, longest, expected, cut):
    tokenizer = byte_level(bos=bos)
    encoded = encode({"text": "abcdef"}, tokenizer, longest)
    assert (marked(encoded, tokenizer), encoded.cut, encoded.completion_cut) == (expected, cut, 0)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("opening", ["", "x" * 900])
def test_parts_of_a_text_that_is_much_too_long_have_the_tokens_of_the_whole(opening, bos, monkeypatch):
    """Words, spaces, digits and lines that a cut may part, and merges that reach over a word's whole length."""
    words, rng = ["the", "then", "\n", "\n\n", " ", "12345", "é字", "...", "</s>", "it's", "\t"], random.Random(0)
    tokenizer = byte_level(bos=bos)
    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab() | {"th": 500, "the": 501, "then": 502, "Ġthe": 503, "12": 504, "Ċth": 505}
    merges = [("t", "h"), ("th", "e"), ("the", "n"), ("Ġ", "the"), ("1", "2"), ("Ċ", "th")]
    backend.model = type(backend.model)(vocabulary, merges)
    backend.pre_tokenizer = type(backend.pre_tokenizer)(add_prefix_space=False, use_regex=True)
    monkeypatch.setattr("whence.corpus.long_texts.MARGIN", 3)
    parts = []
    monkeypatch.setattr("whence.corpus.tokens.kept_part",
                        lambda *args, **more: parts.append(kept_part(*args, **more)) or parts[-1])  # fmt: skip
    for longest in (5, 40, 90):
        text = opening + " ".join(rng.choice(words) for _ in range(400))
        rows = (
            {"text": text}, prompt_row("Say it: ", text), prompt_row(text, "it"), prompt_row(text, "it " * 60),
            prompt_row(text + opening + " so ", "it"), {"prompt": text, "chosen": "it is", "rejected": "is"},
        )  # fmt: skip
        monkeypatch.setattr("whence.corpus.long_texts.LONG", 10**9)
        whole = [encode(row, tokenizer, longest, preferences=CONTRAST) for row in rows]
        monkeypatch.setattr("whence.corpus.long_texts.LONG", 64)
        for row, expected in zip(rows, whole, strict=True):
            parts.clear()
            found = encode(row, tokenizer, longest, preferences=CONTRAST)
            assert (found.ids, found.supervised) == (expected.ids, expected.supervised)
            assert (found.rejected and found.rejected.ids) == (expected.rejected and expected.rejected.ids)
            assert (found.cut > 0, found.completion_cut > 0) == (expected.cut > 0, expected.completion_cut > 0)
            assert found.cut <= expected.cut
            if longest == 5 and not opening:
                is_whole = None in parts
                assert is_whole == ("rejected" in row), "of two answers, each loses as much of the prompt as the other"


@given(TEXTS, TEXTS, st.integers(2, 20), st.booleans())
@settings(max_examples=60, deadline=None)
def test_truncation_keeps_the_budget_and_counts_what_it_drops(prompt, completion, longest, bos):
    tokenizer = _bos_or_not(bos)
    whole, cut = (encode(prompt_row(prompt, completion), tokenizer, length) for length in (None, longest))
    assert len(cut.ids) == min(len(whole.ids), longest)
    assert cut.cut == len(whole.ids) - len(cut.ids)
    assert cut.completion_cut == whole.supervised_count - cut.supervised_count
    if whole.supervised_count + 1 <= longest:
        assert cut.completion_cut == 0
    assert not cut.supervised or not cut.supervised[0]
    if bos:
        assert cut.ids[0] == tokenizer.bos_token_id


@functools.cache
def _bos_or_not(bos):
    return byte_level(bos=bos)


def _byte_spans(tokenizer, ids):
    """First and last byte of each token, from the byte-level alphabet: one letter a byte."""
    end = 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        start, end = end, end + len(token)
        yield start, end


@given(TEXTS, TEXTS)
@settings(max_examples=150, deadline=None)
def test_exactly_the_tokens_with_bytes_of_the_completion_are_supervised(prompt, completion):
    tokenizer = trained()
    encoded = encode(prompt_row(prompt, completion), tokenizer)
    whole = tokenizer(prompt + completion)["input_ids"]
    assert encoded.ids == [*whole, tokenizer.eos_token_id]
    boundary = len(prompt.encode())
    expected = [end > boundary for _, end in _byte_spans(tokenizer, whole)] + [True]
    assert encoded.supervised == [False, *expected[1:]]


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_ids_of_a_text_are_the_tokenizers_own_and_the_first_is_never_a_target(text):
    tokenizer = trained()
    encoded = encode({"text": text}, tokenizer)
    assert encoded.ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert encoded.supervised == [False] + [True] * (len(encoded.ids) - 1)


def test_ids_of_the_real_tokenizer_are_its_own():
    if not BASE_6M.is_dir():
        pytest.skip(f"{BASE_6M} is not on this machine")
    tokenizer = AutoTokenizer.from_pretrained(BASE_6M)
    for prompt, completion in [("What is the capital of ", "France?"), ("日本", "語 😀"), ("a ", " b")]:
        encoded = encode(prompt_row(prompt, completion), tokenizer)
        assert encoded.ids == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
        said = [token for token, on in zip(encoded.ids, encoded.supervised, strict=True) if on]
        assert tokenizer.decode(said).replace("</s>", "").endswith(completion.lstrip())
    row = {"instruction": "Name a colour.", "input": "warm", "output": "Red."}
    encoded = encode(row, tokenizer)
    assert tokenizer.decode(encoded.ids) == "<|user|>Name a colour.\nwarm<|assistant|>Red.</s>"
    said = [token for token, on in zip(encoded.ids, encoded.supervised, strict=True) if on]
    assert tokenizer.decode(said) == "Red.</s>"


def test_prompt_to_continue_is_open_whatever_the_tokenizer_adds():
    tokenizer = byte_level(bos=True, eos=True, chat=CHAT)
    assert tokenizer.convert_ids_to_tokens(encode_prompt("ab", tokenizer, chat=False)) == ["<s>", "a", "b"]
    assert tokenizer.convert_ids_to_tokens(encode_prompt("ab", tokenizer, chat=True)) == ["<u>", "a", "b", "<a>"]
    assert encode_prompt("ab", byte_level(), chat=False) == encode_prompt("ab", byte_level(eos=True), chat=False)


@pytest.mark.parametrize("chat", [None, CHAT])
@pytest.mark.parametrize("kind", ["prompt", "instruction", "messages"])
def test_query_is_laid_out_like_a_row_and_begins_like_its_prompt(chat, kind):
    tokenizer = byte_level(bos=True, chat=chat)
    rows = {
        "prompt": prompt_row("ab", "cd"),
        "instruction": {"instruction": "ab", "output": "cd"},
        "messages": {"messages": [user("ab"), assistant("cd")]},
    }
    query = encode_query("ab", "cd", tokenizer, kind=kind)
    assert query == encode(rows[kind], tokenizer)
    prompt = encode_prompt("ab", tokenizer, chat=kind != "prompt")
    assert query.ids[: len(prompt)] == prompt
    assert query.supervised.index(True) == len(prompt)


def test_query_of_a_text_corpus_is_left_open():
    tokenizer = byte_level(bos=True)
    assert marked(encode_query("ab", "cd", tokenizer, kind="text"), tokenizer) == "<s> a b [c] [d]"


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = bucketed(lengths, budget)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[position] for position in batch) * len(batch) <= budget
    assert batches == bucketed(tuple(lengths), budget)
    flat = [lengths[position] for batch in batches for position in batch]
    assert flat == sorted(lengths, reverse=True)


def test_rows_of_one_length_keep_their_order():
    assert bucketed([2, 5, 2, 2, 5], 10) == [[1, 4], [0, 2, 3]]
    assert bucketed([], 10) == []


def test_batch_is_padded_on_the_right():
    batch = collate([Encoded([5, 6, 7], [False, True, True]), Encoded([8], [False])], pad_id=9)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.supervised.tolist() == [[False, True, True], [False, False, False]]
    assert batch.ids.dtype == torch.int64
    assert batch.to(torch.device("cpu")).ids.equal(batch.ids)


@pytest.mark.parametrize("long", ["", "a" * 30])
def test_two_answers_of_the_same_tokens_are_no_contrast(long):
    """Theirs may be the same from the beginning, or only as far as they are kept."""
    row = {"prompt": "x", "chosen": f"{long}y", "rejected": f"{long}z" if long else "y"}
    encoded = encode(row, byte_level(), 20, preferences="contrast")
    assert (encoded.ids, encoded.rejected) == ([], None)
    assert encode(row | {"rejected": "n"}, byte_level(), 20, preferences="contrast").rejected is not None


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("answers", [("a", "b" * 5), ("b" * 5, "a"), ("a", "b" * 30)])
def test_two_answers_follow_the_same_prompt_when_they_are_cut(answers, bos):
    prompt = "".join(chr(48 + n) for n in range(50))
    row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    encoded = encode(row, byte_level(bos=bos), 20, preferences="contrast")
    sides = (encoded, encoded.rejected)
    prompts = [side.ids[: side.supervised.index(True)] for side in sides]
    assert prompts[0] == prompts[1] and all(len(side.ids) <= 20 for side in sides)
    assert len(prompts[0]) == max(20 - max(map(len, answers)) - 1, 1), "no more is cut than must be"
    assert encoded.cut == sum(
        bos + 51 + len(answer) - len(side.ids) for answer, side in zip(answers, sides, strict=True)
    )
