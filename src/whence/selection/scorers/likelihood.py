"""Scores from a model's own probabilities, the same for every target: loss, loss drop, Ask-LLM.

    loss        mean over the row's supervised tokens of -log p(token | what is before it), in nats; the rows that the
                model knows least come first, the unlearnable among them
    loss_drop   loss under `base` less loss under the last model: what the training in between has taught. With a last
                model that was trained on the task this is Moore and Lewis's difference of cross-entropies
    ask_llm     p(yes) / (p(yes) + p(no)) of a language model that is asked whether a text is worth training on

Ask-LLM sums, for yes and for no, the probabilities of all single tokens that say the word (capitals, a space before);
decoding tells which tokens those are. The source reads Flan-T5's p(yes) alone; the ratio makes models comparable that
put some of their probability elsewhere. Its question is about pre-training; give another for another purpose.

Targets are not read: each gets the same scores. Cost: one forward pass over every row; two for a loss drop.

Source: Ask-LLM is Sachdeva et al. 2024, How to Train Data-Efficient LLMs, https://arxiv.org/abs/2402.09668. Loss as a
filter: Marion et al. 2023, When Less is More, https://arxiv.org/abs/2309.04564. Loss drop: Moore and Lewis 2010,
Intelligent Selection of Language Model Training Data, https://aclanthology.org/P10-2041.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from whence.corpus.layouts import row_text
from whence.corpus.tokens import Batch, Encoded, encode_prompt
from whence.errors import ModelError, SettingError
from whence.gradients.forward_passes import batches, losses
from whence.models.loading import DTYPES, LoadedModel, load_model, local_directory, tokenizer_digest
from whence.models.loading_errors import FOREIGN, reason_of
from whence.selection.protocols import Target, View
from whence.turns import one_at_a_time

QUESTION = """###
{text}
###

Does the previous paragraph demarcated within ### and ### contain informative signal for pre-training a large-language \
model? An informative datapoint should be well-formatted, contain some usable knowledge of the world, and strictly NOT \
have any harmful, racist, sexist, etc. content.

OPTIONS: yes / no
ANSWER:"""
"""The question of arXiv 2402.09668."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Mean losses, 0 and above; -inf for a row that supervises nothing or whose loss is not finite."""

    seed: int = 0
    """Not used."""

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores in nats a token, the same for every target."""
        return _for_each(targets, _row_losses(view.model(), view))


@dataclass(frozen=True, kw_only=True)
class LossDrop:
    """Differences of mean losses; -inf for a row that supervises nothing or where either loss is not finite."""

    seed: int = 0
    """Not used."""
    base: str | Path | None = None
    """The model before training: directory or Hub name. None: the model that a LoRA adapter adapts."""

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores in nats a token, the same for every target. Above 0, training has made the row more likely.

        Raises:
            SettingError: No base was named, and the model has no adapter that could be taken off.
            ModelError: The base has another tokenizer.
        """
        model = view.model()
        if self.base is None and not model.has_adapter:
            raise SettingError(
                f"loss_drop compares {model.path} with the model that its training began from, and none was named. "
                "Name it with --set base=MODEL."
            )
        after = _row_losses(model, view)
        return _for_each(targets, self._before(model, view) - after)

    def _before(self, model: LoadedModel, view: View) -> Float32[Tensor, " n"]:
        if self.base is None:
            with model.model.disable_adapter():  # type: ignore[operator]
                return _row_losses(model, view)
        dtype = next(model.model.parameters()).dtype
        name = next((name for name, known in DTYPES.items() if known == dtype), None)
        base = load_model(self.base, device=str(model.device), dtype=name)
        if model.tokenizer is not None and tokenizer_digest(base.tokenizer) != tokenizer_digest(model.tokenizer):
            raise ModelError(
                f"--set base={self.base}: its tokenizer is not that of {model.path}, so the two models' losses are of "
                "different tokens. Name the model that the training began from."
            )
        return _row_losses(base, view)


