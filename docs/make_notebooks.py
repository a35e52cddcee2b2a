"""Run docs/notebooks/*.ipynb from top to bottom, and write them with what they show. Run after `make demo`.

Cells run in this process, in IPython's own shell and through its formatters: what a cell shows is what Jupyter shows. A
Jupyter kernel would be a process for each notebook, which loads torch anew, and in CI could not be given a small demo
whose settings a test has patched; it and its client are 20 packages more.

What is written depends on the notebook and the demo alone: cells are numbered from 1, have ids by their place, and hold
no times and no paths of this machine. `faults` says what is wrong with a notebook; the tests ask it too.

python docs/make_notebooks.py [whence-demo [NAME ...]]     # some minutes; the notebooks are committed
"""

import atexit
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from nbformat import NotebookNode, v4
from traitlets.config import Config

FOLDER = Path(__file__).parent / "notebooks"
NOTEBOOKS = tuple(FOLDER / f"{name}.ipynb" for name in ("trace", "select", "recover", "mixtures"))
LARGEST = 150_000
"""Bytes of a notebook: the repository keeps them."""
OF_A_MACHINE = re.compile(r"/(?:home|root|tmp|usr|work|Users|var)/|[A-Z]:\\\\|0x[0-9a-f]{6,}")
"""Paths and addresses that another machine does not have."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
}


def read(file: Path) -> NotebookNode:
    """A notebook, checked against the format's schema."""
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Cells that run, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook: NotebookNode) -> None:
    """Run every cell in the working directory; in place of its outputs a cell then has what it shows.

    Raises:
        BaseException: Whatever a cell raises.
        RuntimeError: A cell wrote to stderr, such as a warning or a bar.
    """
    with _shell() as shell:
        for number, cell in enumerate(code_cells(notebook), start=1):
            cell.execution_count, cell.outputs = number, _outputs(shell, cell.source, number)


@contextlib.contextmanager
def _shell() -> Iterator[InteractiveShell]:
    """IPython's shell with a module of its own, and no file of its user's."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Config({"HistoryManager": {"enabled": False, "hist_file": ":memory:"}})
        shell = InteractiveShell.instance(
            config=settings, ipython_dir=folder, user_module=types.ModuleType("notebook"), colors="nocolor"
        )
        try:
            yield shell
        finally:
            atexit.unregister(shell.atexit_operations)
            shell.atexit_operations()
            shell.restore_sys_module_state()
            InteractiveShell.clear_instance()


def _outputs(shell: InteractiveShell, source: str, number: int) -> list[NotebookNode]:
    """What a cell shows: what it printed, and its last value in every form that the value has."""
    values: list[NotebookNode] = []

    def show(value: Any) -> None:
        if value is not None:
            data, metadata = shell.display_formatter.format(value)
            values.append(v4.new_output("execute_result", data, metadata=metadata, execution_count=number))

    shell.display_trap.hook = show
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        result = shell.run_cell(source)
    result.raise_error()
    if errors.getvalue():
        raise RuntimeError(f"cell {number} wrote to stderr: {errors.getvalue()}")
    text = printed.getvalue()
    return [*([v4.new_output("stream", name="stdout", text=text)] if text else []), *values]


def tidy(notebook: NotebookNode) -> None:
    """Give every cell the id of its place, and keep no metadata but what a reader needs."""
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id, cell.metadata = f"cell-{number:02}", {}
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5


def faults(notebook: NotebookNode) -> list[str]:
    """What is wrong with a notebook as it is committed."""
    wrong, cells = [], code_cells(notebook)
    if [cell.execution_count for cell in cells] != [*range(1, len(cells) + 1)]:
        wrong.append("its cells were not run from top to bottom")
    for number, cell in enumerate(cells, start=1):
        kinds = [(output.output_type, output.get("name")) for output in cell.outputs]
        wrong += [f"cell {number} shows {kind[0]}" for kind in kinds if kind[0] == "error" or kind[1] == "stderr"]
    text = nbformat.writes(notebook)
    wrong += [f"{place[0]!r} is of the machine it was run on" for place in OF_A_MACHINE.finditer(text)]
    if (size := len(text.encode())) > LARGEST:
        wrong.append(f"it has {size:,} bytes, at most {LARGEST:,} expected")
    if not any(cell.outputs for cell in cells):
        wrong.append("it has no outputs")
    return wrong


def make(demo: Path, files: Sequence[Path]) -> None:
    """Run notebooks beside a copy of the demo, and write them."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copytree(demo, "whence-demo")
        for file in files:
            notebook = read(file)
            execute(notebook)
            tidy(notebook)
            if wrong := faults(notebook):
                sys.exit(f"{file.name}: {'; '.join(wrong)}")
            nbformat.write(notebook, file)
            sys.stdout.write(f"{file.name}: {file.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}  # tables as text are as wide as the terminal, else
    names = sys.argv[2:]
    make(
        Path(sys.argv[1] if len(sys.argv) > 1 else "whence-demo").resolve(),
        [file for file in NOTEBOOKS if not names or file.stem in names],
    )
