"""Build the wheel and use it, outside the checkout, from an environment that has only what a user would have.

The wheel goes into a new environment. What it needs is not installed again: the new environment also reads the
packages of the one that runs this script, but none of its .pth files, so that the editable install is out of sight.
Shown: the module is the wheel's, every data file of the source tree is in it, and the command line makes an index of
a tiny model, traces it into a page, and selects rows into another.

make wheel-test
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/whence"
ROWS = [
    {"id": f"row-{n}", "prompt": f"{n * 37 % 101} and {n % 7}?", "completion": f" {'yes' if n % 3 else 'no'}, {n}"}
    for n in range(24)
]


def run(*command: object, place: Path = ROOT) -> str:
    """What a command prints, with nothing of this environment's Python settings; it must succeed."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(word) for word in command], cwd=place, env=plain, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}\nexit code {done.returncode}")
    return done.stdout


def install_wheel(place: Path) -> Path:
    """A new environment with the wheel, and the packages of this one beside it; its Python."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place / "dist", ROOT)
    (wheel,) = (place / "dist").glob("whence-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", place / "env")
    python = place / "env/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    print(f"built {wheel.name}, {wheel.stat().st_size / 1000:.0f} kB")
    return python


def check_files(python: Path, place: Path) -> None:
    """The package that is imported is the wheel's, and has every file that the source tree has."""
    home = Path(run(python, "-c", "import whence; print(whence.__file__)", place=place).strip()).parent
    assert home.is_relative_to(place / "env"), f"imported {home}, not the wheel's package"
    expected = {file.relative_to(SOURCE) for file in SOURCE.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    missing = sorted(str(file) for file in expected if not (home / file).is_file())
    assert not missing, f"not in the wheel: {', '.join(missing)}"
    print(f"imported {home}, with all {len(expected)} files of src/whence")


def save_model(directory: Path) -> None:
    """A random Llama of two layers that reads bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=259, max_position_embeddings=96)).save_pretrained(directory)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)


def check_commands(whence: Path, place: Path) -> None:
    """An index, a trace and a selection with their pages."""
    version = run(whence, "--version", place=place).strip()
    assert "Usage: whence" in run(whence, "--help", place=place)
    save_model(place / "model")
    (place / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    built = json.loads(run(whence, "index", "model", "corpus.jsonl", "-o", "index", "--json", place=place))
    assert built["rows"] == len(ROWS), built
    question = ["--prompt", ROWS[5]["prompt"], "--completion", ROWS[5]["completion"]]
    run(whence, "trace", "index", *question, "-o", "report.html", place=place)
    run(whence, "select", "index", "--tasks", "task.jsonl", "--count", 5, "--report", "choice.html", place=place)
    for page in ("report.html", "choice.html"):
        text = (place / page).read_text()
        assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>"), f"{page} is no report"
    print(f"{version}: index, trace -o report.html and select --report work")


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp(prefix="whence-wheel-"))
    try:
        python = install_wheel(folder)
        check_files(python, folder)
        check_commands(python.parent / "whence", folder)
    finally:
        shutil.rmtree(folder)
