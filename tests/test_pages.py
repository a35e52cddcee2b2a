"""README.md and the pages under docs/, run from top to bottom on tiny models and rows.

Each walk is one directory, as a reader has it who goes through these pages in this order. The commands are those of the
page, word by word, and so are the next commands that its output names; numbers that would take long are cut by flags at
the end (`SHORTER`), of which the last one counts. A page that reads a file that nobody made, or names a flag of another
verb, fails; so does one that shows a mistake, and does not make it, or makes another one.
"""

import contextlib
import fnmatch
import importlib
import re
import shlex
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import huggingface_hub
import jaxtyping
import pytest
import typer.main
from pages import NEXT, PAGES, Step, commands_in_text, output_lines, steps_of

import page_inputs as inputs
from conftest import save_tiny_llama
from page_inputs import GUIDE, STEPS
from whence.cli.app import app
from whence.storage import Place

NOT_RUN = {
    "make *": "makes an environment; CI runs it",
    "pip install *": "needs a network; make wheel-test installs the package",
    "python -m benchmarks.*": "takes hours, and its own data",
    "printf *": "a C compiler, for a library of Intel's",
    "LD_PRELOAD=*": "the same",
    "whence train MODEL rows.jsonl -o *": "of replaying.md, which shows no output; run by tests/training",
    "whence * run --method replay *": "the same",
    "whence * run --method source *": "the same, by tests/selection",
    "* --device cuda": "its message is that of a torch without CUDA",
    "whence * --engine ray*": "workers, of scaling.md; run by tests/test_ray_*.py",
    "*workers_kept(engine)*": "the same",
    "whence explore *": "it serves until it is stopped; run by tests/explorer and tests/cli",
    "whence * s3://*": "a store, of scaling.md; run by tests/test_object_store.py",
}
"""Commands that no test runs, by pattern, and why."""
SHORTER = {
    "train": ("--max-steps", STEPS, "--batch-size", 4, "--checkpoints", 2),
    "bench": ("--batches", 1, "--batch-size", 2),
    "pool train": ("--tokens", 200, "--steps", 2, "--warmup-steps", 1),
    "mix suggest": ("--rows", 2, "--steps", 2),
    "evaluate selection": ("--steps", 1, "--seeds", 2, "--batch-size", 2, "--fraction", 0.4),
    "recover": ("--batch-size", 4, "--epochs", 1, "--lr", 5e-4),
}
"""What is appended to a verb's words."""
ANSWER = " Eat, move and sleep."
"""The model's answer to a prompt whose answer no page shows; a tiny model says nothing of sense."""


@dataclass(frozen=True)
class Walk:
    """Pages that are read in one directory, each with what its reader has before."""

    pages: dict[str, Callable[[Path], None]]
    before: dict[str, Callable[[], object]] = field(default_factory=dict)
    """What happens before a command, by its first words: a kill, damage, another process that writes (a context)."""


def nothing(model: Path) -> None:
    """The page makes all that it reads."""


WALKS = {
    "demo": Walk(
        {f"{GUIDE}/start.md": nothing, "README.md": inputs.place_readme, "docs/index.md": nothing,
         "docs/examples/index.md": inputs.place_demo_rows}
    ),
    "chat": Walk(
        {f"{GUIDE}/your_model.md": inputs.place_chat, f"{GUIDE}/tracing.md": nothing, f"{GUIDE}/python.md": nothing,
         f"{GUIDE}/indexing.md": nothing, f"{GUIDE}/curvature.md": nothing},
        {"whence info killed-index": partial(inputs.killed_index, "my-run", "killed-index", 1, checkpoints="all"),
         "whence verify hurt-index": inputs.hurt_index},
    ),
    "selecting": Walk({f"{GUIDE}/selecting.md": inputs.place_pool_of_rows}),
    "evaluating": Walk({f"{GUIDE}/evaluating.md": inputs.place_evaluating}),
    "training": Walk({f"{GUIDE}/training.md": inputs.place_training}),
    "recovering": Walk({f"{GUIDE}/recovering.md": inputs.place_secret}),
    "mixtures": Walk({f"{GUIDE}/pools.md": inputs.place_domains, f"{GUIDE}/mixing.md": inputs.place_regmix}),
    "troubles": Walk(
        {f"{GUIDE}/troubles.md": inputs.place_mistakes},
        {'whence trace my-index --prompt "37 and 1?"': partial(inputs.killed_index, "base", "my-index", 0,
                                                               max_tokens=inputs.MISTAKEN_TOKENS),
         "whence index base corpus.jsonl -o my-index": lambda: Place.at("my-index").locked(),
         "whence verify my-index": inputs.damaged_index,
         "whence train base corpus.jsonl -o my-run": inputs.damaged_run},
    ),
}  # fmt: skip
COMMANDS = typer.main.get_command(app)
COMMAND_IN_OUTPUT = re.compile(r"^\s*(?:\$ )?(?:\w+=\S+ )*whence [a-z-]")
OUTPUT_OF_DEMO = re.compile(r"^   \$ whence (?:train|index|trace) whence-demo/")
"""Lines that look like commands: the demo prints those that it runs."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny model that pages call `base` or MODEL."""
    return save_tiny_llama(tmp_path_factory.mktemp("pages") / "base", chat=True, context=256)


