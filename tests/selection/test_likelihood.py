"""Loss, loss drop and Ask-LLM, against the models' own outputs."""

import math

import pytest
import torch
from small_views import Rows, Tokens, asking, texts
from tiny_judges import judge_tokenizer, save_tiny_judge, save_tiny_t5

from conftest import corpus_rows, random_examples, save_tiny_llama, tiny_model
from whence.corpus.tokens import Encoded
from whence.errors import ModelError, SettingError
from whence.models.loading import load_model
from whence.selection.scorers.likelihood import QUESTION, AskLLM, Loss, LossDrop, answer_ids

SHORT = "{text}\nGood? yes/no:"


def row_loss(model, row):
    log_p = model.model(torch.tensor([row.ids])).logits[0].log_softmax(1)
    targets = [t for t in range(len(row.ids)) if row.supervised[t]]
    return sum(-log_p[t - 1, row.ids[t]].item() for t in targets) / len(targets)


def test_loss_is_the_mean_over_supervised_tokens():
    model, rows = tiny_model("gpt2"), random_examples(6, seed=1)
    scores = Loss()(Tokens(rows, model), asking("", ""))
    assert scores.shape == (2, 6)
    assert scores[1].tolist() == pytest.approx([row_loss(model, row) for row in rows], rel=1e-4)


def test_rows_without_a_loss_are_not_ranked():
    model, rows = tiny_model("llama"), random_examples(3, seed=1)
    rows = [Encoded([1 + i % 50 for i in row.ids], row.supervised) for row in rows]
    model.base.get_input_embeddings().weight[60] = math.nan
    expected = Loss()(Tokens(rows, model), asking(""))
    rows += [Encoded([60, 3], [False, True]), Encoded([3, 4], [False, False]), Encoded([], [])]
    found = Loss()(Tokens(rows, model), asking(""))
    torch.testing.assert_close(found[:, :3], expected, rtol=1e-4, atol=1e-5)
    assert found[0, 3:].tolist() == [-math.inf] * 3


def test_loss_drop_is_the_base_models_loss_less_the_last_models(tmp_path):
    base, trained = (load_model(save_tiny_llama(tmp_path / str(seed), seed=seed), device="cpu") for seed in (0, 1))
    view = Rows(corpus_rows(9), trained)
    scores = LossDrop(base=base.path)(view, asking("", ""))
    expected = [row_loss(base, row) - row_loss(trained, row) for row in view.encoded()]
    assert scores[0].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert torch.equal(scores[0], scores[1])
    assert LossDrop(base=trained.path)(view, asking("")).abs().max() < 1e-5


def test_loss_drop_of_an_adapter_is_against_the_model_without_it():
    model, rows = tiny_model("lora"), random_examples(6, seed=1)
    scores = LossDrop()(Tokens(rows, model), asking(""))[0]
    after = [row_loss(model, row) for row in rows]
    with model.model.disable_adapter():
        before = [row_loss(model, row) for row in rows]
    assert scores.tolist() == pytest.approx([b - a for b, a in zip(before, after, strict=True)], rel=1e-3, abs=1e-4)
    assert scores.abs().max() > 0.01
    assert [row_loss(model, row) for row in rows] == after  # the adapter is on again


def test_loss_drop_without_a_base_says_what_is_missing(tiny_llama, tmp_path):
    model = load_model(tiny_llama, device="cpu")
    view = Rows(corpus_rows(3), model)
    with pytest.raises(SettingError, match=r"none was named. Name it with --set base=MODEL"):
        LossDrop()(view, asking(""))
    with pytest.raises(ModelError, match="not a model directory"):
        LossDrop(base=str(tmp_path / "nowhere"))(view, asking(""))
    with pytest.raises(ModelError, match="its tokenizer is not that of"):
        LossDrop(base=save_tiny_judge(tmp_path / "other"))(view, asking(""))


def test_answers_are_single_tokens_that_say_the_word():
    """The judge's tokenizer has yes, a space and yes, no and No; YE and all else are bytes."""
    tokenizer = judge_tokenizer()
    named = {piece: tokenizer.convert_tokens_to_ids(piece) for piece in ("yes", "Ġyes", "no", "No")}
    assert answer_ids(tokenizer, "yes") == sorted([named["yes"], named["Ġyes"]])
    assert answer_ids(tokenizer, "no") == sorted([named["no"], named["No"]])
    with pytest.raises(ModelError, match="the token 'maybe', and the tokenizer has no such token"):
        answer_ids(tokenizer, "maybe")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return save_tiny_judge(tmp_path_factory.mktemp("judges") / "causal")


