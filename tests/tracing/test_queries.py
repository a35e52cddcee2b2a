"""A query becomes the tokens that it is about, whatever it is about."""

import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model, write_jsonl
from tiny_tokenizers import trained
from whence.corpus.tokens import encode_prompt, encode_query
from whence.errors import SettingError
from whence.models.generation import generate
from whence.models.loading import load_model
from whence.tracing.queries import Query, Sampling, encode_queries, queries_of

PROMPT = "why?"


@pytest.fixture(scope="module")
def model(tiny_llama):
    """One token a byte."""
    return load_model(tiny_llama)


@pytest.fixture(scope="module")
def wordy():
    """Tokens of several characters."""
    return with_tokenizer(trained())


def with_tokenizer(tokenizer):
    loaded = replace(tiny_model("llama"), tokenizer=tokenizer)
    loaded.base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return loaded


def byte_fallback():
    pieces = ["<unk>", "<s>", "</s>", *"abwhy?", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def asked(loaded, completion, span=None, contrast=None, kind="prompt"):
    (found,) = encode_queries([Query(PROMPT, completion, span, contrast)], loaded, kind=kind)
    return found


def marked(found):
    """The completion's tokens, 1 where they are asked about."""
    return "".join(str(int(is_asked)) for is_asked in found.answer.asked)


# -- spans


@pytest.mark.parametrize(
    ("completion", "span", "expected"),
    [
        ("aXYb", "XY", "01100"),  # the closing token is the last
        ("xyx", "x", "1000"),  # where it first occurs
        ("ab", "ab</s>", "111"),
        ("aéb", "é", "01100"),  # a character of two tokens
        ("aéb", "b", "00010"),
        ("é漢b", "漢", "0011100"),
        ("é漢b", "é", "1100000"),
        ("a😀b", "a", "1000000"),
        ("a😀b", "😀b", "0111110"),
        ("xyx", (2, 3), "0010"),
        ("xyx", (0, 4), "1111"),
    ],
)
def test_a_span_asks_about_the_tokens_that_hold_its_characters(model, completion, span, expected):
    found = asked(model, completion, span)
    assert marked(found) == expected
    (sequence,) = found.sequences
    whole = encode_query(PROMPT, completion, model.tokenizer, kind="prompt")
    first = len(whole.ids) - len(expected)
    assert sequence.encoded.ids == whole.ids
    assert sequence.encoded.supervised == [False] * first + [mark == "1" for mark in expected]


def test_a_span_within_tokens_asks_about_each_that_it_touches(wordy):
    completion = "the cat sat on the mat"
    found = asked(wordy, completion, "he cat s")
    tokens = found.answer.tokens
    assert any(len(token) > 2 for token in tokens), "tokens of one character would show nothing"
    begin, expected = 0, ""
    for token in tokens:
        expected += str(int(begin < completion.index("he cat s") + 8 and begin + len(token) > 1))
        begin += len(token)
    assert marked(found) == expected
    assert "1" in expected[:2]


@pytest.mark.parametrize(("span", "expected"), [("漢", "011100"), ("b", "000010"), ("a", "100000")])
def test_half_a_character_does_not_reach_beyond_it_where_each_byte_is_shown(span, expected):
    """As sentencepiece decodes: one U+FFFD for each byte of a character that is not whole."""
    loaded = with_tokenizer(byte_fallback())
    assert len(loaded.tokenizer.decode(loaded.tokenizer("漢")["input_ids"][:2])) == 2
    assert marked(asked(loaded, "a漢b", span)) == expected


def test_a_span_of_a_generated_completion_is_of_its_own_tokens(model):
    (plain,) = encode_queries([Query(PROMPT)], model, kind="prompt", sampling=Sampling(max_new_tokens=5))
    (found,) = encode_queries([Query(PROMPT, span=(1, 3))], model, kind="prompt", sampling=Sampling(max_new_tokens=5))
    assert found.answer.completion == plain.answer.completion
    assert marked(found) == "01100"
    assert found.sequences[0].encoded.supervised_count == 2


@pytest.mark.parametrize("span", ["cat", "bottles "])
def test_a_text_that_does_not_occur_is_refused_with_what_was_said(model, span):
    with pytest.raises(SettingError, match=f"--span '{span}' does not occur in the completion 'ten bottles</s>'"):
        asked(model, "ten bottles", span)


@pytest.mark.parametrize("span", ["", " ", "\n\t"])
def test_a_span_without_words_is_said_to_have_none(model, span):
    with pytest.raises(SettingError, match=r"^--span '.*' has no words\. Give some of the completion's, or its tokens"):
        asked(model, "ten bottles", span)


@pytest.mark.parametrize("span", [(0, 5), (2, 2), (3, 2), (-1, 2), (9, 12)])
def test_tokens_that_are_not_there_are_refused_with_those_that_are(model, span):
    with pytest.raises(SettingError, match=f"--span-tokens {span[0]}:{span[1]}: the completion has the tokens 0:4"):
        asked(model, "xyx", span)


# -- contrasts


def test_a_contrast_is_two_completions_of_one_prompt_the_other_with_a_minus(model):
    found = asked(model, " yes", "ye", " no")
    assert [sequence.sign for sequence in found.sequences] == [1, -1]
    assert found.sequences[0].encoded.supervised_count == 2
    assert found.sequences[1].encoded == encode_query(PROMPT, " no", model.tokenizer, kind="prompt")
    assert found.answer.contrast_tokens == [" ", "n", "o", "</s>"]
    assert found.answer.query_tokens() == ["y", "e", " ", "n", "o", "</s>"]
    other = asked(model, " no").answer
    assert found.answer.contrast_probabilities == other.probabilities


def test_a_query_without_a_contrast_is_one_part(model):
    assert [sequence.sign for sequence in asked(model, " yes").sequences] == [1]


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        ("", "the completion has no token"),
        ("c" * 96, "the model's context is 96"),
        (" yes", "the completion and its contrast are the same tokens, ' yes'"),
        (Query("c"), "is a query without a completion"),
    ],
)
def test_a_contrast_that_is_no_completion_is_refused(model, contrast, message):
    with pytest.raises(SettingError, match=message):
        asked(model, " yes", contrast=contrast)


