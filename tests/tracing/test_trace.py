"""A trace finds what taught the model its answer, by scores that are what they claim to be."""

import io
import json
import math
import re
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from conftest import corpus_rows, cut_short, save_tiny_llama, write_jsonl
from whence.corpus.layouts import shown_text
from whence.corpus.tokens import collate, encode, encode_prompt
from whence.errors import CorpusError, ManifestMismatchError, MissingIndexError, SettingError, UnknownNameError
from whence.gradients.capture import sketch
from whence.gradients.exact import SignedSequence
from whence.indexing.build import index
from whence.indexing.opening import open_index
from whence.indexing.vectors import projection_for
from whence.models.loading import load_model
from whence.reports.trace_tables import trace_tables
from whence.tracing.pipeline import trace
from whence.tracing.queries import Query, query_vectors

PROMPT, COMPLETION = "5 and 3?", " yes, 12"


@pytest.fixture(scope="module")
def exact(tiny_llama, tmp_path_factory):
    """An index of whole gradients, nothing rounded."""
    out = tmp_path_factory.mktemp("exact") / "index"
    return index(tiny_llama, corpus_rows(20), out, projection="identity", codec="float32", progress=False)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(tiny_llama)


def row_loss(loaded, row):
    """Mean nats of a row's supervised tokens, from the model's logits."""
    example = encode(row, loaded.tokenizer)
    chances = loaded.model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
    places = [place for place, supervised in enumerate(example.supervised) if supervised]
    return -torch.stack([chances[place - 1, example.ids[place]] for place in places]).mean()


# -- scores


def test_a_planted_duplicate_ranks_first(tiny_llama, tmp_path):
    planted = {"id": "planted", "prompt": PROMPT, "completion": COMPLETION}
    built = index(
        tiny_llama,
        [*corpus_rows(15), planted, *corpus_rows(15, first=15)],
        tmp_path / "index",
        projection="two_sided",
        width=8,
    )
    for exact in (True, False):
        first = trace(built, PROMPT, COMPLETION, exact=exact).hits[0]
        assert (first.rank, first.id, first.row) == (1, "planted", planted)
        assert first.rank_score == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_scores_are_those_of_single_sketches_summed_over_checkpoints_by_weight(tiny_run, tmp_path, method):
    rows = corpus_rows(12)
    built = index(
        tiny_run,
        rows,
        tmp_path / "index",
        checkpoints="all",
        codec="float32",
        projection="two_sided",
        width=4,
        progress=False,
    )
    asked = [Query(PROMPT, COMPLETION), Query("1?", " no")]
    true = torch.zeros(2, 12)
    for step, weight in ((2, 0.75), (4, 0.25)):
        loaded = load_model(tiny_run / f"checkpoint-{step}")
        projection = projection_for(loaded, built.settings)
        texts = [*({"prompt": query.prompt, "completion": query.completion} for query in asked), *rows]
        alone = [collate([encode(row, loaded.tokenizer)]) for row in texts]
        vectors = torch.cat([sketch(loaded, loaded.layers(), batch, projection)[0] for batch in alone])
        if method == "cosine":
            vectors = vectors / vectors.norm(dim=1, keepdim=True)
        true += weight * vectors[:2] @ vectors[2:].T
    found = trace(built, queries=asked, top=12, method=method, exact=False)
    for query in range(2):
        helpful, opposing = found.of(query), found.of(query, opposing=True)
        scores = {hit.id: hit.score for hit in helpful}
        expected = {f"row-{number}": true[query, number].item() for number in range(12)}
        assert scores == pytest.approx(expected, rel=1e-3, abs=1e-5 * true.abs().max().item())
        assert [hit.rank for hit in helpful] == list(range(1, 13))
        assert [hit.rank for hit in opposing] == list(range(-1, -13, -1))
        assert [hit.id for hit in helpful] == sorted(scores, key=scores.__getitem__, reverse=True)
        assert [hit.id for hit in opposing] == [hit.id for hit in helpful][::-1]


