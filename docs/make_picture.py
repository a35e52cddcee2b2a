"""Draw docs/pictures/trace.svg: real output of `whence trace` on the demo's index. Run after `make demo`.

python docs/make_picture.py [whence-demo]
"""

import io
import sys
from pathlib import Path

from rich.console import Console

import whence
from whence.reports.trace_tables import trace_tables

place = Path(sys.argv[1] if len(sys.argv) > 1 else "whence-demo")
found = whence.trace(place / "index", "What does json.dump do?", top=4, tokens=True)
console = Console(record=True, width=104, file=io.StringIO())
console.print(f'$ whence trace {place.name}/index --prompt "What does json.dump do?" --top 4 --tokens', markup=False)
console.print()
console.print(trace_tables(found))
(Path(__file__).parent / "pictures/trace.svg").write_text(console.export_svg(title="whence"))
