"""One open index asked from many threads at once gives each the answer that it would get alone."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from conftest import corpus_rows, random_examples, tiny_model
from whence.corpus.tokens import collate
from whence.gradients.capture import gradients
from whence.indexing.build import index
from whence.indexing.opening import open_index
from whence.tracing.pipeline import trace

THREADS = 64
QUESTIONS = 8


@pytest.fixture(autouse=True)
def many_switches():
    """Threads are switched fifty times as often as Python does it by itself: what can go wrong goes wrong soon."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def together(ask, count):
    """What each of so many calls gives, all in flight at once."""
    ready = threading.Barrier(count)

    def call(number):
        ready.wait()
        return ask(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def shown(found):
    """A trace's numbers."""
    hits = [(hit.id, hit.score, hit.exact or 0.0, hit.null.z if hit.null else 0.0) for hit in found.hits]
    return found.answers[0].completion, found.needed_z, hits


def same(found, right):
    """The same answer, to the rounding of kernels."""
    assert found[0] == right[0]
    assert (found[1] or 0.0) == pytest.approx(right[1] or 0.0, rel=1e-3)
    for (name, *numbers), (expected, *others) in zip(found[2], right[2], strict=True):
        assert name == expected and numbers == pytest.approx(others, rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def built(tiny_run, tmp_path_factory):
    """Two checkpoints, of which one is loaded at a time, and rows enough for a null."""
    out = tmp_path_factory.mktemp("sharing") / "index"
    index(
        tiny_run, corpus_rows(40), out, checkpoints="all", projection="two_sided", width=4, codec="int8", progress=False
    )
    return out


@pytest.fixture(scope="module")
def simple(tiny_llama, tmp_path_factory):
    """One checkpoint, which stays loaded."""
    out = tmp_path_factory.mktemp("sharing") / "index"
    return index(
        tiny_llama, corpus_rows(40), out, projection="two_sided", width=4, codec="int8", progress=False
    ).store.place.root


def asked(opened, number):
    """A question of its own for each number, each in another way."""
    completion = None if number == 0 else f" yes, {number}" + "?" * number
    how = {"exact": number == 1, "tokens": number == 2, "null": number == 3}
    return shown(trace(opened, f"{number} and 3?", completion, top=3, max_new_tokens=4, **how))


def test_many_threads_get_the_answers_of_one(simple):
    alone, shared = open_index(simple), open_index(simple)
    expected = [asked(alone, number) for number in range(QUESTIONS)]
    for number, found in enumerate(together(lambda number: asked(shared, number % QUESTIONS), THREADS)):
        same(found, expected[number % QUESTIONS])


def test_checkpoints_and_indexes_of_one_model_take_turns(built):
    one, other = open_index(built), open_index(built)
    other.adopt(one.model(), None)  # the same module
    expected = [asked(one, number) for number in (0, 1)]
    for number, found in enumerate(together(lambda number: asked((one, other)[number % 2], number // 2), 4)):
        same(found, expected[number // 2])


def test_passes_through_a_bare_model_take_turns():
    model = tiny_model("llama")
    batches = [collate(random_examples(3, seed)) for seed in range(QUESTIONS)]

    def ask(number):
        return gradients(model, model.layers(), batches[number])[0]

    expected = [ask(number) for number in range(QUESTIONS)]
    torch.testing.assert_close(together(ask, QUESTIONS), expected)


def test_scans_and_rows_are_read_by_many_threads(built):
    store = open_index(built).store
    queries = torch.randn(2, 64, store.manifest.width, generator=torch.Generator().manual_seed(0))

    def ask(number):
        ranking, opposing = store.top_k(queries[:, number : number + 1 + number % 3], torch.tensor([0.7, 0.3]), m=5)
        return ranking.rows, ranking.scores, opposing.rows, store.vectors([number % 40, 3])[0]

    expected = [ask(number) for number in range(THREADS // 2)]
    store = open_index(built).store  # nothing is open or cached
    for found, right in zip(together(ask, THREADS // 2), expected, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_a_scan_does_not_depend_on_the_dtype_that_a_loading_model_makes_the_default(built, method):
    """Transformers sets torch's default dtype, which is the whole process', while it makes a model in 16 bits."""
    store = open_index(built).store
    queries = torch.randn(2, 3, store.manifest.width, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.7, 0.3])

    def ask():
        rankings = store.top_k(queries, weights, m=5, cosine=method == "cosine")
        scores = torch.cat([block for _, block in store.scores(queries, weights)], 1)
        return [*(vars(ranking) for ranking in rankings), scores, *store.vectors([7, 3, 39])]

    expected = ask()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = ask()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