def test_larger_is_more_helpful(tiny_llama, tmp_path):
    """A small step of gradient descent on an example changes the query's loss by minus rate times score."""
    rows = [{"prompt": "", "completion": chr(65 + number) * (3 + number)} for number in range(20)]
    built = index(tiny_llama, rows, tmp_path / "index", projection="identity", codec="float32", progress=False)
    found = trace(built, PROMPT, COMPLETION, method="dot", top=1)
    best, worst = found.hits
    assert best.score > 0 > worst.score
    rate = 1e-6
    for hit in (best, worst):
        loaded = load_model(tiny_llama)
        loaded.model.double()
        weights = [layer.weight.requires_grad_() for layer in loaded.layers().values()]
        asked = {"prompt": PROMPT, "completion": COMPLETION}
        before = row_loss(loaded, asked).item()
        gradients = torch.autograd.grad(row_loss(loaded, hit.row), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= rate * gradient
        change = row_loss(loaded, asked).item() - before
        assert math.copysign(1, change) == -math.copysign(1, hit.score)
        assert change == pytest.approx(-rate * hit.score, rel=0.01)


def test_an_open_index_is_traced_as_its_path_is(exact):
    by_path = trace(exact.store.place.root, PROMPT, COMPLETION)
    assert [hit.as_row() for hit in by_path.hits] == [hit.as_row() for hit in trace(exact, PROMPT, COMPLETION).hits]


def test_many_queries_are_answered_as_each_alone(exact):
    asked = [Query(PROMPT, COMPLETION), Query("9?"), Query("a much longer prompt than that, 8?"), Query("77?", " no")]
    together = trace(exact, queries=asked, top=3, max_new_tokens=5)
    for number, query in enumerate(asked):
        alone = trace(exact, query.prompt, query.completion, top=3, max_new_tokens=5)
        assert alone.answers[0].completion == together.answers[number].completion
        hits = [hit for hit in together.hits if hit.query == number]
        assert [hit.id for hit in hits] == [hit.id for hit in alone.hits]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone.hits], rel=1e-3, abs=1e-5)


def test_the_sum_over_tokens_is_a_space_of_its_own(tiny_llama, tmp_path, exact):
    built = index(
        tiny_llama, corpus_rows(20), tmp_path / "index", projection="identity", codec="float32", reduction="sum",
        progress=False,
    )  # fmt: skip
    row = {"prompt": PROMPT, "completion": COMPLETION}
    example = encode(row, built.model().tokenizer)
    mean, total = query_vectors(exact, [[SignedSequence(example)]]), query_vectors(built, [[SignedSequence(example)]])
    assert torch.allclose(mean * example.supervised_count, total, rtol=1e-3, atol=1e-4)


# -- answers


def test_the_models_own_answer_is_greedy(exact, model):
    found = trace(exact, PROMPT, max_new_tokens=7)
    (answer,) = found.answers
    ids = encode_prompt(PROMPT, model.tokenizer, chat=False)
    new, chances = [], []
    for _ in range(7):
        logits = model.model(input_ids=torch.tensor([ids + new])).logits[0, -1]
        new.append(int(logits.argmax()))
        chances.append(logits.softmax(0).max().item())
    assert model.tokenizer.eos_token_id not in new
    assert answer.is_generated
    assert answer.completion == model.tokenizer.decode(new)
    assert answer.probabilities == pytest.approx(chances, rel=1e-4)


def test_lowest_scores_that_do_not_oppose_are_said_not_to(tiny_llama, tmp_path):
    rows = [{"prompt": "a", "completion": " b", "id": str(n)} for n in range(3)]
    built = index(tiny_llama, rows, tmp_path / "index", projection="two_sided", width=4, progress=False)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(trace_tables(trace(built, "a", " b", top=10)))
    assert "none opposes the answer" in " ".join(console.export_text().split())


