"""The model's own answers as tokens, where each ended, and the text that gives its tokens back.

An answer is supervised like a row of the index' corpus: the token that ended it is a target if such a row is trained to
say it, and otherwise no part of the answer. Its text is found by decoding it behind its prompt, since many tokenizers
take the space off a text's first word; then it is encoded as `--completion` would be, and compared.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from whence.corpus.closings import Closing, closing_of
from whence.corpus.layouts import Row
from whence.corpus.tokens import Encoded, Tokenizer, encode_query
from whence.counts import number_of
from whence.errors import CorpusError, SettingError
from whence.models.generation import OnToken, ends_of, generate, set_aside
from whence.models.loading import LoadedModel
from whence.tracing.results import Answer

QUOTED = 60
"""Characters of a prompt that a note quotes."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the model completes a prompt."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise SettingError(f"--max-new-tokens {self.max_new_tokens}: a number above 0 is expected")
        if not 0 <= self.temperature < math.inf:
            raise SettingError(f"--temperature {self.temperature}: 0 (greedy) or a number above it is expected")


@dataclass(frozen=True)
class OwnAnswer:
    """What the model says to a prompt."""

    encoded: Encoded
    text: str
    ending: str
    """Where it ended, in words."""
    is_repeatable: bool
    """Whether the text, given as a completion, becomes the same tokens."""


def own_answers(
    prompts: list[str],
    encoded: list[list[int]],
    model: LoadedModel,
    kind: str,
    sampling: Sampling,
    *,
    contexts: Sequence[Row | None],
    on_token: OnToken | None = None,
) -> list[OwnAnswer]:
    """The model's answers to prompts, each at most `max_new_tokens` long and within the model's context.

    Args:
        prompts: Their texts.
        encoded: Their tokens.
        model: The model.
        kind: Layout of the corpus, which an answer's supervision follows.
        sampling: How tokens are chosen, and how many at most.
        contexts: What comes before each prompt; see `encode_prompt`.
        on_token: Of one prompt; see `generate`.
    """
    if not prompts:
        return []
    closing, ends = closing_of(model.tokenizer, kind), ends_of(model)
    out = []
    generated = _generated(model, encoded, sampling, on_token)
    for prompt, before, new, context in zip(prompts, encoded, generated, contexts, strict=True):
        is_ended = bool(new) and new[-1] in ends
        body = new[:-1] if is_ended else new
        targets = new if is_ended and new[-1] in closing.targets else body
        completed = partial(encode_query, prompt, tokenizer=model.tokenizer, kind=kind, context=context)
        text, is_repeatable = _text(before, [targets, body], model.tokenizer, completed, closing)
        supervised = [False] * len(before) + [True] * len(targets)
        ending = _ending(new, is_ended, len(before), model, sampling)
        out.append(OwnAnswer(Encoded(before + targets, supervised), text, ending, is_repeatable))
    return out


def notes_on(answers: Sequence[Answer], model: LoadedModel, *, greedy: bool) -> list[str]:
    """What a person should know of those answers that are the model's own."""
    out, own = [], [answer for answer in answers if answer.is_generated]
    if own and (others := set_aside(model, greedy=greedy)):
        out.append(
            f"The model's generation_config.json also sets {', '.join(others)}, which is set aside: a completion is "
            f"{'what the model finds likeliest' if greedy else 'drawn from its own probabilities'}."
        )
    if prompts := [answer.prompt[:QUOTED] for answer in own if not answer.is_repeatable]:
        more = f" and {len(prompts) - 1} more" if prompts[1:] else ""
        out.append(
            f"The tokenizer would not split the model's answer to {prompts[0]!r}{more} as the model did: given back "
            "with --completion it becomes other tokens, with other scores."
        )
    return out


def _generated(
    model: LoadedModel, prompts: list[list[int]], sampling: Sampling, on_token: OnToken | None
) -> list[list[int]]:
    room = [min(sampling.max_new_tokens, (model.context or 10**9) - len(prompt)) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for limit in set(room):
        numbers = [number for number in range(len(prompts)) if room[number] == limit]
        batch = generate(
            model,
            [prompts[n] for n in numbers],
            limit,
            temperature=sampling.temperature,
            seed=sampling.seed,
            on_token=on_token,
        )
        for number, new in zip(numbers, batch, strict=True):
            answers[number] = new
    return answers


def _ending(new: list[int], is_ended: bool, before: int, model: LoadedModel, sampling: Sampling) -> str:
    if is_ended:
        return f"ended by {model.tokenizer.convert_ids_to_tokens(new[-1])}"
    if len(new) >= sampling.max_new_tokens:
        return f"cut after {number_of(len(new), 'token')}; a longer answer: --max-new-tokens"
    if model.context is not None and before + len(new) >= model.context:
        return f"cut at the end of the model's context of {model.context} tokens"
    return "ended by a stop string of the model's generation_config.json"


def _text(
    before: list[int],
    answers: list[list[int]],
    tokenizer: Tokenizer,
    completed: Callable[[str], Encoded],
    closing: Closing,
) -> tuple[str, bool]:
    """The text of an answer, and whether it gives the answer's tokens back: those with its end, else those without.

    If no text does, it is what stands there. `completed` encodes a text as the completion of the prompt.
    """
    answer = answers[-1]
    start, whole = _decoded(before, tokenizer), _decoded(before + answer, tokenizer)
    alone = _decoded(answer, tokenizer)
    behind = whole[len(start) :] if whole.startswith(start) else alone
    plain = tokenizer.decode(answer, skip_special_tokens=True)
    texts = dict.fromkeys((behind, alone, f" {alone}", behind.rstrip(), alone.strip(), plain))
    for tokens in answers:
        for text in filter(None, texts):
            if _gives(completed, text, before + tokens, len(before), closing):
                return text, True
    return behind, False


def _decoded(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _gives(completed: Callable[[str], Encoded], text: str, wanted: list[int], before: int, closing: Closing) -> bool:
    """Whether a text as completion becomes the wanted tokens, targets from the prompt on, and then its closing."""
    try:
        given = completed(text)
    except CorpusError:
        return False
    rest = given.ids[len(wanted) :]
    is_closed = rest == closing.ids[max(0, len(closing.ids) - len(rest)) :]
    is_supervised = all(given.supervised[before : len(wanted)]) and not any(given.supervised[:before])
    return given.ids[: len(wanted)] == wanted and is_closed and is_supervised
