"""Is damage ever used in silence? One bit at a time is flipped in whatever Whence writes, and the file is then used.

    python -m benchmarks.reliability.flips [--flips 500] [--seed 0] [--dir DIR] [-o FILE]    resumes from FILE
    python -m benchmarks.reliability.flips --cost [--rows 25000] [--width 4096] [-o FILE]    what checking costs a scan

Tiny directories are made once: an index, a pool with input matrices and stored losses, a training that was stopped, and
the work of a recover. For each flip one of them is copied, a bit of one of its files is flipped, `whence verify` reads
the copy, and then it is used: an index by `trace` and `select`, a pool by `ablate`, a run by `index` and by `train`,
which goes on with it, evidence by `recover`. What comes out is one of

    refused     the use ended with one line that names the file
    same        the use gave the undamaged answer: the file was not read, or was made anew
    silent      the use gave another answer and said nothing
    traceback   an error that nobody foresaw

and a flip is found if the use refused it or `verify` named a file. Then files are exchanged or spoiled as a whole. As
a control an undamaged copy of each is put through the same: `verify` finds nothing, and the answer is the same.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.indexing.scan import random_store
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from whence import storage
from whence.ablation.pool import open_pool
from whence.checksums import Written, digest, document_of, sealed
from whence.cli.app import main as whence_main
from whence.indexing.store import Store
from whence.models.training_state import IS_COMPLETE, RECORD

RESULTS = Path(__file__).parent / "results" / "flips.json"
COST = Path(__file__).parent / "results" / "cost.json"
KINDS = ("index", "pool", "run", "evidence")
TRAINING = ("--max-steps", 4, "--checkpoints", 2, "--batch-size", 4, "--lr", "1e-2", "--max-tokens", 64)


def run_command(*words: Any) -> tuple[str, str]:
    """Outcome ("ok", "refused" or "traceback") of a command in this process, and its stdout or last line of stderr."""
    sys.argv = ["whence", *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            whence_main()
    except SystemExit as left:
        if not left.code:
            return "ok", out.getvalue()
        said = " ".join((err.getvalue() or out.getvalue()).split())
        if "error unexpected " in said:
            return "traceback", said
        return "refused", said[max(0, said.find("error ")) :]  # without warnings
    except Exception as error:  # what nobody foresaw is what this looks for
        return "traceback", repr(error)
    return "ok", out.getvalue()


def save_model(directory: Path, seed: int) -> None:
    """A random two-layer Llama of byte tokens."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=259, max_position_embeddings=96, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(directory)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Bench:
    """The undamaged directories below `root`, and what is got out of them."""

    def __init__(self, root: Path):
        self.root = root
        if not (root / "made").exists():
            self._make()
        self.answers = {kind: self.use(kind, root / kind) for kind in KINDS}
        for kind, (outcome, text) in self.answers.items():
            assert outcome == "ok", (kind, text)

    def _make(self) -> None:
        root = self.root
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        save_model(root / "base", 0)
        rows = [
            {"id": f"row-{n}", "prompt": f"{n * 37 % 101} and {n % 7}?", "completion": f" {n % 3}, {n}" + "!" * (n % 9),
             "source": f"s{n % 2}"}
            for n in range(24)
        ]  # fmt: skip
        corpus = write_rows(root / "corpus.jsonl", rows)
        write_rows(root / "task.jsonl", [{"prompt": "1 and 1?", "completion": " 1, 1"}])
        write_rows(root / "eval.jsonl", [{"text": "37 and 1? 1, 1!"}, {"text": "74 and 2? 2, 2!!"}])
        made = [
            ("train", root / "base", corpus, "-o", root / "final", *TRAINING),
            ("index", root / "final", corpus, "-o", root / "index", "--width", 8, "--checkpoints", "all"),
            ("train", root / "base", corpus, "-o", root / "run", *TRAINING),
            ("pool", "train", root / "base", corpus, "-o", root / "pool", "--by", "source", "--max-tokens", 64,
             "--tokens", 512, "--steps", 4, "--warmup-steps", 1),
        ]  # fmt: skip
        for words in made:
            outcome, text = run_command(*words)
            assert outcome == "ok", (words, text)
        run = root / "run"  # stopped after its first checkpoint
        for path in [run / "checkpoint-4", *(path for path in run.iterdir() if path.is_file() and path.name != RECORD)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (run / RECORD).write_bytes(sealed(document_of((run / RECORD).read_bytes()) | {IS_COMPLETE: False}))
        for kind in ("pool", "evidence"):  # fills what they store
            self.use(kind, root / kind)
        (root / "made").write_text("")

    def use(self, kind: str, directory: Path) -> tuple[str, str]:
        """Outcome of using a directory, and the answer, or the first refusal."""
        root, corpus, texts = self.root, self.root / "corpus.jsonl", []
        commands: dict[str, list[tuple]] = {
            "index": [
                ("trace", directory, "--prompt", "37 and 1?", "--completion", " 1, 1!", "--top", 5, "--json"),
                ("select", directory, "--tasks", root / "task.jsonl", "--method", "less", "--count", 6, "--json"),
            ],
            "pool": [("ablate", directory, "--eval", root / "eval.jsonl", "--method", "regmean", "--json")],
            "run": [
                ("index", directory, corpus, "-o", directory.parent / "index-of-run", "--width", 8, "--restart"),
                ("train", root / "base", corpus, "-o", directory, *TRAINING, "--json"),
            ],
            "evidence": [("recover", root / "base", root / "final", corpus, "--count", 12, "--method", "nnls",
                          "--mixture", "gradients", "--work", directory, "--json")],
        }  # fmt: skip
        if kind == "run" and directory == root / kind:  # the undamaged one is not to be finished
            shutil.rmtree(root / "run-finished", ignore_errors=True)
            directory = Path(shutil.copytree(directory, root / "run-finished"))
            return self.use(kind, directory)
        for words in commands[kind]:
            outcome, text = run_command(*words)
            if outcome != "ok":
                return outcome, text
            if kind != "run":
                texts.append(json.dumps(json.loads(text)["rows"]))
        if kind == "run":
            store = Store.open(directory.parent / "index-of-run")
            texts = [store.manifest.shards[0].sha256]
            texts += [digest([(directory / "checkpoint-4" / "model.safetensors").read_bytes()])]
        return "ok", "\n".join(texts)

    def outcome(self, kind: str, spoil: Callable[[Path], str], scratch: Path) -> dict[str, Any]:
        """What comes of a copy that `spoil` has damaged; it returns what it has done."""
        shutil.rmtree(scratch, ignore_errors=True)
        copy = Path(shutil.copytree(self.root / kind, scratch / kind))
        what = spoil(copy)
        verdict, text = run_command("verify", copy)
        used, answer = self.use(kind, copy)
        if used == "ok":
            used = "same" if answer == self.answers[kind][1] else "silent"
        note = answer if used in ("refused", "traceback") else ""
        note = note if verdict != "traceback" else f"verify: {text}"
        outcome = {"kind": kind, "what": what, "use": used, "verify": verdict}
        return outcome | {"note": note.replace(str(scratch), "")[:200]}


def flipped(rng: random.Random) -> Callable[[Path], str]:
    """A function that flips one bit of one file below a directory."""

    def spoil(directory: Path) -> str:
        file = rng.choice(sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size))
        data = bytearray(file.read_bytes())
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        data[place] ^= 1 << bit
        file.write_bytes(data)
        return f"{file.relative_to(directory)}: bit {bit} of byte {place}"

    return spoil


