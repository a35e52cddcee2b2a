"""Rows that share their last question and differ in what comes before: a question needs that too to find its row."""

import json
import shlex

import pytest
import torch

from conftest import byte_tokenizer, write_jsonl
from whence.corpus.templates import supervise
from whence.corpus.tokens import collate, encode

SYSTEMS, PETS = ("Be kind.", "Be rude.", "In French."), (("cat", "tom"), ("dog", "rex"))
ANSWERS = ("abc", "xyz", "uno", "dos", "ten", "six")


def said(role, content):
    return {"role": role, "content": content}


ROWS = [
    {
        "id": f"{system} {pet}",
        "messages": [
            said("system", system),
            *(said("user", f"My {pet}?"), said("assistant", name)),
            *(said("user", "And yours?"), said("assistant", ANSWERS[2 * n + m])),
        ],
    }
    for n, system in enumerate(SYSTEMS)
    for m, (pet, name) in enumerate(PETS)
] + [{"id": "plain", "messages": [said("user", "And yours?"), said("assistant", "none")]}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small model that has learned the rows' last answers, and the rows."""
    import transformers

    place, tokenizer = tmp_path_factory.mktemp("turns"), byte_tokenizer(chat=True)
    supervise(tokenizer, "last")
    batch = collate([encode(row, tokenizer) for row in ROWS])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=259,
        max_position_embeddings=96, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    labels = batch.ids.masked_fill(~batch.supervised, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(45):
        optimizer.zero_grad()
        model(input_ids=batch.ids, attention_mask=batch.mask.long(), labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(place / "model")
    byte_tokenizer(chat=True).save_pretrained(place / "model")
    return place / "model", write_jsonl(place / "rows.jsonl", ROWS)


def test_a_question_needs_its_system_prompt_and_its_earlier_turns(printed, files, tmp_path):
    code, out, _ = printed(
        "index", *files, "-o", tmp_path / "index", "--projection", "two_sided", "--width", 16, "--supervise", "last"
    )
    assert code == 0
    following = shlex.split(out.splitlines()[-1].partition(" Next: ")[2])
    assert following[-2:] == ["--prompt", "And yours?"], "the next command asks what the first row asks"

    def ranking(*asked):
        _, out, _ = printed("trace", tmp_path / "index", *asked, "--top", len(ROWS), "--no-null", "--json")
        document = json.loads(out)
        return document["answers"][0]["completion"], [row["id"] for row in document["rows"] if row["rank"] > 0]

    for row in (ROWS[0], ROWS[3]):
        file = tmp_path / "asked.json"
        file.write_text(json.dumps(row["messages"][:-1]))
        answer, ids = ranking("--messages", file)
        assert answer == row["messages"][-1]["content"], "the model has learned to answer by what came before"
        assert ids[0] == row["id"]
        answer, ids = ranking("--prompt", "And yours?")
        assert (answer, ids[0]) == ("none", "plain"), "without them it is another question, of another row"
