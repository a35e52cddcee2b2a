"""Corpora in memory as scorers read them, and targets to score them for."""

from dataclasses import dataclass

from whence.corpus.tokens import Encoded, encode, encode_query
from whence.selection.protocols import QueryText, Target


@dataclass
class Rows:
    """A view of rows in memory."""

    listed: list
    loaded: object
    tokens_per_batch: int = 200

    @property
    def rows(self):
        """Their number."""
        return len(self.listed)

    def examples(self):
        """As they are."""
        return iter(self.listed)

    def encoded(self):
        """In the model's tokens, so that a view without a model refuses."""
        tokenizer = self.model().tokenizer
        return (encode(row, tokenizer) for row in self.listed)

    def model(self):
        """The model given."""
        return self.loaded


@dataclass
class Tokens(Rows):
    """A view of token ids alone."""

    def encoded(self):
        """As they are."""
        return iter(self.listed)


def texts(*listed):
    """A view of texts, without a model."""
    return Rows([{"text": text} for text in listed], None)


def query(row, model):
    """A row as a query."""
    prompt, completion = row["prompt"], row["completion"]
    return QueryText(prompt, completion, encode_query(prompt, completion, model.tokenizer, kind="prompt"))


def ids_alone(example):
    """Token ids as a query."""
    return QueryText("", "", example)


def text_alone(text):
    """A text as a query."""
    return QueryText("", text, Encoded([], []))


def each(queries):
    """Every query as a target of its own."""
    return [Target(f"query {number}", [asked]) for number, asked in enumerate(queries)]


def asking(*listed):
    """Every text as a target of its own."""
    return each([text_alone(text) for text in listed])