# -- the model's own answer


def said(model, prompts, **how):
    ids = [encode_prompt(prompt, model.tokenizer, chat=False) for prompt in prompts]
    return generate(model, ids, 12, **how)


def test_a_sampled_answer_depends_on_its_seed_alone(model):
    prompts = ["why?", "how?", "a longer one"]
    together = said(model, prompts, temperature=1.0, seed=3)
    assert [said(model, [prompt], temperature=1.0, seed=3)[0] for prompt in prompts] == together
    torch.rand(5)  # nor on what else was drawn
    assert said(model, prompts[::-1], temperature=1.0, seed=3) == together[::-1]
    assert said(model, prompts, temperature=1.0, seed=4) != together


def test_sampling_leaves_the_callers_random_numbers_alone(model):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    said(model, ["why?"], temperature=1.0)
    assert torch.rand(1) == expected


def test_temperature_0_is_greedy_and_a_small_one_nearly_so(model):
    assert said(model, ["why?"], temperature=0.0, seed=1) == said(model, ["why?"], seed=2)
    assert said(model, ["why?"], temperature=1e-4, seed=5) == said(model, ["why?"])
    assert said(model, ["why?"], temperature=5.0, seed=5) != said(model, ["why?"])


def test_tokens_are_drawn_from_the_models_own_softmax(model):
    """At temperature 2, over 300 seeds: the mean of -log p is within 5 standard errors of the entropy."""
    ids = encode_prompt("why?", model.tokenizer, chat=False)
    chances = (model.model(input_ids=torch.tensor([ids])).logits[0, -1].double() / 2).log_softmax(0)
    drawn = torch.tensor([generate(model, [ids], 1, temperature=2.0, seed=seed)[0][0] for seed in range(300)])
    entropy = -(chances.exp() * chances).sum()
    deviation = (chances.exp() * (chances + entropy).square()).sum().sqrt() / 300**0.5
    assert abs(-chances[drawn].mean() - entropy) < 5 * deviation


