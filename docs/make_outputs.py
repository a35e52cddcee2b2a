"""Run the pages of the guide from top to bottom, and put into them what their commands and Python really print.

In one directory, as their reader has it: base-6m, fine-tuned by a Trainer on 400 docstrings of Python's standard
library, and the commands of each page in order. What a page leaves out (`...`, or all but some lines of a table) it
leaves out again. Its sentences are not written here: read those that quote a number that moved.

python docs/make_outputs.py SCRATCH [PAGE ...]     # a quarter of an hour

SCRATCH is kept. What commands printed is in SCRATCH/printed.json, and they are not run again: begin with an empty
directory where the code has changed. Needs ../shared/models/base-6m. `start.md` runs the demo anew.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from pages import ROOT, Step, shown_block, steps_of

from whence.cli.demonstration import docstring_rows

BASE = ROOT.parent / "shared/models/base-6m"
ROWS, MORE = 400, 50
COLUMNS = "100"
"""Width of what is printed."""
CHAT = tuple(f"docs/guide/{name}.md" for name in ("your_model", "tracing", "python", "indexing", "curvature"))
DEMO = ("docs/guide/start.md", "README.md")
LABEL = re.compile(r"([a-z][a-z ]*?)  +\S")
"""A line of a table that begins with what its number is."""
BAR = re.compile(r"^(Indexing): (\d+)/\2.*$", re.MULTILINE)
"""The last line of a bar."""
LEFT_OUT = "..."
NOT_RUN = ("make ", "pip ")


def write_jsonl(file: str, rows: Iterable[dict]) -> None:
    """Rows as .jsonl."""
    Path(file).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def docstrings() -> list[dict]:
    """The demo's docstrings in an order of their own, as instructions."""
    rows = docstring_rows(1000)
    random.Random(0).shuffle(rows)
    names = {"instruction": "prompt", "output": "completion", "source": "source"}
    return [{"id": row["id"]} | {name: row[old].strip() for name, old in names.items()} for row in rows]


def place_chat() -> None:
    """The corpora of the pages about one's own model, and `my-run`."""
    rows = docstrings()
    write_jsonl("corpus.jsonl", rows[:ROWS])
    write_jsonl("more.jsonl", rows[ROWS : ROWS + MORE])
    write_jsonl("bad.jsonl", [*rows[:2], {"article": "a?", "summary": "b"}])
    turns = [{"role": "user", "content": "What is glob?"}, {"role": "assistant", "content": "A module."},
             {"role": "user", "content": "What does glob.glob do?"},
             {"role": "assistant", "content": "Return a list of paths matching a pathname pattern."}]  # fmt: skip
    odd = [{"prompt": "No answer?", "completion": None}, {"prompt": "A long story. " * 80, "completion": "The end."}]
    write_jsonl("mixed.jsonl", [*rows[:40], *odd, {"messages": turns}])
    if not Path("my-run/checkpoint-200").exists():
        fine_tune(rows[:ROWS])


def fine_tune(rows: list[dict]) -> None:
    """Write `my-run` by an ordinary Trainer: 200 steps of 16 rows, a checkpoint every 100."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    arguments = TrainingArguments(
        "my-run", per_device_train_batch_size=16, max_steps=200, save_steps=100, learning_rate=2e-3, logging_steps=1,
        lr_scheduler_type="cosine", seed=0, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(BASE),
        arguments,
        train_dataset=[tokenised(tokenizer, row) for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # a line a step
        trainer.train()


def tokenised(tokenizer, row: dict) -> dict[str, list[int]]:
    """Token ids of a question and its answer by the chat template, of which the answer and its end are supervised."""
    question = {"role": "user", "content": row["instruction"]}
    answer = {"role": "assistant", "content": row["output"]}
    lay_out = {"tokenize": False}
    asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, **lay_out)
    whole = tokenizer.apply_chat_template([question, answer], **lay_out)
    ids, count = tokenizer(whole).input_ids, len(tokenizer(asked, add_special_tokens=False).input_ids)
    count += len(ids) - len(tokenizer(whole, add_special_tokens=False).input_ids)
    return {"input_ids": ids, "labels": [-100] * count + ids[count:]}


def killed_index() -> None:
    """A build of two checkpoints that is killed when the first is done, as a reader's may be."""
    shutil.rmtree("killed-index", ignore_errors=True)
    words = [*whence(), "index", "my-run", "corpus.jsonl", "-o", "killed-index", "--checkpoints", "all"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(Path("killed-index").glob("checkpoint-001/*.safetensors")):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)