def by_hand(model, tokenizer, ids, **others):
    p = model(input_ids=torch.tensor([ids]), **others).logits[0, -1].softmax(0)
    yes, no = p[answer_ids(tokenizer, "yes")].sum(), p[answer_ids(tokenizer, "no")].sum()
    return (yes / (yes + no)).item()


TEXTS = ("The heron nests in old willows.", "x", "", "Buy now! Buy now! Buy now!", " \n")


def test_ask_llm_is_the_share_of_yes_in_the_next_token(judge):
    loaded = load_model(judge, device="cpu")
    tokenizer = loaded.tokenizer
    scores = AskLLM(model=judge, question=SHORT)(texts(*TEXTS), asking("", ""))
    expected = [
        by_hand(loaded.model, tokenizer, tokenizer(SHORT.replace("{text}", text))["input_ids"])
        for text in (TEXTS[0], TEXTS[1], TEXTS[3])
    ]
    assert scores[0, [0, 1, 3]].tolist() == pytest.approx(expected, rel=1e-4)
    assert scores[1, [2, 4]].tolist() == [-math.inf] * 2
    assert len(set(expected)) == 3
    own = AskLLM(question=SHORT)(Rows([{"text": text} for text in TEXTS], loaded), asking(""))
    torch.testing.assert_close(own, scores[:1])


def test_ask_llm_of_a_sequence_to_sequence_model(tmp_path):
    import transformers

    path = save_tiny_t5(tmp_path / "t5")
    model = transformers.T5ForConditionalGeneration.from_pretrained(path).eval()
    tokenizer = judge_tokenizer()
    scores = AskLLM(model=path, question=SHORT)(texts(*TEXTS), asking(""))[0]
    expected = [
        by_hand(model, tokenizer, tokenizer(SHORT.replace("{text}", text))["input_ids"],
                decoder_input_ids=torch.tensor([[1]]))
        for text in (TEXTS[0], TEXTS[1], TEXTS[3])
    ]  # fmt: skip
    assert scores[[0, 1, 3]].tolist() == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 3


def test_ask_llm_puts_its_question_as_the_users_turn(tmp_path):
    chat = "{% for m in messages %}<u>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    loaded = load_model(save_tiny_judge(tmp_path / "chat", chat=chat), device="cpu")
    found = AskLLM(model=loaded.path, question=SHORT)(texts("A heron."), asking("")).item()
    ids = loaded.tokenizer("<u>A heron.\nGood? yes/no:</s><a>", add_special_tokens=False)["input_ids"]
    assert found == pytest.approx(by_hand(loaded.model, loaded.tokenizer, ids), rel=1e-4)


def test_ask_llm_cuts_a_long_text_at_its_end(judge):
    long = "abcdefghij" * 100
    scorer = AskLLM(model=judge, question=SHORT, max_tokens=20)
    cut, same = scorer(texts(long, "abcdefghij" * 2), asking(""))[0].tolist()
    assert cut == pytest.approx(same, rel=1e-4)
    room = 512 - len(judge_tokenizer()(SHORT.replace("{text}", ""))["input_ids"])
    filled = AskLLM(model=judge, question=SHORT, max_tokens=9999)(texts(long, long[:room]), asking(""))[0].tolist()
    assert filled[0] == pytest.approx(filled[1], rel=1e-4)


def test_ask_llm_asks_the_papers_question(judge):
    """It fits the tiny judge's context of 512 bytes with little room for a text; braces in a text are text."""
    assert QUESTION.count("{text}") == 1
    scores = AskLLM(model=judge)(texts("A {text} heron.", "{}"), asking(""))
    assert ((scores > 0) & (scores < 1)).all()


def test_ask_llm_refuses_what_cannot_be_asked(judge, tmp_path, tiny_llama):
    with pytest.raises(SettingError, match="text} must stand where the row's text goes"):
        AskLLM(question="Is it good?")
    with pytest.raises(SettingError, match="max_tokens 0"):
        AskLLM(max_tokens=0)
    with pytest.raises(SettingError, match="no room for a text in the model's context of 64"):
        AskLLM(model=save_tiny_judge(tmp_path / "small", context=64))(texts("A heron."), asking(""))
    with pytest.raises(ModelError, match="no such token"):
        AskLLM(model=tiny_llama)(texts("A heron."), asking(""))
    with pytest.raises(ModelError, match="nowhere"):
        AskLLM(model=str(tmp_path / "nowhere"))(texts("A heron."), asking(""))
