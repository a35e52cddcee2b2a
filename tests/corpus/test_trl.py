"""Rows are the tokens that TRL and LLaMA-Factory train on, and the loss is TRL's, but for differences stated here.

Their sides were computed by them in an environment of their own: `benchmarks/corpus/trl_shapes.py` and its sibling.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_tokenizers import byte_level
from whence.corpus.templates import supervise
from whence.corpus.tokens import IGNORED, collate, encode
from whence.gradients.capture import token_losses
from whence.models.loading import LoadedModel

RESULTS = Path(__file__).parents[2] / "benchmarks/corpus/results"
TRL = json.loads((RESULTS / "trl_shapes.json").read_text())
LLAMA_FACTORY = json.loads((RESULTS / "llamafactory_shapes.json").read_text())
DIFFERENCES = {
    # TRL: the whole completion, the user's turns in it too. Whence: what the assistant says.
    ("tight", "conversational completion of three turns"): ("<u>z<a>", ""),
    ("lines", "conversational completion of three turns"): ("\n<u>user\nz</s>\n<u>assistant\n\n", ""),
    # TRL: the newline behind the marker that closes a turn, which no model writes
    ("lines", "conversational prompt and completion"): ("\n", ""),
    ("lines", "conversational preference"): ("\n", ""),
    ("lines", "conversational preference with tools"): ("\n", ""),
    # TRL: the marker alone, of a turn that says nothing because the template writes no calls of tools
    ("lines", "messages with a call of a tool"): ("</s>", ""),
}
OTHER_TEXT = {
    # TRL: the roles as they are called, human and gpt, which few templates know. Whence: user and assistant.
    ("tight", "ShareGPT"): ("(human)x(gpt)y", "<u>x<a>y</s>"),
}
REFUSED = {("tight", "ShareGPT, assistant only"), ("tight", "conversations of roles")}
"""TRL refuses: it reads `conversations` as messages for its default alone, and with `from` and `value` alone."""


def tokenizer_of(template, supervised):
    tokenizer = byte_level([tuple(pair) for pair in TRL["merges"]], chat=TRL["templates"][template])
    supervise(tokenizer, supervised)
    return tokenizer


def test_ids_and_labels_are_those_of_the_collator_of_trl():
    different, other, refused = {}, {}, set()
    for case in TRL["rows"]:
        tokenizer, name = tokenizer_of(case["template"], case["supervise"]), (case["template"], case["name"])
        encoded = encode(case["row"], tokenizer)
        if "refused" in case:
            refused.add(name)
        elif encoded.ids != case["ids"]:
            other[name] = tokenizer.decode(case["ids"]), tokenizer.decode(encoded.ids)
        else:
            theirs = [False, *(label != IGNORED for label in case["labels"][1:])]  # nothing predicts the first
            triples = list(zip(encoded.ids, theirs, encoded.supervised, strict=True))
            alone = [token for token, a, b in triples if a and not b], [token for token, a, b in triples if b and not a]
            if any(alone):
                different[name] = tuple(tokenizer.decode(tokens) for tokens in alone)
    assert len(TRL["rows"]) >= 40
    assert (different, other, refused) == (DIFFERENCES, OTHER_TEXT, REFUSED)


def test_last_is_the_mask_history_of_llama_factory():
    other, left_out = {}, []
    for case in LLAMA_FACTORY["rows"]:
        tokenizer = byte_level(chat=LLAMA_FACTORY["template"])
        supervise(tokenizer, "last" if case["mask_history"] else "assistant")
        encoded = encode(case["row"], tokenizer)
        if "left out" in case:
            left_out.append(tokenizer.decode(encoded.ids))
        elif encoded.ids != case["ids"]:
            other[case["name"]] = tokenizer.decode(case["ids"]), tokenizer.decode(encoded.ids)
        else:
            assert encoded.supervised == [label != IGNORED for label in case["labels"]], case
    assert not other
    assert left_out == ["<u>x<a>y</s><u>z<a>"] * 2, "LLaMA-Factory leaves out what ends with the user; Whence reads it"


def tiny():
    model = LlamaForCausalLM(LlamaConfig(**TRL["tiny"]))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.arange(1, weight.numel() + 1, dtype=torch.float64).sin().reshape(weight.shape))
    return model.eval()


def test_supervise_all_is_the_default_loss_of_trl():
    """TRL's mean is over the tokens of a batch, Whence's over those of a row: weighed by tokens they are the same."""
    tokenizer, theirs = tokenizer_of("lines", "all"), TRL["losses"]["tiny"]
    examples = [encode({"messages": talk}, tokenizer) for talk in TRL["talks"]]
    model = LoadedModel(tiny(), tokenizer, "tiny")
    each = token_losses(model, collate(examples)).loss
    counts = torch.tensor([example.supervised_count for example in examples])
    assert counts.tolist() == theirs["tokens"]
    alone = [float(token_losses(model, collate([example])).loss) for example in examples]
    assert alone == pytest.approx(theirs["each"], abs=1e-6)
    assert float((each * counts).sum() / counts.sum()) == pytest.approx(theirs["batch"], abs=1e-6)
    assert abs(float(each.mean()) - theirs["batch"]) > 1e-3, "rows of other lengths weigh otherwise in TRL's mean"