def exchanged(first: str, second: str) -> Callable[[Path], str]:
    """A function that gives two files each other's name."""

    def spoil(directory: Path) -> str:
        a, b = ((directory / name).read_bytes() for name in (first, second))
        (directory / first).write_bytes(b)
        (directory / second).write_bytes(a)
        return f"{first} and {second} exchanged"

    return spoil


def member_of_nan(directory: Path) -> str:
    """Make a member NaN, and give the pool the checksum of that: only its numbers can tell."""
    pool = open_pool(directory)
    member = pool.members["s0"]
    file = directory / member.file
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}, file)
    document = document_of((directory / "pool.json").read_bytes())
    data = file.read_bytes()
    document["members"][0] |= vars(Written(len(data), digest([data], fast=False), digest([data])))
    (directory / "pool.json").write_bytes(sealed(document))
    return "a member of NaN, with its checksum"


def controls(bench: Bench, scratch: Path) -> list[dict[str, Any]]:
    """Copies that nothing has happened to."""
    return [bench.outcome(kind, lambda directory: "nothing", scratch) for kind in KINDS]


def spoiled_whole(bench: Bench, scratch: Path) -> list[dict[str, Any]]:
    """Files exchanged or replaced as a whole."""
    losses = sorted((bench.root / "pool" / "losses").iterdir())[:2]
    shards = [f"checkpoint-00{n}/shard-00000.safetensors" for n in (0, 1)]
    cases = [
        ("index", exchanged(*shards)),
        ("pool", exchanged("members/000.safetensors", "members/001.safetensors")),
        ("pool", exchanged("grams/000.safetensors", "grams/001.safetensors")),
        ("pool", exchanged(*(f"losses/{file.name}" for file in losses))),
        ("pool", member_of_nan),
        ("evidence", exchanged("evidence/base/part-00000.safetensors", "evidence/final/part-00000.safetensors")),
    ]
    return [bench.outcome(kind, spoil, scratch) for kind, spoil in cases]