@pytest.fixture
def model_that_answers(monkeypatch):
    """Models say what the pages say that they said."""
    shown = "".join(step.shown for page in PAGES for step in steps_of(page))
    answers = dict(re.findall(r"^prompt +(.*)\nmodel said (.*)</s>$", shown, re.MULTILINE))

    def generate(loaded, prompts, most, **sampling):
        texts = [loaded.tokenizer.decode(prompt) for prompt in prompts]
        said = [next((answers[asked] for asked in answers if asked in text), ANSWER) for text in texts]
        ids = [loaded.tokenizer(text, add_special_tokens=False).input_ids for text in said]
        return [[*answer, loaded.tokenizer.eos_token_id] for answer in ids]

    monkeypatch.setattr("whence.tracing.own_answers.generate", generate)


@pytest.fixture
def small_demo(monkeypatch):
    """A demo of a few docstrings, which are not learnt."""
    demonstration = importlib.import_module("whence.cli.demonstration")
    monkeypatch.setattr(demonstration, "docstring_rows", lambda *_, **__: inputs.docstrings())
    monkeypatch.setattr(demonstration, "ROWS", len(inputs.docstrings()))
    for name, value in {"epochs": 1, "batch_size": 6}.items():
        monkeypatch.setitem(demonstration.RECIPE, name, value)


@pytest.fixture
def quick(monkeypatch):
    """Trainings end without a collection of garbage, laws are fitted roughly, and no process measures memory.

    Shapes are not checked, which takes half of the time, and is done wherever else these functions are tested.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr("accelerate.utils.memory.gc", types.SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr("whence.indexing.speed._peak", lambda *_: 1)
    law = importlib.import_module("whence.mixing.laws.exponential")
    fit = law.least_squares
    monkeypatch.setattr(law, "least_squares", lambda *given, **how: fit(*given, **how | {"max_nfev": 10}))


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.usefixtures("model_that_answers", "small_demo", "quick")
def test_pages_run_from_top_to_bottom(name, base, printed, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    inputs.place_open_names(base)
    before, seen = WALKS[name].before, set()
    for page, place in WALKS[name].pages.items():
        place(base)
        names = {"__name__": page}
        for step in steps_of(page):
            if step.is_python:
                exec(compile(shortened(step.text), f"{page}:{step.line}", "exec"), names)
                continue
            if why_not(step.text):
                continue
            seen.add(shlex.join(step.words))
            with contextlib.ExitStack() as stack:
                if (prepare := before.get(step.text)) and isinstance(
                    context := prepare(), contextlib.AbstractContextManager
                ):
                    stack.enter_context(context)
                following = run(step, printed)
            if step.next is None:
                continue
            if step.words[1] != "trace":  # its next command depends on what it finds
                assert following == flags_of(shlex.split(step.next)), f"{step}\nNext: {step.next}\n{following}"
            if step.next not in seen:
                seen.add(step.next)
                run_and_forget(Step(page, step.line, step.next.replace(" ... ", " 400 "), is_python=False), printed)


def run(step: Step, printed) -> tuple[str, set[str]] | None:
    """Run a step, whose exit code and message must be those that the page shows; the next command's verb and flags."""
    program, *words = step.words
    if program != "whence":
        look(step)
        return None
    code, out, err = printed(*words, *SHORTER.get(verb_of(words), ()))
    shown = re.findall(r"^error ((?:.+\n)+)", step.shown, re.MULTILINE)
    expected = {1, 2} if shown else {1} if re.search(r"\bis wrong\b|wrong checksum\.", step.shown) else {0}
    assert code in expected, f"{step}\nexit code {code}, {sorted(expected)} expected:\n{out}{err}"
    if shown:
        message, wanted = comparable(err.splitlines()[-1].removeprefix("error ")), comparable(shown[0])
        assert fnmatch.fnmatchcase(message, wanted), f"{step}\n{message}\nis not what the page shows:\n{shown[0]}"
    following = NEXT.findall(out)
    return flags_of(shlex.split(following[-1])) if following else None


