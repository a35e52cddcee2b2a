"""EK-FAC's scores by bergson, by its public command. Runs in an environment that has it, on one thread.

    PYTHON bergson_worker.py DIRECTORY

Reads DIRECTORY/order.json: `model`, a directory; `rows` and `queries`, each with `input_ids` and `labels`. Runs
`bergson ekfac` on all linear layers but the head, with labels drawn from the model, sums in float32, its default
damping (a tenth) and one score for every query. Writes DIRECTORY/bergson.npy [q n], and the seconds of the processor
and the largest memory of that command to DIRECTORY/bergson.json; it does not tell factors from scores.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset

TOKENS_PER_BATCH = 512
"""The most it takes: its limit is the model's context."""


def main() -> None:
    """Write the data, run the command, gather its scores."""
    work = Path(sys.argv[1])
    order = json.loads((work / "order.json").read_text())
    for name in ("rows", "queries"):
        columns = {column: [row[column] for row in order[name]] for column in ("input_ids", "labels")}
        data = Dataset.from_dict(columns | {"length": [len(ids) for ids in columns["input_ids"]]})
        data.save_to_disk(str(work / f"bergson-{name}"))
    out = work / "bergson"
    words = [sys.executable, "-m", "bergson", "ekfac", str(out), "--overwrite", "true", "--model", order["model"],
             "--method", "kfac", "--hessian_cfg.ev_correction", "true", "--hessian_dtype", "fp32",
             "--index_cfg.precision", "fp32", "--data.dataset", str(work / "bergson-rows"),
             "--query.dataset", str(work / "bergson-queries"), "--query.aggregation", "none", "--score", "individual",
             "--filter_modules", "lm_head", "--token_batch_size", str(TOKENS_PER_BATCH)]  # fmt: skip
    with (work / "bergson.txt").open("w") as log:
        subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    info = json.loads((out / "scores" / "info.json").read_text())
    layout = np.dtype({name: info["dtype"][name] for name in ("names", "formats", "offsets", "itemsize")})
    table = np.memmap(out / "scores" / "scores.bin", dtype=layout, mode="r")
    np.save(work / "bergson.npy", np.stack([table[f"score_{query}"] for query in range(info["num_scores"])]))
    result = {"all": used.ru_utime + used.ru_stime, "memory": used.ru_maxrss * 1024}
    (work / "bergson.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
