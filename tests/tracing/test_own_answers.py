"""A model's own answer ends where its turn ends, is supervised like a row, and is printed as it can be given back."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from conftest import tiny_model
from tiny_tokenizers import byte_level
from whence.corpus.closings import closing_of
from whence.corpus.tokens import encode_query
from whence.models.generation import ends_of, generate, set_aside
from whence.tracing.own_answers import Sampling, notes_on
from whence.tracing.queries import Query, encode_queries, token_texts

CHAT = (
    "{{% for m in messages %}}<|{{{{ m['role'] }}}}|>{{{{ m['content'] }}}}{}{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
)
FACTS = ("The capital is", " Paris and more")


@contextmanager
def saying(loaded, answer):
    """Let a model say these tokens, and then the last of them over and over: its head is called once for each."""
    left = iter(answer)

    def say(module, args, out):
        logits = torch.zeros_like(out)
        logits[..., next(left, answer[-1])] = 50.0
        return logits

    hook = loaded.base.get_output_embeddings().register_forward_hook(say)
    yield
    hook.remove()


def with_tokenizer(tokenizer, **generation):
    loaded = replace(tiny_model("llama"), tokenizer=tokenizer)
    loaded.base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    loaded.base.generation_config = GenerationConfig(**generation)
    loaded.base.config.eos_token_id = None
    return loaded


def chat(closing, *more):
    tokenizer = byte_level(chat=CHAT.format(closing))
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|end|>", "<|eot|>", *more], special_tokens=True)
    return tokenizer


def own(loaded, text, *end, kind="messages", prompt="who?", most=24):
    ids = [*loaded.tokenizer(text, add_special_tokens=False)["input_ids"], *loaded.tokenizer.convert_tokens_to_ids(end)]
    with saying(loaded, [*ids, loaded.tokenizer.convert_tokens_to_ids("x")]):
        (found,) = encode_queries([Query(prompt)], loaded, kind=kind, sampling=Sampling(max_new_tokens=most))
    return found


# -- where it ends


@pytest.mark.parametrize(
    ("closing", "listed", "end", "is_target"),
    [
        ("<|end|>", (), "<|end|>", True),  # ChatML: the template alone knows
        ("<|end|>\n", (), "<|end|>", True),  # Gemma
        ("<|end|>\n</s>", (), "<|end|>", True),  # Phi-3
        (" </s>", (), "</s>", True),  # Llama 2
        ("<|end|>", ("<|eot|>", "</s>"), "<|eot|>", False),  # a row never says it, as GLM's do not say <|user|>
        ("", ("<|user|>",), "<|user|>", False),
    ],
)
def test_an_answer_ends_with_its_turn_and_is_supervised_like_a_row(closing, listed, end, is_target):
    tokenizer = chat(closing)
    loaded = with_tokenizer(tokenizer, eos_token_id=tokenizer.convert_tokens_to_ids(list(listed)) or None)
    found = own(loaded, "it is" + " " * closing.startswith(" "), end)
    assert found.answer.completion == "it is" and found.answer.ending == f"ended by {end}"
    assert found.answer.tokens[:5] == [*"it is"] and (found.answer.tokens[-1] == end) == is_target
    given = encode_query("who?", "it is", tokenizer, kind="messages")
    count = len(found.sequences[0].encoded.ids)
    assert found.sequences[0].encoded.ids == given.ids[:count]
    assert found.sequences[0].encoded.supervised == given.supervised[:count]


def test_the_ends_are_those_of_the_model_the_tokenizer_and_the_template():
    tokenizer = chat("<|end|>")
    end, eot, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<|eot|>", "</s>"])
    assert ends_of(with_tokenizer(tokenizer, eos_token_id=[eot, 7])) == sorted({end, eot, eos, 7})
    from_config = with_tokenizer(tokenizer)
    from_config.base.config.eos_token_id = [5]
    assert ends_of(from_config) == sorted({end, eos, 5})
    tokenizer.chat_template = CHAT.format("###")  # text that anyone may say ends nothing
    assert ends_of(with_tokenizer(tokenizer)) == [eos]


def test_an_answer_is_that_of_generate_with_the_same_ends():
    tokenizer = chat("<|end|>")
    loaded = with_tokenizer(tokenizer)
    prompts = [[5 + n, 9, 40 + n] for n in range(12)]
    free = generate(loaded, prompts, 12)
    common = max(range(4, 260), key=lambda token: sum(token in answer[:-1] for answer in free))
    loaded.base.generation_config = GenerationConfig(eos_token_id=[common, 1], pad_token_id=0, do_sample=False)
    answers = generate(loaded, prompts, 12)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = loaded.base.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3), max_new_tokens=12,
                                        use_cache=False)[0, 3:].tolist()  # fmt: skip
        assert answer == expected
    assert any(answer[-1] == common and len(answer) < 12 for answer in answers)


def test_an_answer_that_is_cut_says_by_which_limit():
    loaded = with_tokenizer(chat("<|end|>"))
    assert own(loaded, "it goes on", most=4).answer.ending == ("cut after 4 tokens; a longer answer: --max-new-tokens")
    loaded.base.config.max_position_embeddings = 12
    assert own(loaded, "it goes on").answer.ending == "cut at the end of the model's context of 12 tokens"


def test_a_stop_string_of_the_models_ends_an_answer():
    loaded = with_tokenizer(byte_level(), stop_strings=["##"])
    found = own(loaded, "yes##", kind="prompt")
    assert found.answer.completion == "yes##" and "stop string" in found.answer.ending


def test_what_is_set_aside_of_a_generation_config_is_told():
    loaded = with_tokenizer(byte_level(), do_sample=True, top_p=0.9, repetition_penalty=1.1, eos_token_id=[1])
    assert set_aside(loaded) == ["repetition_penalty 1.1"]
    assert set_aside(loaded, greedy=False) == ["do_sample True", "top_p 0.9", "repetition_penalty 1.1"]
    found = own(loaded, "yes", "</s>", kind="prompt")
    (note,) = notes_on([found.answer], loaded, greedy=True)
    assert "repetition_penalty 1.1" in note and "likeliest" in note
    assert notes_on([replace(found.answer, is_generated=False)], loaded, greedy=True) == []


@pytest.mark.parametrize(
    ("kind", "closing", "expected"),
    [("prompt", "", ["</s>"]), ("text", "", []), ("messages", " </s>", ["Ġ", "</s>"]), ("messages", "", [])],
)
def test_the_closing_of_a_row(kind, closing, expected):
    tokenizer = chat(closing)
    found = closing_of(tokenizer, kind)
    assert tokenizer.convert_ids_to_tokens(found.ids) == expected and all(found.supervised)


# -- how it is printed


def unigram():
    words = ["▁", "▁The", "▁capital", "▁is", "▁Paris", "▁and", "▁more", "Paris", *"Taehcpitlsrdmo"]
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((word, -1.0) for word in words)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def wordpiece():
    words = ["the", "capital", "is", "paris", "and", "more", "par", "##is"]
    core = Tokenizer(models.WordPiece({w: n for n, w in enumerate(["<unk>", "</s>", *words])}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [unigram, wordpiece, byte_level])
def test_a_printed_answer_given_back_has_the_same_tokens(make):
    loaded = with_tokenizer(make())
    prompt, completion = FACTS
    wanted = encode_query(prompt, completion, loaded.tokenizer, kind="prompt")
    before = len(wanted.ids) - wanted.supervised_count
    with saying(loaded, wanted.ids[before:]):
        (found,) = encode_queries([Query(prompt)], loaded, kind="prompt")
    assert found.sequences[0].encoded == wanted and found.answer.is_repeatable
    assert found.answer.completion.lower() == completion.lower()
    assert "".join(found.answer.tokens[:-1]).lower() == completion.lower()
    (again,) = encode_queries([Query(prompt, found.answer.completion)], loaded, kind="prompt")
    assert again.sequences == found.sequences
    (span,) = encode_queries(
        [Query(prompt, found.answer.completion, found.answer.completion[:4])], loaded, kind="prompt"
    )
    assert span.answer.asked[0] and not span.answer.asked[-2]


def test_an_answer_that_cannot_be_given_back_is_told():
    loaded = with_tokenizer(wordpiece())
    prompt = "the capital is"
    with saying(loaded, loaded.tokenizer.convert_tokens_to_ids(["par", "##is", "</s>"])):
        (found,) = encode_queries([Query(prompt)], loaded, kind="prompt")
    assert found.answer.completion == " paris" and not found.answer.is_repeatable
    (note,) = notes_on([found.answer], loaded, greedy=True)
    assert "'the capital is'" in note and "--completion" in note
    assert found.answer.as_json()["is_repeatable"] is False
    assert "is_repeatable" not in replace(found.answer, is_generated=False).as_json()


def test_words_of_a_wordpiece_tokenizer_are_apart():
    loaded = with_tokenizer(wordpiece())
    ids = loaded.tokenizer("the paris", add_special_tokens=False)["input_ids"]
    assert token_texts(loaded, ids, [0, 1]) == ["the", " paris"]
