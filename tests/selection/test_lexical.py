"""BM25 and DSIR, against cases worked by hand."""

import itertools
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_views import Rows, asking, each, text_alone, texts

from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.selection.protocols import QueryText, Target
from whence.selection.scorers.lexical import BM25, DSIR, grams, kl_reduction, words


def test_bm25_worked_by_hand():
    """Four rows of 3, 2, 1 and 2 words: the mean is 2. `red` is in 3 of them, `fox` in 1, `owl` in 0.

    idf(red) = ln(1 + 1.5 / 3.5), idf(fox) = ln(1 + 3.5 / 1.5); a row of |row| words divides by
    tf + 1.5 (0.25 + 0.75 |row| / 2).
    """
    view = texts("Red red FOX", "red hen", "red", "blue hen")
    red, fox = math.log(1 + 1.5 / 3.5), math.log(1 + 3.5 / 1.5)
    lengths = {words: 1.5 * (0.25 + 0.75 * words / 2) for words in (1, 2, 3)}
    expected = [
        red * 2 / (2 + lengths[3]) + fox * 1 / (1 + lengths[3]),
        red * 1 / (1 + lengths[2]),
        red * 1 / (1 + lengths[1]),
        0.0,
    ]
    scores = BM25()(view, asking("A red fox? An owl!", "red red", "owl"))
    torch.testing.assert_close(scores[0], torch.tensor(expected))
    once = BM25()(view, asking("red"))[0]
    torch.testing.assert_close(scores[1], 2 * once)
    assert scores[2].tolist() == [0, 0, 0, 0]


def test_bm25_settings_are_those_of_the_formula():
    """With k1 = 0 a word counts once and length does not; with b = 0 length does not."""
    view = texts("red red fox", "red", "hen")
    idf = math.log(1 + 1.5 / 2.5)
    torch.testing.assert_close(BM25(k1=0.0)(view, asking("red")), torch.tensor([[idf, idf, 0.0]]))
    expected = torch.tensor([[idf * 2 / (2 + 1.2), idf / (1 + 1.2), 0.0]])
    torch.testing.assert_close(BM25(k1=1.2, b=0.0)(view, asking("red")), expected)


def test_bm25_reads_prompt_and_completion_of_every_layout():
    rows = [
        {"text": "Heron"},
        {"prompt": "heron?", "completion": "x"},
        {"prompt": "x", "completion": "HERON"},
        {"instruction": "heron", "input": None, "output": "x"},
        {"messages": [{"role": "user", "content": "heron"}, {"role": "assistant", "content": "x"}]},
        {"text": "x"},
    ]
    scores = BM25()(Rows(rows, None), each([QueryText("The", "heron", Encoded([], []))]))
    assert (scores[0] > 0).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("listed", [["", "?!", ""], [""]])
def test_bm25_of_a_corpus_without_words_is_zero(listed):
    assert BM25()(texts(*listed), asking("red fox", "")).tolist() == [[0] * len(listed)] * 2


def test_bm25_of_a_query_without_words_is_zero():
    assert BM25()(texts("red fox", "hen"), asking("?", "")).tolist() == [[0, 0], [0, 0]]


def test_bm25_says_nothing_while_it_works(caplog, capfd):
    with caplog.at_level(logging.NOTSET):
        BM25()(texts("red fox", "hen"), asking("red"))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_bm25_of_a_target_is_the_mean_over_its_queries_those_without_words_too():
    view = texts("red fox", "hen", "red")
    one, two = BM25()(view, asking("red", "fox"))
    found = BM25()(view, [Target("both", [text_alone("red"), text_alone("fox"), text_alone("?")])])
    torch.testing.assert_close(found[0], (one + two) / 3)


SUMS = {"least_words": 1, "length_normalised": False, "backoff": 0.0}
THEIRS = {"hash": "sha256", **SUMS}
"""As the released code does."""


def test_dsir_worked_by_hand():
    """Pool: `a b` has the n-grams a, b, ab; `b c c` has b, c, c, bc, cc: a 1/8, b 2/8, c 2/8, ab, bc and cc 1/8 each.

    Target: `A b, b` without its comma has a 1/5, b 2/5, ab 1/5, bb 1/5. So a, b and ab are 8/5 as frequent there.
    """
    nothing = math.log(1e-8)
    ratio, c, pair = math.log(8 / 5), nothing - math.log(2 / 8), nothing - math.log(1 / 8)
    expected = [[3 * ratio, ratio + 2 * c + 2 * pair]]
    for settings in (THEIRS, SUMS):
        scores = DSIR(**settings)(texts("A b", "b c  C"), asking("a b b"))
        torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    normalised = DSIR(**THEIRS | {"length_normalised": True})(texts("A b", "b c  C"), asking("a b b"))
    torch.testing.assert_close(normalised, torch.tensor([[ratio, expected[0][1] / 5]]), rtol=1e-5, atol=1e-5)
    known = math.log((8 / 5 + 1) / 2)  # half of the target's distribution is the pool's
    smooth = DSIR(least_words=1)(texts("A b", "b c  C"), asking("a b b"))
    torch.testing.assert_close(smooth, torch.tensor([[known, (known + 4 * math.log(1 / 2)) / 5]]), rtol=1e-5, atol=1e-5)


def test_dsir_takes_a_targets_queries_together():
    view = texts("a b", "b c c")
    whole = DSIR(**THEIRS)(view, [Target("t", [text_alone("a b"), text_alone("b"), text_alone("")])])
    half = math.log(1 / 4 + 1e-8) - math.log(1 / 8 + 1e-8)  # a, b, b, ab: of four n-grams
    assert whole[0, 0].item() == pytest.approx(half + half + math.log(2 / 4) - math.log(2 / 8), rel=1e-5)