def test_a_sampled_query_is_answered_as_the_generator_says(model):
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=3)
    (found,) = encode_queries([Query(PROMPT)], model, kind="prompt", sampling=sampling)
    (new,) = said(model, [PROMPT], temperature=1.0, seed=3)
    assert found.sequences[0].encoded.ids[-len(new) :] == new
    assert found.answer.is_generated


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(SettingError, match="--temperature"):
        Sampling(temperature=temperature)


# -- files of many


def test_columns_of_a_file_are_read(tmp_path):
    rows = [
        {"prompt": "a", "completion": "bc", "span": "b", "contrast": "d"},
        {"prompt": "a", "span": None},
        {"instruction": "do", "input": "it", "output": "done", "contrast": "no"},
        {"instruction": "do"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}], "span_tokens": "0:2"},
        {"messages": [{"role": "user", "content": "a"}]},
    ]
    expected = [
        Query("a", "bc", "b", "d"),
        Query("a"),
        Query("do", "done", None, "no", {"input": "it"}),
        Query("do"),
        Query("a", "bc", (0, 2)),
        Query("a"),
    ]
    assert queries_of(rows) == expected
    assert queries_of(write_jsonl(tmp_path / "queries.jsonl", rows)) == expected
    columns = {name for row in rows for name in row}
    table = pyarrow.Table.from_pylist([dict.fromkeys(columns) | row for row in rows[:2]])
    pyarrow.parquet.write_table(table, tmp_path / "queries.parquet")
    assert queries_of(tmp_path / "queries.parquet") == expected[:2]


def test_an_empty_cell_of_a_csv_file_is_none(tmp_path):
    file = tmp_path / "queries.csv"
    file.write_text("prompt,completion,span,contrast\na,bc,,\na,bc,b,d\na,,,\n")
    assert queries_of(file) == [Query("a", "bc"), Query("a", "bc", "b", "d"), Query("a")]
    file.write_text("prompt\na\nb\n")
    assert queries_of(file) == [Query("a"), Query("b")]
    file.write_text("text\na\n")
    with pytest.raises(
        SettingError, match=r"queries\.csv:2: a query needs a text as `prompt` .*; found the columns text$"
    ):
        queries_of(file)


def test_nothing_to_ask_is_said_with_the_flag():
    with pytest.raises(SettingError, match=r"^--controls: no query in it"):
        queries_of([], flag="--controls")


def test_defaults_are_for_queries_that_have_none_of_their_own():
    rows = [Query("a", "b"), Query("a", "b", "c", "d"), {"prompt": "a", "span": "e"}]
    assert queries_of(rows, Query("", None, (0, 1), "x")) == [
        Query("a", "b", (0, 1), "x"),
        Query("a", "b", "c", "d"),
        Query("a", None, "e", "x"),
    ]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "a", "span": [0, 1]}, "the columns prompt, span"),
        ({"prompt": "a", "contrast": 3}, "the columns prompt, contrast"),
        ({"prompt": None}, "the columns prompt"),
        ({"messages": [{"role": "system", "content": "be"}]}, "the columns messages"),
        ({"messages": [{"role": "user", "content": None}]}, "the columns messages"),
    ],
)
def test_a_row_that_is_no_query_is_named_by_its_place(tmp_path, row, found):
    with pytest.raises(SettingError, match=rf"query 1: a query needs .* found {found}$"):
        queries_of([{"prompt": "fine"}, row])
    file = tmp_path / "queries.jsonl"
    file.write_text('{"prompt": "fine"}\n\n' + json.dumps(row) + "\n")
    with pytest.raises(SettingError, match=rf"queries\.jsonl:3: a query needs .* found {found}$"):
        queries_of(file)


@pytest.mark.parametrize("tokens", ["3", "1:b", ":2", "1-2"])
def test_a_range_that_is_none_is_named_by_its_place(tokens):
    with pytest.raises(SettingError, match=f"^query 0: span_tokens {tokens}: FROM:TO is expected"):
        queries_of([{"prompt": "a", "span_tokens": tokens}])
    with pytest.raises(SettingError, match="no `span` beside it"):
        queries_of([{"prompt": "a", "span": "a", "span_tokens": "1:2"}])