def summary(flips: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by kind."""
    table = {}
    for kind in (*KINDS, "all"):
        of_kind = [flip for flip in flips if kind in (flip["kind"], "all")]
        found = sum(flip["use"] == "refused" or flip["verify"] == "refused" for flip in of_kind)
        uses = Counter(flip["use"] for flip in of_kind)
        tracebacks = sum("traceback" in (flip["use"], flip["verify"]) for flip in of_kind)
        table[kind] = {"flips": len(of_kind), "found": found, "refused by use": uses["refused"], "same": uses["same"],
                       "silent": uses["silent"], "tracebacks": tracebacks}  # fmt: skip
    return table


def flips(arguments: argparse.Namespace) -> None:
    """Do the flips that FILE does not have yet, then the whole files."""
    out = Path(arguments.out or RESULTS)
    done = json.loads(out.read_text())["flips"] if out.exists() else []
    if done and json.loads(out.read_text())["seed"] != arguments.seed:
        raise SystemExit(f"{out} has another seed")
    bench, scratch = Bench(Path(arguments.dir).absolute()), Path(tempfile.mkdtemp(prefix="flips-"))
    result = {"seed": arguments.seed, "flips": done}
    for number in range(len(done), arguments.flips):
        rng = random.Random(f"{arguments.seed} {number}")
        done.append(bench.outcome(KINDS[number % len(KINDS)], flipped(rng), scratch))
        if number % 10 == 9 or number == arguments.flips - 1:
            out.write_text(json.dumps({"summary": summary(done)} | result, indent=1) + "\n")
    whole = controls(bench, scratch) + spoiled_whole(bench, scratch)
    shutil.rmtree(scratch)
    out.write_text(json.dumps({"summary": summary(done), "whole files": whole} | result, indent=1) + "\n")
    for kind, counts in summary(done).items():
        print(kind, counts)
    for case in whole:
        print(case)


def cost(arguments: argparse.Namespace) -> None:
    """Seconds of a first and a second scan with and without checking, alternating, in one process; medians."""
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "index", "bfloat16", arguments.rows, arguments.width)
        size = sum(shard.bytes for shard in store.manifest.shards)
        queries, weight = torch.randn(1, 1, arguments.width), torch.ones(1)
        store.top_k(queries, weight, m=10)
        check: Any = storage.Place.check
        times: dict[str, list[float]] = {f"{scan}, {how}": [] for scan in ("first", "second") for how in
                                         ("unchecked", "xxh3", "sha256")}  # fmt: skip
        for _ in range(arguments.repeats):
            for how in ("unchecked", "xxh3", "sha256"):
                storage._intact.clear()
                storage.Place.check = (lambda *args, **options: None) if how == "unchecked" else check  # type: ignore
                opened = Store.open(Path(folder) / "index")
                if how == "sha256":  # as an older Whence lists them
                    for shard in opened.manifest.shards:
                        object.__setattr__(shard, "xxh3", None)
                for scan in ("first", "second"):
                    start = time.perf_counter()
                    opened.top_k(queries, weight, m=10)
                    times[f"{scan}, {how}"].append(time.perf_counter() - start)
        storage.Place.check = check  # type: ignore[method-assign]
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = {name: medians[name] / medians[f"{name.partition(',')[0]}, unchecked"] for name in medians}
    result = {"bytes": size, "threads": torch.get_num_threads(), "medians": medians, "ratios": ratios, "seconds": times}
    Path(arguments.out or COST).write_text(json.dumps(result, indent=1) + "\n")
    for name, seconds in medians.items():
        print(f"{name}: {seconds * 1e3:.1f} ms, {ratios[name]:.2f} of unchecked")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", default="/tmp/whence-flips")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rows", type=int, default=25_000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("-o", "--out")
    (cost if parser.parse_args().cost else flips)(parser.parse_args())
