"""LESS, influence and DataInf against slow computations of their formulas, on a view whose vectors are given."""

import pytest
import torch

from whence.corpus.reading import open_corpus
from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.selection.protocols import GradientView, QueryText, Target
from whence.selection.scorers import influence
from whence.selection.scorers.influence import LESS, DataInf, Influence, Reach
from whence.selection.views import CorpusView


class Given:
    """Vectors as given: two layers of 3 and 2 columns, or one that shares all."""

    tokens_per_batch, rows = 64, 0

    def __init__(self, rows, queries, *, weights=(1.0,), shared=False, ok=None, entries=(30, 8)):
        self._rows, self._queries, self._weights = rows, queries, torch.tensor(weights)
        self.rows = rows.shape[1]
        self._ok = torch.ones(self.rows, dtype=torch.bool) if ok is None else torch.tensor(ok)
        whole = slice(0, rows.shape[2])
        self.blocks = {
            "first": (whole if shared else slice(0, 3), entries[0]),
            "second": (whole if shared else slice(3, 5), entries[1]),
        }

    weights = property(lambda self: self._weights)

    def examples(self):
        """Not read."""
        raise AssertionError("influence reads no text")

    encoded = model = examples

    def vectors(self):
        """Three rows at a time."""
        for some in torch.arange(self.rows).split(3):
            yield self._rows[:, some] * self._ok[some, None], self._ok[some]

    def query_vectors(self, queries):
        """The first ones."""
        return self._queries[:, : len(queries)]

    def norms(self, vectors):
        """L2."""
        return vectors.norm(dim=2)

    def scores(self, vectors, *, cosine):
        """In one product."""
        rows = self._rows / self._rows.norm(dim=2, keepdim=True) if cosine else self._rows
        found = torch.einsum("c,csk,cnk->sn", self._weights, vectors, rows)
        return found.masked_fill(~self._ok, -torch.inf)


def targets(*sizes, empty=()):
    rows, number = [], 0
    for size in sizes:
        queries = []
        for _ in range(size):
            queries.append(QueryText("", "", Encoded([1, 2], [False, number not in empty])))
            number += 1
        rows.append(Target(f"task {len(rows)}", queries))
    return rows


def random_view(c=2, n=8, q=5, seed=0, **options):
    rng = torch.Generator().manual_seed(seed)
    rows, queries = torch.randn(c, n, 5, generator=rng), torch.randn(c, q, 5, generator=rng)
    return Given(rows, queries, weights=(0.7, 0.3)[:c], **options), rows, queries


def test_it_is_a_gradient_view():
    assert isinstance(random_view()[0], GradientView)


def test_less_by_hand():
    """One checkpoint; the target's gradients are (3, 0) and (0, 4), the examples (1, 0), (0, 2) and (3, 4)."""
    rows = torch.tensor([[[1.0, 0], [0, 2], [3, 4]]])
    view = Given(rows, torch.tensor([[[3.0, 0], [0, 4]]]))
    # the mean is (1.5, 2), of norm 2.5: cosines 0.6, 0.8 and (4.5 + 8) / (2.5 * 5) = 1
    assert LESS()(view, targets(2))[0].tolist() == pytest.approx([0.6, 0.8, 1.0])
    # cosines with (3, 0): 1, 0, 0.6; with (0, 4): 0, 1, 0.8
    assert LESS(within="mean_cosine")(view, targets(2))[0].tolist() == pytest.approx([0.5, 0.5, 0.7])
    # products with (1.5, 2)
    assert Influence()(view, targets(2))[0].tolist() == pytest.approx([1.5, 4.0, 12.5])