def hurt_index() -> None:
    """A copy of an index, of which one bit was flipped."""
    shutil.rmtree("hurt-index", ignore_errors=True)
    shutil.copytree("my-index", "hurt-index")
    file = Path("hurt-index/checkpoint-000/shard-00000.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def same_shards() -> None:
    """Refuse the page's claim if the build that was killed has other bytes than the one that was not."""
    for file in Path("all-index").glob("*/*"):
        assert file.read_bytes() == Path("killed-index", *file.parts[1:]).read_bytes(), file


BEFORE = {"whence info killed-index": killed_index, "whence verify hurt-index": hurt_index}
"""What happens before a command."""
AFTER = {"whence index my-run corpus.jsonl -o all-index --checkpoints all": same_shards}


def whence() -> list[str]:
    """This environment's Whence as a command."""
    return [sys.executable, "-m", "whence"]


def remembered(step: Step, names: dict) -> str:
    """What a step prints; of a command that was run, what it printed then."""
    memory = Path("printed.json")
    known = json.loads(memory.read_text()) if memory.exists() else {}
    key = f"{step.page}: {step.text}"
    if step.is_python or key not in known:
        began = time.perf_counter()
        known[key] = printed(step, names)
        memory.write_text(json.dumps(known, indent=1))
        sys.stderr.write(f"{step} ({time.perf_counter() - began:.0f} s)\n")
    return known[key]


def printed(step: Step, names: dict) -> str:
    """What a step prints, without this machine's paths and blanks at the ends of lines."""
    if step.is_python:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            exec(compile(step.text, str(step), "exec"), names)
        return tidy(out.getvalue())
    program, *words = step.words
    if program == "cat":  # a file that the reader is shown, and makes
        Path(words[0]).write_text(step.shown)
        return step.shown
    BEFORE.get(step.text, lambda: None)()
    call = [*whence(), *words] if program == "whence" else ["ls", "-C", *words] if program == "ls" else step.words
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr or not (done.stdout or done.stderr):
        raise RuntimeError(f"{step}\n{done.stderr}")
    AFTER.get(step.text, lambda: None)()
    errors = done.stderr[done.stderr.rfind("error ") :] if done.returncode == 2 else ""
    bars = [match[0] for match in BAR.finditer(done.stderr)] if BAR.match(step.shown) else []
    bar = "".join(f"{line}\n" for line in bars[-1:])
    return tidy(bar + done.stdout + errors)


def tidy(text: str) -> str:
    """Lines as a page has them."""
    lines = text.replace(f"{Path.cwd()}/", "").rstrip().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def kind(line: str) -> str:
    """A line without its numbers; of a table's, what the number is."""
    label = BAR.match(line) or LABEL.match(line)
    return label[1] if label else re.sub(r"[\d.,]+", "#", line)


def is_partial(old: list[str], new: list[str]) -> bool:
    """Whether a page shows a part of what was printed."""
    labels = [LABEL.match(line) for line in old if line[:1] != " "]  # others go on from the line above
    return any(line.strip() == LEFT_OUT for line in old) or (all(labels) and not LABEL.match(new[-1]))


def as_shown(old: str, new: str) -> str:
    """What was printed, without what the page leaves out."""
    before, now = old.splitlines(), new.splitlines()
    if not before or not now or not is_partial(before, now):
        return new
    kept, place = [], 0
    for segment in segments(before):
        if segment[0].strip() == LEFT_OUT:
            kept += segment
        elif all(LABEL.match(line) for line in segment if line[:1] != " "):
            for label in [kind(line) for line in segment if line[:1] != " "]:
                place = found(now, label, place)
                end = place + 1
                while end < len(now) and now[end].startswith("     "):
                    end += 1
                kept += now[place:end]
        else:
            first, last = kind(segment[0]), kind(segment[-1])
            place = start = found(now, first, place)
            for _ in range(sum(kind(line) == last for line in segment)):
                place = found(now, last, place) + 1
            kept += now[start:place]
    return "".join(f"{line}\n" for line in kept)


def segments(lines: list[str]) -> list[list[str]]:
    """Lines that follow one another, and what stands for those left out."""
    out: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == LEFT_OUT:
            out += [[line], []]
        else:
            out[-1].append(line)
    return [segment for segment in out if segment]


def found(lines: list[str], wanted: str, start: int) -> int:
    """Number of the first line of a kind."""
    for place in range(start, len(lines)):
        if kind(lines[place]) == wanted:
            return place
    raise ValueError(f"no line like {wanted!r} in:\n" + "\n".join(lines[start:]))


def rewritten(page: str) -> str:
    """A page with what its steps print today."""
    text, names, place = (ROOT / page).read_text(), {"__name__": page}, 0
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    pieces = []
    for step in steps_of(page):
        if step.text.startswith(NOT_RUN) or (page == "README.md" and not step.is_python):
            continue
        new = remembered(step, names)
        if not step.shown or step.text.startswith("whence demo"):  # `demo_pages` shows it in parts
            continue
        at = text.index(step.shown, max(place, starts[step.line - 1]))
        pieces += [text[place:at], as_shown(step.shown, new)]
        place = at + len(step.shown)
    return "".join([*pieces, text[place:]])


def demo_pages(text: str) -> str:
    """The page of the demo with what that prints today, in each of the blocks that show a part of it."""
    done = subprocess.run([*whence(), "demo"], capture_output=True, text=True, check=True)
    new = tidy(done.stdout)
    for first in ("1. A corpus", "4. Questions", "5. How often"):
        block = shown_block(DEMO[0], first)
        text = text.replace(block, as_shown(f"{LEFT_OUT}\n{block}", new).removeprefix(f"{LEFT_OUT}\n"))
    return text


def make(scratch: Path, pages: tuple[str, ...]) -> None:
    """Write pages anew; those of the demo have a directory of their own."""
    for folder, walk, place in (("chat", CHAT, place_chat), ("demo", DEMO, lambda: None)):
        (scratch / folder).mkdir(parents=True, exist_ok=True)
        with contextlib.chdir(scratch / folder):
            if wanted := [page for page in walk if page in pages]:
                place()
            for page in wanted:
                text = rewritten(page)
                (ROOT / page).write_text(demo_pages(text) if page == DEMO[0] else text)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": COLUMNS}
    make(Path(sys.argv[1]).resolve(), tuple(sys.argv[2:]) or (*CHAT, *DEMO))