def shortened(code: str) -> str:
    """Python with the settings of `train_pool` that the command has here."""
    words = iter(map(str, SHORTER["pool train"]))
    cut = {flag.removeprefix("--").replace("-", "_"): next(words) for flag in words}
    return re.sub(rf"\b({'|'.join(cut)})=[\d_]+", lambda setting: f"{setting[1]}={cut[setting[1]]}", code)


def run_and_forget(step: Step, printed) -> None:
    """Run a next command, and remove what it made under a name that the reader is to choose."""
    names = {word for word in step.words if re.fullmatch(r"[A-Z]+", word) and not Path(word).exists()}
    run(step, printed)
    for name in names:
        if Path(name).exists():  # the name of a text makes nothing
            shutil.rmtree(name)


def look(step: Step) -> None:
    """Commands that show what is there: it must be there, and `cat` shows the whole file, which is made if need be."""
    program, *words = step.words
    path = Path(words[-1])
    if program == "cat" and not path.exists():
        path.write_text(step.shown)
    assert program in ("ls", "cat", "head") and path.exists(), step


def verb_of(words: list[str]) -> str:
    """The words that name a verb: `train`, or `pool train`."""
    return " ".join(words[:2] if words[0] in ("pool", "mix", "evaluate") else words[:1])


def flags_of(words: list[str]) -> tuple[str, set[str]]:
    """A command's verb, and its flags but for those of `SHORTER`."""
    verb = verb_of(words[1:])
    cut = {str(word) for word in SHORTER.get(verb, ())}
    return verb, {word for word in words if word.startswith("-") and word not in cut}


def comparable(message: str) -> str:
    """A message in which numbers are alike, and what a page leaves out (...) is anything."""
    message = " ".join(message.replace(f"{Path.cwd()}/", "").split()).replace("[", "?").replace("*", "?")
    return re.sub(r"[0-9a-f]{32}|\d+(?:[.,]\d+)*", "#", message).replace("...", "*")


def why_not(text: str) -> str | None:
    """Why a command is not run; None where it is."""
    return next((reason for pattern, reason in NOT_RUN.items() if fnmatch.fnmatchcase(text, pattern)), None)


def test_every_block_is_run_or_listed():
    walked = {page for walk in WALKS.values() for page in walk.pages}
    for page in PAGES:
        for step in steps_of(page):
            assert page in walked or why_not(step.text), f"{step}\nneither run by a walk nor listed with a reason"
        for line in output_lines(page):
            assert OUTPUT_OF_DEMO.match(line) or not COMMAND_IN_OUTPUT.search(line), (
                f"{page}: {line}: a command, not run"
            )
    steps = [step for page in PAGES for step in steps_of(page)]
    for pattern in NOT_RUN:
        assert any(fnmatch.fnmatchcase(step.text, pattern) for step in steps), f"{pattern}: no page has it"
    for walk in WALKS.values():
        assert {*walk.before} <= {step.text for step in steps if step.page in walk.pages}


def test_commands_in_the_text_have_verbs_and_flags_that_exist():
    for page in PAGES:
        for words in commands_in_text(page):
            command, names = COMMANDS, []
            for word in words[1:]:
                inner = getattr(command, "commands", {})
                if word not in inner:
                    break
                command, names = inner[word], [*names, word]
            flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
            unknown = {word.partition("=")[0] for word in words if word.startswith("-")} - flags - {"--help", "-h"}
            assert not unknown, f"{page}: {shlex.join(words)}: {unknown} are no flags of whence {' '.join(names)}"
            assert names or words[1:2] in ([], ["VERB"]) or words[1].startswith("-"), f"{page}: {shlex.join(words)}"