def test_the_models_own_answer_is_traced_as_if_it_were_given(exact, model):
    own = trace(exact, PROMPT, max_new_tokens=6)
    ids = encode_prompt(PROMPT, model.tokenizer, chat=False)
    new = model.base.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6)[0, len(ids) :].tolist()
    loaded = exact.model()
    projection = exact.projection(loaded)
    supervised = [False] * len(ids) + [True] * len(new)
    batch = collate([type(encode({"text": "a"}, model.tokenizer))(ids + new, supervised)])
    true = sketch(loaded, loaded.layers(), batch, projection)[0]
    (first, _) = exact.store.top_k(true[None], torch.ones(1), m=1, cosine=True)
    assert own.hits[0].score == pytest.approx(first.scores.item(), rel=1e-4)


def test_probabilities_are_the_softmax_at_each_token(exact, model):
    (answer,) = trace(exact, PROMPT, COMPLETION).answers
    example = encode({"prompt": PROMPT, "completion": COMPLETION}, model.tokenizer)
    chances = model.model(input_ids=torch.tensor([example.ids])).logits[0].softmax(-1)
    first = len(example.ids) - len(COMPLETION) - 1
    expected = [chances[place - 1, example.ids[place]].item() for place in range(first, len(example.ids))]
    assert answer.tokens == [*COMPLETION, "</s>"]
    assert answer.probabilities == pytest.approx(expected, rel=1e-4)
    assert answer.perplexity == pytest.approx(math.exp(-sum(map(math.log, expected)) / len(expected)), rel=1e-4)
    assert not answer.is_generated


def test_answers_carry_the_last_checkpoints_certainty(tiny_run, tmp_path):
    built = index(
        tiny_run, corpus_rows(5), tmp_path / "index", checkpoints="all", projection="two_sided", width=4, progress=False
    )
    last = index(tiny_run, corpus_rows(5), tmp_path / "last", projection="two_sided", width=4, progress=False)
    assert trace(built, PROMPT, COMPLETION).answers == trace(last, PROMPT, COMPLETION).answers


def test_it_is_told_where_completions_come_from(exact):
    told = [
        trace(exact, queries=queries, top=1, max_new_tokens=2, temperature=temperature).settings["completion"]
        for queries in ([Query(PROMPT, COMPLETION)], [Query("9?")], [Query(PROMPT, COMPLETION), Query("9?")])
        for temperature in (0.0, 0.5)
    ]
    assert told == [
        *("given", "given"),
        *("greedy", "temperature 0.5, seed 0"),
        *("given, or greedy where none was", "given, or temperature 0.5, seed 0 where none was"),
    ]


def test_it_is_said_how_well_the_method_predicts_retrainings_and_what_a_better_one_costs(tiny_llama, tmp_path):
    built = index(tiny_llama, corpus_rows(20), tmp_path / "index", progress=False)

    def said(**settings):
        traced = trace(built, PROMPT, COMPLETION, top=1, **settings)
        with io.StringIO() as file:
            Console(file=file, width=500).print(trace_tables(traced))
            shown.append(file.getvalue())
        return traced.settings["evidence"]

    root, shown = tmp_path / "index", list[str]()
    command = f"For curvature: whence curvature {root} -o {root}-curvature"
    predicts = "predicts retrainings of a fine-tuned model by"
    cost = (
        "trak by 0.39 and 0.29 (--method trak); curvature by 0.60 and 0.43, for 46 exact gradients once and 20 a trace"
    )
    assert said() == f"cosine {predicts} 0.36 of 1, of one from scratch by 0.17; {cost}. {command}"
    took = r"Here curvature would take about \d\S* seconds once and \d\S* seconds a trace\."
    assert re.search(rf"{command}\n{took}", shown[-1])
    assert said(exact=False) == f"cosine {predicts} 0.33 of 1, of one from scratch by 0.19; {cost}. {command}"
    assert "would take" not in shown[-1]
    assert said(objective="margin").startswith("cosine asked so was not held against retrainings; curvature by 0.60")
    refined = "refined by 0.66 and 0.45 (--set refine=2 --set sample=128)"
    assert said(method="ekfac") == f"ekfac {predicts} 0.60 of 1, of one from scratch by 0.43; {refined}."


# -- layouts