def test_dsirs_pseudo_count_is_added_to_every_bucket_of_the_target():
    scores = DSIR(buckets=2, pseudo_count=1.0, **SUMS)(texts("a", "a"), asking("a"))
    assert scores[0].tolist() == pytest.approx([math.log(2 / 3)] * 2, rel=1e-5)


def test_sha256_puts_ngrams_where_the_released_code_does():
    """`int(sha256(ngram), 16) % 10000`, by sha256sum and a calculator."""
    counts, lengths = DSIR(hash="sha256")._gram_counts(["Hello", "night heron"])
    assert counts[[0], :].nonzero()[1].tolist() == [7620]
    assert 8382 in counts[[1], :].nonzero()[1].tolist()
    assert counts.sum(1).tolist() == [1, 3]
    assert lengths.tolist() == [1, 2]


def test_dsir_leaves_short_rows_out():
    view = texts("one two three", "one, two", "one two", "", "...")
    assert torch.isfinite(DSIR(least_words=3)(view, asking("one two")))[0].tolist() == [True, True, False, False, False]
    assert torch.isfinite(DSIR(least_words=0)(view, asking("one two")))[0].tolist() == [True, True, True, False, True]
    assert (DSIR()(view, asking("one two")) == -math.inf).all()


def test_dsir_refuses_a_target_without_words_and_settings_without_meaning():
    with pytest.raises(SettingError, match="target 'query 1' has no word for dsir"):
        DSIR()(texts("one"), asking("one", " \n"))
    with pytest.raises(SettingError, match="hash 'md5' of dsir: choose one of crc32, sha256"):
        DSIR(hash="md5")
    with pytest.raises(SettingError, match="buckets 0"):
        DSIR(buckets=0)
    with pytest.raises(SettingError, match="backoff 1"):
        DSIR(backoff=1.0)


GERMAN = (
    "Der Hund läuft schnell durch den Garten und bellt", "Die Katze schläft heute auf dem alten Sofa",
    "Wir fahren morgen mit dem Zug nach Berlin", "Sie kauft im Supermarkt frisches Brot für die Familie",
    "Das Wetter ist heute leider sehr schlecht", "Ich lese gern Bücher über die Geschichte der Stadt",
    "Er hat gestern ein neues Fahrrad gekauft", "Die Kinder spielen nach der Schule gern im Garten",
)  # fmt: skip
CHINESE = (
    "我今天早上去超市买了很多新鲜的水果",
    "他喜欢在周末和朋友一起打篮球",
    "请告诉我图书馆在哪里谢谢你",
    "科学家发现了一种新的治疗方法",
)
ENGLISH = (
    "Explain in three sentences why the sky looks blue to us.", "Write a short poem about a quiet evening at the sea.",
    "List five healthy snacks that a child can make alone.", "What is the capital of France, and how old is it?",
)  # fmt: skip


def test_dsir_chooses_german_rows_for_a_german_task_whatever_script_has_few_words():
    german = [f"{first}, {second}." for first, second in itertools.permutations(GERMAN[:6], 2)]
    ends = ("。", "\uff01", "是吗\uff1f")
    chinese = ["\uff0c".join(some) + end for some in itertools.permutations(CHINESE) for end in ends]
    english = [f"{first} {second}" for first, second in itertools.permutations(ENGLISH, 2)]
    scores = DSIR(least_words=5)(texts(*german, *chinese, *english), asking(" ".join(GERMAN[6:])))[0]
    assert set(scores.topk(len(german)).indices.tolist()) == set(range(len(german)))
    published = DSIR(**SUMS | {"least_words": 5})(texts(*german, *chinese), asking(" ".join(GERMAN[6:])))[0]
    assert published[: len(german)].mean() > published[len(german) :].mean()  # characters are words there too


@pytest.mark.parametrize("text", ["他喜欢打篮球", "ねこがすき", "ลาวา"])
def test_scripts_without_spaces_have_a_word_for_each_character(text):
    assert words(text) == [character for character in text if character.isalnum()]
    assert len(grams(text)[0]) == 2 * len(text) - 1
    hits = BM25()(texts(f"x {text}", "y", "z"), asking(text[2:4]))[0]
    assert hits[0] > 0 and hits[1:].tolist() == [0, 0]


def test_dsir_finds_the_rows_of_the_targets_kind():
    sums = [f"Tom has {n} apples and buys {n + 3} more, so he has {2 * n + 3} apples." for n in range(20)]
    tales = [f"The old king of the hill slept for {n} nights and dreamt of the sea." for n in range(20)]
    asked = "Ann has 41 pears and buys 2 more, so she has 43 pears."
    scores = DSIR()(texts(*tales, *sums), asking(asked))[0]
    assert scores[20:].min() > scores[:20].max()


@given(st.text(max_size=30))
def test_grams_are_all_the_words_and_their_pairs(text):
    found, length = grams(text)
    assert len(found) == length + max(length - 1, 0)
    assert "".join(found[:length]) == "".join(text.lower().split())


def test_kl_reduction_worked_by_hand():
    """Target `a b` is a third each of a, b, ab; the raw texts have each of them once among six n-grams."""
    assert kl_reduction(["a b"], ["a b"], ["a b", "c d"]) == pytest.approx(math.log(2), rel=1e-6)
    assert kl_reduction(["a b", "c d"], ["a b"], ["a b", "c d"]) == pytest.approx(0, abs=1e-9)
    assert kl_reduction(["c d"], ["a b"], ["a b", "c d"], hash="sha256") < -10
    with pytest.raises(SettingError, match="selection of a KL reduction"):
        kl_reduction([""], ["a"], ["b"])
