"""Tiny tokenizers, made in memory: one token a byte, a trained byte-level BPE, and a slow one without offsets."""

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<u>", "<a>")
CORPUS = [
    "the cat sat on the mat, the other cat did not",
    "naïve café 😀😀 日本 日本語",
    "  two  spaces\n\n and lines\n",
]


def byte_level(merges=(), *, bos=False, eos=False, trim=False, chat=None):
    """One token a byte, and one for each merge; no splitting into words first."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={piece: k for k, piece in enumerate(pieces)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    elif trim:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    return _fast(core, chat)


def _fast(core, chat=None):
    core.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat
    return tokenizer


@functools.cache
def trained():
    """A byte-level BPE as models have it: words first, then merges, some of them across characters."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _fast(core)


class Slow(PreTrainedTokenizer):
    """Without offsets: the longest piece first, from the left."""

    def __init__(self, pieces):
        self.pieces = {piece: number for number, piece in enumerate(["<s>", "</s>", "<unk>", *pieces])}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    @property
    def vocab_size(self):
        """Number of pieces."""
        return len(self.pieces)

    def get_vocab(self):
        """Number of each piece."""
        return dict(self.pieces)

    def _tokenize(self, text):
        found = []
        while text:
            found.append(max((piece for piece in self.pieces if text.startswith(piece)), key=len, default=text[0]))
            text = text[len(found[-1]) :]
        return found

    def _convert_token_to_id(self, token):
        return self.pieces.get(token, 2)

    def _convert_id_to_token(self, index):
        return list(self.pieces)[index]


def marked(encoded, tokenizer):
    """Tokens as one string, each supervised one in brackets."""
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids)
    return " ".join(f"[{token}]" if on else token for token, on in zip(tokens, encoded.supervised, strict=True))