@pytest.mark.parametrize("kind", ["messages", "instruction"])
def test_a_query_is_laid_out_as_the_rows_of_a_chat(tmp_path, kind):
    model = save_tiny_llama(tmp_path / "model", chat=True)
    pairs = [(row["prompt"], row["completion"]) for row in corpus_rows(8)]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        if kind == "messages"
        else {"instruction": asked, "output": said}
        for asked, said in pairs
    ]
    built = index(model, rows, tmp_path / "index", projection="two_sided", width=8, codec="float32", progress=False)
    found = trace(built, *pairs[3], top=2)
    assert found.hits[0].row == rows[3]
    assert found.hits[0].score == pytest.approx(1, abs=1e-4)
    assert shown_text(found.hits[0].row)["completion"] == pairs[3][1]
    own = trace(built, pairs[3][0], max_new_tokens=4)
    loaded = load_model(model)
    ids = loaded.tokenizer(f"[u]{pairs[3][0]}</s>[a]", add_special_tokens=False)["input_ids"]
    new = loaded.base.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=4)[0, len(ids) :]
    assert own.answers[0].completion == loaded.tokenizer.decode(new, skip_special_tokens=True)


def test_a_query_of_running_text_is_not_closed(tiny_llama, tmp_path):
    built = index(
        tiny_llama,
        [{"text": f"{number} bottles"} for number in range(6)],
        tmp_path / "i",
        projection="two_sided",
        width=4,
    )
    (answer,) = trace(built, "5 bott", "les").answers
    assert answer.tokens == ["l", "e", "s"]
    with pytest.raises(SettingError, match="nothing to trace for prompt '5 bott': the completion has no token"):
        trace(built, "5 bott", "")


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"text": "a"}, {"text": "a"}),
        ({"text": 7}, {"text": "7"}),
        ({"prompt": "a", "completion": None}, {"prompt": "a", "completion": None}),
        ({"prompt": "a", "completion": None, "text": "b"}, {"text": "b"}),
        ({"instruction": "a", "input": "b", "output": 3}, {"prompt": "a\n\nb", "completion": "3"}),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"prompt": "a", "completion": "b"},
        ),
        (
            {"messages": [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]},
            {"prompt": "system: s\nuser: u", "completion": "a"},
        ),
        ({"messages": []}, {"prompt": "", "completion": ""}),
    ],
)
def test_a_row_is_shown_as_its_prompt_and_completion(row, shown):
    assert shown_text(row) == shown


# -- queries that cannot be answered


def test_a_query_longer_than_the_context_is_refused(exact):
    for prompt, completion in (("p" * 90, "c" * 10), ("p" * 96, None)):
        with pytest.raises(SettingError, match="the model's context is 96"):
            trace(exact, prompt, completion)
    # A prompt that nearly fills it leaves room for a short answer, and takes none from another query.
    found = trace(exact, queries=[Query("p" * 93), Query("p")], max_new_tokens=10)
    assert [len(answer.tokens) for answer in found.answers] == [2, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --prompt TEXT or --queries FILE"),
        ({"prompt": "a", "queries": [Query("b")]}, "give either --prompt TEXT or --queries FILE"),
        ({"queries": [Query("b")], "completion": "c"}, "--completion belongs to --prompt"),
        ({"queries": []}, "--queries: no query in it"),
        ({"queries": [{"text": "a"}]}, "query 0: a query needs a text as `prompt`.*found the columns text"),
        ({"queries": [{"prompt": "a", "contrast": 3}]}, "query 0: a query needs"),
        ({"prompt": "a", "completion": ""}, "nothing to trace for prompt 'a': the completion has no token"),
        ({"prompt": "a", "top": 0}, "--top 0"),
        ({"prompt": "a", "max_new_tokens": 0}, "--max-new-tokens 0"),
    ],
)
def test_what_cannot_be_asked_is_said(exact, options, message):
    with pytest.raises(SettingError, match=message):
        trace(exact, **options)