@dataclass(frozen=True, kw_only=True)
class AskLLM:
    """Probabilities of yes against no; -inf for a row without text or where the answer is not finite."""

    seed: int = 0
    """Not used."""
    model: str | Path | None = None
    """The judge, causal or sequence to sequence: directory or Hub name. None: the corpus' own model."""
    question: str = QUESTION
    """The row's text replaces `{text}`. A model with a chat template gets the question as the user's turn."""
    max_tokens: int = 512
    """Most tokens of the row's text, which is cut at its end; fewer where the judge's context is short."""

    def __post_init__(self):
        if "{text}" not in self.question:
            raise SettingError(f"question of ask_llm: {{text}} must stand where the row's text goes; found none in "
                               f"{self.question[:60]!r}")  # fmt: skip
        if self.max_tokens < 1:
            raise SettingError(f"max_tokens {self.max_tokens} of ask_llm: a number above 0 is expected")

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores from 0 to 1, the same for every target.

        Raises:
            ModelError: The tokenizer has no single token for yes, or for no.
            SettingError: The question alone is longer than the model's context.
        """
        judge = _causal_judge(view.model()) if self.model is None else _load_judge(self.model)
        yes, no = answer_ids(judge.tokenizer, "yes"), answer_ids(judge.tokenizer, "no")
        scores = torch.full((view.rows,), torch.nan)
        for numbers, batch in batches(self._questions(view, judge), view.tokens_per_batch, view.rows):
            logits = judge.logits(batch.to(judge.device)).float()
            odds = logits[:, yes].logsumexp(1) - logits[:, no].logsumexp(1)
            scores[numbers] = odds.sigmoid().cpu()
        return _for_each(targets, scores)

    def _questions(self, view: View, judge: "_Judge") -> Iterator[Encoded]:
        for row in view.examples():
            text = row_text(row)
            ids = self._question_ids(text, judge) if text.strip() else []
            yield Encoded(ids, [False] * len(ids))

    def _question_ids(self, text: str, judge: "_Judge") -> list[int]:
        """The question about a text, which is cut until both fit in the judge's context."""
        text_ids, longest = judge.tokenizer(text, add_special_tokens=False)["input_ids"], self.max_tokens
        while True:
            excerpt = text if len(text_ids) <= longest else judge.tokenizer.decode(text_ids[:longest])
            ids = judge.encode(self.question.replace("{text}", excerpt))
            excess = len(ids) - (judge.context or len(ids))
            if excess <= 0:
                return ids
            longest = min(longest, len(text_ids)) - excess
            if longest < 1:
                raise SettingError(
                    f"question of ask_llm: it leaves no room for a text in the model's context of {judge.context} "
                    "tokens. Give a shorter one, or another model."
                )


@dataclass(frozen=True)
class _Judge:
    """A model that answers the question."""

    tokenizer: Any
    device: torch.device
    context: int | None
    encode: Callable[[str], list[int]]
    logits: Callable[[Batch], Float[Tensor, "b v"]]
    """Logits of the answer's first token."""


def answer_ids(tokenizer: Any, word: str) -> list[int]:
    """Ids of the single tokens that say a word: in small letters, capitalised, in capitals, with or without a space.

    Raises:
        ModelError: There is no such token.
    """
    token_ids = set()
    for variant in (word, word.capitalize(), word.upper()):
        for text in (variant, f" {variant}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and tokenizer.decode(ids).strip().lower() == word:
                token_ids.add(ids[0])
    if not token_ids:
        raise ModelError(f"ask_llm reads the probability of the token {word!r}, and the tokenizer has no such token. "
                         "Ask another model.")  # fmt: skip
    return sorted(token_ids)


def _causal_judge(model: LoadedModel) -> _Judge:
    @one_at_a_time
    @torch.no_grad()
    def logits(batch: Batch) -> Tensor:
        states, head = model.decode(batch.ids, batch.mask)
        last = batch.mask.sum(1).to(states.device) - 1
        return head(states[torch.arange(len(last), device=states.device), last])

    chat = bool(model.tokenizer.chat_template)
    return _Judge(
        model.tokenizer,
        model.device,
        model.context,
        lambda text: encode_prompt(text, model.tokenizer, chat=chat),
        logits,
    )


def _load_judge(path: str | Path) -> _Judge:
    """Load a judge from its directory or by its name."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(path))
    except FOREIGN:  # an adapter has no model configuration; loading tells what is no model
        return _causal_judge(load_model(path))
    if not config.is_encoder_decoder:
        return _causal_judge(load_model(path))
    try:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(local_directory(path), weights_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path))
    except FOREIGN as error:
        raise ModelError(f"{path}: not loadable as a sequence-to-sequence model ({reason_of(error)})") from error
    tokenizer.model_max_length = 10**30  # the text is cut here, without a warning
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def logits(batch: Batch) -> Tensor:
        start = torch.full((len(batch.ids), 1), config.decoder_start_token_id, device=device)
        return model(input_ids=batch.ids, attention_mask=batch.mask.long(), decoder_input_ids=start).logits[:, 0]

    context = getattr(config, "max_position_embeddings", None)
    return _Judge(tokenizer, device, context, lambda text: tokenizer(text)["input_ids"], logits)


def _row_losses(model: LoadedModel, view: View) -> Float32[Tensor, " n"]:
    """Each row's loss; NaN for a row without one."""
    row_losses = torch.full((view.rows,), torch.nan)
    for numbers, batch_losses in losses(model, view.encoded(), view.tokens_per_batch, view.rows):
        row_losses[numbers] = batch_losses
    return row_losses


def _for_each(targets: Iterable[Target], scores: Float32[Tensor, " n"]) -> Float32[Tensor, "s n"]:
    finite = torch.where(torch.isfinite(scores), scores, -math.inf)
    return torch.stack([finite for _ in targets])
