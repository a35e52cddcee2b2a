"""A refusal that needs no model comes before torch is imported: here there is no torch to import."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.reliability.refusals import commands, make_inputs

WITHOUT_TORCH = """
import contextlib, io, json, sys

sys.modules |= {"torch": None, "transformers": None}
from whence.cli.app import main

results = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["whence", *words]
    with contextlib.redirect_stderr(io.StringIO()) as messages:
        try:
            main()
        except SystemExit as left:
            results.append([left.code, messages.getvalue()])
        except ImportError as error:
            results.append([1, str(error)])
print(json.dumps(results))
"""


def test_refusals_need_no_torch(tmp_path):
    make_inputs(tmp_path)
    words = commands()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(words)],
        cwd=tmp_path, env={"PYTHONPATH": str(Path(__file__).parents[2] / "src")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for command, (code, message) in zip(words, json.loads(done.stdout), strict=True):
        assert code == 2 and message.startswith("error ") and message.count("\n") == 1, (command, code, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]