def test_a_misspelt_method_is_corrected(exact):
    with pytest.raises(UnknownNameError, match=r"--method cosin: no such method\. Did you mean cosine\?"):
        trace(exact, PROMPT, method="cosin")


def test_a_file_of_queries_is_read(exact, tmp_path):
    rows = [{"prompt": "5\u2028?", "completion": " yes"}, {"prompt": "6?"}, {"instruction": "7?", "output": " no"}]
    file = tmp_path / "queries.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    found = trace(exact, queries=file, top=1, max_new_tokens=2)
    assert [(answer.prompt, answer.is_generated) for answer in found.answers] == [
        ("5\u2028?", False),
        ("6?", True),
        ("7?", False),
    ]
    (tmp_path / "queries.csv").write_text("prompt,completion\n5?, yes\n")
    assert trace(exact, queries=tmp_path / "queries.csv", top=1).answers[0].completion == " yes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt"\n', r"queries\.jsonl:2: not a line of JSON"),
        (b'{"prompt": "a"}\n\n\xff\n', r"queries\.jsonl:3: not a line of JSON"),
        (b'{"article": "a"}\n', r"queries\.jsonl:1: a query needs .* found the columns article"),
        (b"[1]\n", r"queries\.jsonl:1: a list where an object is expected"),
        (b"\n", r"queries\.jsonl: no query in it"),
    ],
)
def test_a_bad_line_of_queries_is_named(exact, tmp_path, text, message):
    (tmp_path / "queries.jsonl").write_bytes(text)
    with pytest.raises((SettingError, CorpusError), match=message):
        trace(exact, queries=tmp_path / "queries.jsonl")


def test_a_missing_file_of_queries_is_named(exact, tmp_path):
    with pytest.raises(CorpusError, match=r"nothing\.jsonl: no such file"):
        trace(exact, queries=str(tmp_path / "nothing.jsonl"))


# -- the index and its model


def test_an_index_that_is_not_complete_is_not_traced(tiny_llama, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_short(patch, "add_shard", 0)
        with pytest.raises(KeyboardInterrupt):
            index(tiny_llama, corpus_rows(4), tmp_path / "index", projection="two_sided", width=4, progress=False)
    with pytest.raises(MissingIndexError, match="is not complete: 1 shard is missing"):
        trace(tmp_path / "index", PROMPT, COMPLETION)


def test_changed_weights_are_refused_and_a_moved_model_is_found(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    index(model, corpus_rows(6), tmp_path / "index", projection="two_sided", width=4, progress=False)
    before = trace(tmp_path / "index", PROMPT, COMPLETION)
    shutil.copytree(model, tmp_path / "moved")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ManifestMismatchError, match=r"weights and configuration have digest .*, the index was built with"
    ):
        trace(tmp_path / "index", PROMPT, COMPLETION)
    assert trace(tmp_path / "index", PROMPT, COMPLETION, model=str(tmp_path / "moved")) == before


def test_a_query_that_is_not_finite_is_said(exact, tiny_llama):
    opened = open_index(exact.store.place.root)
    with torch.no_grad():
        opened.model().model.model.embed_tokens.weight[:] = torch.nan
    with pytest.raises(ManifestMismatchError, match="a query's gradient is not finite"):
        trace(opened, PROMPT, COMPLETION)


def test_a_file_of_queries_holds_rows_of_the_corpus(exact, tmp_path):
    file = write_jsonl(tmp_path / "queries.jsonl", corpus_rows(20))
    found = trace(exact, queries=file, top=1)
    assert [found.of(query)[0].id for query in range(20)] == [f"row-{number}" for number in range(20)]


def test_a_model_that_is_gone_is_asked_for_by_its_digest(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    built = index(model, corpus_rows(4), tmp_path / "index", projection="two_sided", width=4, progress=False)
    digest = built.store.manifest.checkpoints[0]["digest"][:12]
    shutil.rmtree(model)
    with pytest.raises(
        ManifestMismatchError, match=rf"model of this index .* of digest {digest}\) is not there.*--model"
    ):
        trace(tmp_path / "index", PROMPT, COMPLETION)