@pytest.mark.parametrize("within", ["mean_gradient", "mean_cosine"])
def test_less_is_the_loop(within):
    view, rows, queries = random_view()
    found = LESS(within=within)(view, targets(3, 2))
    cosine = torch.nn.functional.cosine_similarity
    for n in range(8):
        for s, members in enumerate([(0, 1, 2), (3, 4)]):
            expected = 0.0
            for c, weight in enumerate((0.7, 0.3)):
                if within == "mean_gradient":
                    mean = sum(queries[c, m] for m in members) / len(members)
                    expected += weight * float(cosine(mean, rows[c, n], dim=0))
                else:
                    of = [float(cosine(queries[c, m], rows[c, n], dim=0)) for m in members]
                    expected += weight * sum(of) / len(of)
            assert float(found[s, n]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("layers, kept", [("*", [0, 1]), ("second", [1])])
def test_datainf_is_the_mean_of_inverses(layers, kept):
    """Sherman and Morrison undone: the inverse of each example's matrix is taken as it stands, in fp64."""
    view, rows, queries = random_view(ok=[True] * 6 + [False, True])
    found = DataInf(layers=layers)(view, targets(5))
    usable, expected = [0, 1, 2, 3, 4, 5, 7], torch.zeros(8, dtype=torch.float64)
    for c, weight in enumerate((0.7, 0.3)):
        for block in kept:
            columns, entries = list(view.blocks.values())[block]
            g = rows[c, :, columns].double()
            damping = 0.1 * g[usable].square().sum(1).mean() / entries
            eye = torch.eye(g.shape[1], dtype=torch.float64)
            inverse = sum(torch.linalg.inv(torch.outer(g[i], g[i]) + damping * eye) for i in usable) / len(usable)
            expected += weight * (queries[c].mean(0)[columns].double() @ inverse) @ g.T
    expected[6] = -torch.inf
    assert torch.allclose(found[0].double(), expected, rtol=1e-4)


def test_datainf_of_one_layer_where_columns_are_shared():
    view, rows, queries = random_view(c=1, shared=True)
    found = DataInf()(view, targets(5))
    g, damping = rows[0].double(), 0.1 * rows[0].double().square().sum(1).mean() / 38
    inverse = sum(torch.linalg.inv(torch.outer(x, x) + damping * torch.eye(5)) for x in g) / 8
    assert torch.allclose(found[0].double(), 0.7 * (queries[0].mean(0).double() @ inverse) @ g.T, rtol=1e-4)
    with pytest.raises(SettingError, match="cannot be told apart"):
        DataInf(layers="first")(view, targets(5))


def test_datainf_of_columns_that_overlap_is_that_of_one_layer():
    """Windows of `tensor_sketch` overlap, and need not be the same."""
    _, rows, queries = random_view(c=1)
    views = [Given(rows, queries, weights=(0.7,)) for _ in range(2)]
    views[0].blocks = {"first": (slice(0, 3), 30), "second": (slice(2, 5), 8)}
    views[1].blocks = {"first": (slice(0, 5), 30), "second": (slice(0, 5), 8)}
    found, expected = (DataInf()(view, targets(5)) for view in views)
    assert torch.allclose(found, expected)
    with pytest.raises(SettingError, match="cannot be told apart"):
        DataInf(layers="first")(views[0], targets(5))


class ByToken(Given):
    """Where a query's vector is that of its one supervised token."""

    def query_vectors(self, queries):
        """By the token's place."""
        assert all(sum(query.supervised) == 1 for query in queries)
        return self._queries[:, [query.supervised.index(True) for query in queries]]


def answer(length, supervised):
    return QueryText("", "", Encoded(list(range(length)), [place in supervised for place in range(length)]))


def test_reach_by_hand():
    """Two tokens, (3, 0) and (0, -4); of (1, 0), (0, 2) and (3, 4) they move 3, 4 and 3 * 0.6 + 4 * 0.8 of 3 + 4."""
    view = ByToken(torch.tensor([[[1.0, 0], [0, 2], [3, 4]]]), torch.tensor([[[9.0, 9], [3, 0], [0, -4]]]))
    found = Reach()(view, [Target("one", [answer(3, {1, 2})]), Target("both", [answer(3, {1}), answer(3, {2})])])
    assert found[0].tolist() == pytest.approx([3 / 7, 4 / 7, 5 / 7])
    assert found[1].tolist() == pytest.approx([0.5, 0.5, 0.7]), "the mean over queries"
    # where the signed score would see 3 * 0.6 - 4 * 0.8 < 0 for the row that moves the answer most
    view = ByToken(view._rows, view._queries, ok=[True, False, True])
    assert Reach()(view, [Target("one", [answer(3, {1, 2})])])[0].tolist() == pytest.approx([3 / 7, -torch.inf, 5 / 7])


def test_reach_sums_over_checkpoints_before_it_drops_the_sign(monkeypatch):
    monkeypatch.setattr(influence, "_TOKENS_AT_ONCE", 2)
    rng = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(2, 6, 5, generator=rng), torch.randn(2, 7, 5, generator=rng)
    queries[1, 3] = torch.nan
    found = Reach()(ByToken(rows, queries, weights=(0.7, 0.3)), [Target("t", [answer(7, {1, 2, 3, 5, 6})])])
    for n in range(6):
        moved = length = 0.0
        for u in (1, 2, 5, 6):
            moved += abs(
                sum(w * float(queries[c, u] @ rows[c, n] / rows[c, n].norm()) for c, w in enumerate((0.7, 0.3)))
            )
            length += sum(w * float(queries[c, u].norm()) for c, w in enumerate((0.7, 0.3)))
        assert float(found[0, n]) == pytest.approx(moved / length, rel=1e-5)
    with pytest.raises(SettingError, match="'t': none of its 1 examples"):
        Reach()(ByToken(rows, queries), [Target("t", [answer(7, {3})])])


@pytest.mark.parametrize("make", [LESS, Influence, DataInf])
def test_a_query_without_a_gradient_does_not_poison_its_target(make):
    view, _, queries = random_view()
    whole = make()(view, targets(4, 1))
    queries[1, 2] = torch.nan
    found = make()(view, targets(4, 1))
    assert found.isfinite().all()
    assert not torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
    without = make()(view, targets(4, 1, empty=[2]))
    assert torch.equal(without, found), "a query that supervises nothing is left out as well"
    queries[0, 4] = torch.inf
    with pytest.raises(SettingError, match="'task 1': none of its 1 examples has a finite gradient"):
        make()(view, targets(4, 1))


@pytest.mark.parametrize("make", [LESS, Influence, DataInf])
def test_rows_that_cannot_be_ranked_score_minus_infinity(make):
    view, _, _ = random_view(ok=[True, False] * 4)
    found = make()(view, targets(5))
    assert (found[:, 1::2] == -torch.inf).all() and found[:, ::2].isfinite().all()


def test_what_cannot_be_done_is_told():
    with pytest.raises(SettingError, match="--method less needs an index"):
        LESS()(CorpusView(open_corpus([{"text": "a"}])), targets(1))
    with pytest.raises(SettingError, match="mean_gradient, mean_cosine"):
        LESS(within="max")
    with pytest.raises(SettingError, match="match none of the index': first, second"):
        DataInf(layers="third*")(random_view()[0], targets(5))
    with pytest.raises(SettingError, match="damping"):
        DataInf(damping=0.0)
