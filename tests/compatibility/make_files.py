"""Make the files that `test_older_files.py` opens: an index, a run, a pool and evidence, finished and cut short.

They stand here as commit 5a17c86 (the last before the packages) wrote them, and are never made again by newer code:
what they prove is that newer code reads what older code wrote. To see how, in a checkout of that commit:

    python make.py OUT

Everything goes through the command line, but for the stops: a write that raises KeyboardInterrupt at the n-th file.
"""

import contextlib
import importlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

ANSWERS = {}


def save_model(directory, seed):
    import transformers as t

    torch.manual_seed(seed)
    config = t.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=259, max_position_embeddings=96, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = t.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, []))
    words.add_special_tokens(["<pad>", "<s>", "</s>"])
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def rows(count, first=0):
    return [
        {
            "id": f"row-{number}",
            "prompt": f"{number * 37 % 101} and {number % 7}?",
            "completion": f" {'yes' if number % 3 else 'no'}, {number}" + "!" * (number % 9),
            "source": f"s{number % 2}",
        }
        for number in range(first, first + count)
    ]


def write(path, some):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in some))


def whence(*words, stops=False):
    """Run a command; its stdout. `stops`: a KeyboardInterrupt ends it, as Ctrl-C would."""
    from whence.cli import main

    sys.argv = ["whence", *map(str, words)]
    said = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(said):
        try:
            main()
        except SystemExit as left:
            code = left.code
    assert code == (130 if stops else 0), (words, code, said.getvalue())
    return said.getvalue()


@contextlib.contextmanager
def stopped_after(owner, name, calls):
    """Let a function raise KeyboardInterrupt after so many calls."""
    real, left = getattr(owner, name), [calls]

    def stop(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    setattr(owner, name, stop)
    try:
        yield
    finally:
        setattr(owner, name, real)


def main(out):
    out = Path(out).absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.chdir(out)
    torch.set_num_threads(1)
    save_model("base", 0)
    write("corpus.jsonl", rows(40))
    write("more.jsonl", rows(8, first=40))
    write("task.jsonl", [{"prompt": "1 and 1?", "completion": " yes, 1"}])
    write("eval.jsonl", [{"text": "37 and 1? yes, 1!"}, {"text": "74 and 2? yes, 2!!"}])

    importlib.import_module("whence.ingest").ROWS_PER_SHARD = 16
    training = ("--max-steps", 4, "--checkpoints", 2, "--batch-size", 4, "--lr", "1e-2", "--max-tokens", 64)
    whence("train", "base", "corpus.jsonl", "-o", "run", *training)
    import transformers

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    real = transformers.Trainer.__init__

    def watched(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.add_callback(Stop())

    transformers.Trainer.__init__ = watched
    whence("train", "base", "corpus.jsonl", "-o", "run-stopped", *training, stops=True)
    transformers.Trainer.__init__ = real

    building = ("--width", 8, "--checkpoints", "all", "--codec", "int8")
    whence("index", "run", "corpus.jsonl", "-o", "index", *building)
    from whence.store import Store

    with stopped_after(Store, "add_shard", 3):
        whence("index", "run", "corpus.jsonl", "-o", "index-stopped", *building, stops=True)

    pool = ("--by", "source", "--max-tokens", 64, "--tokens", 512, "--steps", 4, "--warmup-steps", 1)
    whence("pool", "train", "base", "corpus.jsonl", "-o", "pool", *pool)
    from whence.members import Pool

    with stopped_after(Pool, "with_member", 1):
        whence("pool", "train", "base", "corpus.jsonl", "-o", "pool-stopped", *pool, stops=True)

    recovering = (
        "base",
        "run/checkpoint-4",
        "corpus.jsonl",
        "--count",
        20,
        "--method",
        "nnls",
        "--mixture",
        "gradients",
    )
    whence("recover", *recovering, "--work", "evidence", "-o", "recovered.jsonl")

    ANSWERS["info"] = json.loads(whence("info", "index", "--json"))
    ANSWERS["trace"] = json.loads(
        whence("trace", "index", "--prompt", "37 and 1?", "--completion", " yes, 1!", "--top", 5, "--exact", "--json")
    )
    ANSWERS["select"] = json.loads(
        whence("select", "index", "--tasks", "task.jsonl", "--method", "less", "--count", 6, "--json")
    )
    ANSWERS["ablate"] = json.loads(whence("ablate", "pool", "--eval", "eval.jsonl", "--json"))
    ANSWERS["recover"] = json.loads(whence("recover", *recovering, "--work", "evidence", "--json"))
    Path("answers.json").write_text(json.dumps(ANSWERS, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
