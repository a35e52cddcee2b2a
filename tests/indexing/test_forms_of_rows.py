"""An index remembers names of columns and what is supervised, and rows come back as they came."""

import json

import pytest

from conftest import save_tiny_llama, write_jsonl
from whence.corpus.tokens import encode
from whence.errors import SettingError
from whence.indexing.build import append, index, verify
from whence.indexing.opening import open_index
from whence.models.loading import load_model
from whence.tracing.pipeline import trace

TALKS = [
    {"id": f"t{n}", "conversations": [{"from": "human", "value": f"{n} and?"}, {"from": "gpt", "value": f"{2 * n}!"},
                                      {"from": "human", "value": "more"}, {"from": "gpt", "value": f"no {n}"}]}
    for n in range(12)
]  # fmt: skip
OWN = [{"id": f"r{n}", "q": f"{n} and {n}?", "a": f"{2 * n}!", "source": "s"} for n in range(16)]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("chat") / "model", chat=True)


def test_names_of_columns_are_remembered_and_given_back(printed, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, more = write_jsonl(tmp_path / "rows.jsonl", OWN[:12]), write_jsonl(tmp_path / "more.jsonl", OWN[12:])
    code, _, err = printed(
        "index",
        tiny_llama,
        rows,
        "-o",
        "index",
        "--projection",
        "two_sided",
        "--width",
        8,
        "--map",
        "prompt=q,completion=a",
    )
    assert code == 0, err
    assert printed("append", "index", more)[0] == 0, "the names are the index' own"
    entries = open_index("index").store.manifest.corpora
    assert [entry["columns"] for entry in entries] == [{"prompt": "q", "completion": "a"}] * 2
    (tmp_path / "index/corpus/part-00000.parquet").unlink()
    verify("index", repair=True)
    assert not verify("index")[0], "a part is read again under the same names"
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"q": OWN[3]["q"], "a": OWN[3]["a"]}])
    code, out, _ = printed("trace", "index", "--queries", asked, "--top", 1, "--no-null", "--json")
    (first, _) = json.loads(out)["rows"]
    assert first["id"] == "r3" and first["score"] == pytest.approx(1, abs=1e-3)
    for source, names in (("index", ()), (rows, ("--map", "prompt=q", "--map", "completion=a", "--model", tiny_llama))):
        words = ("--method", "bm25", "--count", 1, "-o", "chosen.jsonl", "--force")
        assert printed("select", source, "--tasks", asked, *words, *names)[0] == 0
        chosen = json.loads((tmp_path / "chosen.jsonl").read_text())
        assert chosen.items() >= OWN[3].items() and not {"prompt", "completion"} & chosen.keys()
    code, _, err = printed("index", tiny_llama, rows, "-o", "other", "--map", "question_text=q")
    assert code == 2 and "Whence reads no column `question_text`" in err and not (tmp_path / "other").exists()


def test_what_is_supervised_is_remembered(chat_model, tmp_path):
    options = {"projection": "two_sided", "width": 4, "codec": "float32", "progress": False}
    built = {how: index(chat_model, TALKS[:8], tmp_path / how, supervise=how, **options)
             for how in ("assistant", "last", "all")}  # fmt: skip
    counts = {how: opened.store.shard(0, 0).tokens.tolist() for how, opened in built.items()}
    for how, opened in built.items():
        again = open_index(tmp_path / how)
        assert [encode(row, again.model().tokenizer).supervised_count for row in TALKS[:8]] == counts[how]
        assert opened.store.manifest.settings.get("supervise", "assistant") == how
        append(tmp_path / how, TALKS[8:], progress=False)
    in_order = zip(counts["last"], counts["assistant"], counts["all"], strict=True)
    assert all(last < both < all_ for last, both, all_ in in_order)
    with pytest.raises(SettingError, match=r"--supervise all: the rows of .* were read with last"):
        open_index(tmp_path / "last", supervise="all")
    turns = [{"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
             for turn in TALKS[5]["conversations"]]  # fmt: skip
    (own, *_) = trace(tmp_path / "last", queries=[{"messages": turns}], top=1, null=False).of(0)
    assert own.id == "t5" and own.score == pytest.approx(1, abs=1e-4), "a question about the last answer is that row"


def test_all_tokens_are_the_loss_that_trl_takes_by_default(chat_model):
    """TRL's default for conversations: labels are the ids, and the mean is over all but the first."""
    import torch

    loaded = load_model(chat_model, supervise="all")
    encoded = encode(TALKS[2], loaded.tokenizer)
    turns = [{"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
             for turn in TALKS[2]["conversations"]]  # fmt: skip
    ids = loaded.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert encoded.ids == ids and encoded.supervised == [False, *[True] * (len(ids) - 1)]
    tokens = torch.tensor([ids])
    expected = loaded.model(input_ids=tokens, labels=tokens).loss
    logits = loaded.model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    targets = [t for t, on in enumerate(encoded.supervised) if on]
    mean = -torch.stack([logits[t - 1, ids[t]] for t in targets]).mean()
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)


def test_a_question_with_a_system_prompt_and_earlier_turns_finds_its_row(printed, chat_model, tmp_path):
    rows = []
    for n in range(30):
        system = [{"role": "system", "content": "abc"[n % 3] * 6}]
        before = [{"role": "user", "content": f"{n % 7}?"}, {"role": "assistant", "content": f"{n % 5}."}]
        rows.append({"id": f"m{n}", "messages": [*system, *before, {"role": "user", "content": "and?"},
                                                 {"role": "assistant", "content": "yes"}]})  # fmt: skip
    index(
        chat_model,
        rows,
        tmp_path / "index",
        projection="two_sided",
        width=16,
        codec="float32",
        progress=False,
        supervise="last",
    )
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(rows[17]["messages"]))
    words = ("--top", 1, "--no-null", "--json")
    with_turns = json.loads(printed("trace", tmp_path / "index", "--messages", file, *words)[1])["rows"][0]
    assert with_turns["id"] == "m17" and with_turns["score"] == pytest.approx(1, abs=1e-4)
    asked = ("--prompt", "and?", "--completion", "yes")
    alone = json.loads(printed("trace", tmp_path / "index", *asked, *words)[1])["rows"][0]
    system = json.loads(printed("trace", tmp_path / "index", *asked, "--system", "cccccc", *words)[1])["rows"][0]
    assert alone["score"] < 0.999 and system["score"] != alone["score"]
    for more in (("--messages", file), ("--queries", file)):
        assert printed("trace", tmp_path / "index", *asked, *more, *words)[0] == 2


def test_rows_of_token_ids_are_shown_as_text(chat_model, tmp_path):
    tokenizer = load_model(chat_model).tokenizer
    rows = []
    for n in range(8):
        ids = tokenizer(f"{n} and {n}? {2 * n}!")["input_ids"]
        rows.append({"id": f"i{n}", "input_ids": ids, "labels": [-100] * 4 + ids[4:]})
    index(chat_model, rows, tmp_path / "index", projection="two_sided", width=8, codec="float32", progress=False)
    (first, *_) = trace(tmp_path / "index", "3 an", "d 3? 6!", top=1, null=False).of(0)
    assert first.as_row()["text"] == "<s>3 and 3? 6!" and first.id == "i3"
