"""What only a GPU shows: that it agrees with a CPU, that it repeats itself, how fast it is, and what a trace takes.

    python -m benchmarks.indexing.gpu PART [PART ...] [--model DIR] [--corpus FILE] [--text FILE] [-o FILE]

    agree    one index on the CPU and one on the GPU, of the same rows: largest relative difference of a row's vector,
             least cosine, overlap of the first ten of five queries
    repeat   one index twice on the GPU: are the bytes the same? And without `hook_safety.repeatable`?
    halves   the same of a model in bfloat16 on the GPU, against fp32 on the CPU and against itself with all sums of
             fp32 numbers
    speed    `whence bench` of random Llamas of 100 M and 1 B parameters
    cpu      the smaller one on this machine's CPU
    profile  where the time of an index's batch goes
    trace    an index and a trace with --exact and --tokens of the larger one

Each part's results are written to FILE as it ends; parts that FILE has are run again and replaced.
"""

import argparse
import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import whence
from whence import numerics
from whence.gradients import capture as gradients
from whence.gradients.projections import two_sided
from whence.indexing.opening import open_index
from whence.indexing.speed import _index, bench, make_batches
from whence.indexing.vectors import IndexSettings, load_for, projection_for

AGREEING = {
    "two_sided": {},
    "two_sided, normalised": {"normalise": "layer"},
    "count_sketch": {"projection": "count_sketch"},
    "sjlt": {"projection": "sjlt"},
    "srht": {"projection": "srht"},
    "shuffle_sum": {"projection": "shuffle_sum"},
    "rademacher": {"projection": "rademacher", "width": 256},
}
SIZES = {
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}
ON_A_CPU = [("100M", "float32", "cpu", {}, 8, 512)]
SPEEDS = [  # size, dtype, device, options, examples a batch, tokens an example
    ("100M", "bfloat16", "cuda", {}, 32, 512),
    ("100M", "bfloat16", "cuda", {"projection": "count_sketch"}, 32, 512),
    ("100M", "float32", "cuda", {}, 32, 512),
    ("1B", "bfloat16", "cuda", {}, 16, 512),
    ("1B", "bfloat16", "cuda", {"projection": "count_sketch"}, 16, 512),
]


def build(model: str, corpus: Any, out: Path, **options: Any) -> tuple[whence.Index, float]:
    """An index, and the seconds it took."""
    start = time.perf_counter()
    index = whence.index(model, corpus, out, progress=False, **options)
    return index, time.perf_counter() - start


def vectors_of(index: whence.Index) -> torch.Tensor:
    """All rows [n k], decoded."""
    store = index.store
    parts = range(len(store.manifest.parts))
    return torch.cat([store.shard(0, part).decoded(store.codec, store.manifest.width) for part in parts])


def agreement(a: torch.Tensor, b: torch.Tensor) -> dict:
    """How far apart two indexes' vectors [n k] are."""
    tops = [(x[:5] @ x[5:].T).topk(10).indices for x in (a, b)]
    overlap = [len(set(p.tolist()) & set(q.tolist())) / 10 for p, q in zip(*tops, strict=True)]
    return {
        "largest_relative_difference": ((a - b).norm(dim=1) / a.norm(dim=1)).max().item(),
        "least_cosine": torch.cosine_similarity(a, b).min().item(),
        "overlap_of_first_ten": sum(overlap) / len(overlap),
    }


def halves(folder: Path, model: str, corpus: Path, text: Path) -> dict:
    """A model in bfloat16: against fp32, and with 16-bit products against products of widened numbers."""
    rows = [json.loads(line) for line in corpus.read_text().splitlines()[:300]]
    found, product = {}, numerics.product
    for name in ("two_sided", "count_sketch"):
        common = {"codec": "float32", "tokens_per_batch": 4096, **AGREEING[name]}
        exact, _ = build(model, rows, folder / f"exact-{name}", device="cpu", **common)
        half, _ = build(model, rows, folder / f"half-{name}", device="cuda", dtype="bfloat16", **common)
        for module in (gradients, two_sided):
            module.product = lambda x, y: x.float() @ y.float()
        wide, _ = build(model, rows, folder / f"wide-{name}", device="cuda", dtype="bfloat16", **common)
        for module in (gradients, two_sided):
            module.product = product
        found[name] = {
            "bfloat16 on the GPU against fp32 on the CPU": agreement(vectors_of(exact), vectors_of(half)),
            "16-bit products against widened ones": agreement(vectors_of(wide), vectors_of(half)),
        }
        print(name, found[name], flush=True)
    return found


def agree(folder: Path, model: str, corpus: Path, text: Path) -> dict:
    """CPU and GPU, projection by projection."""
    rows = [json.loads(line) for line in corpus.read_text().splitlines()[:300]]
    found = {}
    for number, (name, options) in enumerate(AGREEING.items()):
        common = {"codec": "float32", "tokens_per_batch": 4096, **options}
        here, cpu_seconds = build(model, rows, folder / f"cpu{number}", device="cpu", **common)
        there, gpu_seconds = build(model, rows, folder / f"gpu{number}", device="cuda", **common)
        seconds = {"cpu_seconds": cpu_seconds, "gpu_seconds": gpu_seconds}
        found[name] = agreement(vectors_of(here), vectors_of(there)) | seconds
        print(name, found[name], flush=True)
    return found


def repeat(folder: Path, model: str, corpus: Path, text: Path) -> dict:
    """Bytes of two builds on the GPU."""
    rows = [json.loads(line) for line in corpus.read_text().splitlines()[:2000]]
    own, found = gradients.repeatable, {}
    for name in ("two_sided", "count_sketch", "sjlt", "shuffle_sum"):
        options = AGREEING[name]
        for kind in ("repeatable", "as torch likes"):
            gradients.repeatable = own if kind == "repeatable" else lambda model: nullcontext()
            digests, seconds = [], []
            for turn in range(2):
                out = folder / f"{name}-{kind}-{turn}"
                _, took = build(model, rows, out, device="cuda", tokens_per_batch=16384, **options)
                files = sorted(out.glob("checkpoint-*/*.safetensors"))
                digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
                seconds.append(took)
            found[f"{name}, {kind}"] = {"same_bytes": digests[0] == digests[1], "seconds": seconds}
            print(name, kind, found[f"{name}, {kind}"], flush=True)
    gradients.repeatable = own
    return found


def random_llama(folder: Path, size: str, tokenizer: str) -> str:
    """A directory with random weights of that size."""
    out = folder / size
    if not out.exists():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES[size], vocab_size=32000, max_position_embeddings=2048)
        with torch.device("cuda"):
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        print(size, sum(weight.numel() for weight in model.parameters()) / 1e6, "M parameters", flush=True)
        model.save_pretrained(out)
        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
        del model
        torch.cuda.empty_cache()
    return str(out)


def cpu(folder: Path, model: str, corpus: Path, text: Path) -> dict:
    """The same on this machine's CPU."""
    return speed(folder, model, corpus, text, ON_A_CPU)


def speed(folder: Path, model: str, corpus: Path, text: Path, cells: list = SPEEDS) -> dict:
    """Ratios to a training step, throughput and memory."""
    found = {}
    for size, dtype, device, options, examples, length in cells:
        name = f"{size} {dtype} {device} {options.get('projection', 'two_sided')} {examples} x {length}"
        few = {"batches": 2} if device == "cpu" else {"batches": 8}
        result = bench(
            random_llama(folder, size, model),
            text,
            batch_size=examples,
            length=length,
            dtype=dtype,
            device=device,
            memory=not options and device == "cuda",
            **few,
            **options,
        )
        found[name] = asdict(result)
        told = {key: found[name][key] for key in ("ratio", "ratio_to_forward_backward", "tokens_per_second")}
        peaks = f"peak {result.peak_bytes / 2**30:.2f} GiB, step {result.step_peak_bytes / 2**30:.2f} GiB"
        print(name, told, peaks, flush=True)
        torch.cuda.empty_cache()
    return found


def profile(folder: Path, model: str, corpus: Path, text: Path) -> dict:
    """The operations that an index's batch spends its time in."""
    found = {}
    for projection in ("two_sided", "count_sketch"):
        settings = IndexSettings(space=whence.GradientSpace(projection=projection), dtype="bfloat16", device="cuda")
        loaded = load_for(random_llama(folder, "100M", model), settings)
        sketching = projection_for(loaded, settings)
        batches = make_batches(loaded, text, 32, 512, 4, settings)
        for batch in batches[:2]:
            _index(loaded, batch, sketching, settings, None)
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as seen:
            for batch in batches[2:]:
                _index(loaded, batch, sketching, settings, None)
            torch.cuda.synchronize()
        found[projection] = {
            by: seen.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)
            for by in ("self_cuda_time_total", "self_cpu_time_total")
        }
        print(found[projection]["self_cuda_time_total"][:6000], flush=True)
    return found


def trace(folder: Path, model: str, corpus: Path, text: Path) -> dict:
    """An index of 1,000 rows of the larger model, and a trace against it."""
    rows = [json.loads(line) for line in corpus.read_text().splitlines()[:1000]]
    big = random_llama(folder, "1B", model)
    _, seconds = build(big, rows, folder / "big", device="cuda")
    found: dict[str, Any] = {"index_seconds": seconds, "rows": len(rows)}
    for name, options in {"plain": {}, "exact": {"exact": True}, "tokens": {"exact": True, "tokens": True}}.items():
        index = open_index(folder / "big", device="cuda")
        times = []
        for _ in range(3):
            start = time.perf_counter()
            answer = whence.trace(index, rows[0]["instruction"], completion=rows[0]["output"], **options)
            times.append(time.perf_counter() - start)
        found[name] = {"seconds": times, "first": [hit.id for hit in answer.of(0)][:3], "own": rows[0].get("id")}
        print(name, found[name], flush=True)
    return found


PARTS = {part.__name__: part for part in (agree, halves, repeat, speed, cpu, profile, trace)}


def main() -> None:
    """Run the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--corpus", type=Path, default="../shared/data/instruct/alpaca.jsonl")
    parser.add_argument("--text", type=Path, default="../shared/data/domains/wikitext.jsonl")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/indexing/results/gpu.json"))
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    with TemporaryDirectory() as folder:
        for part in args.parts:
            start = time.perf_counter()
            found[part] = PARTS[part](Path(folder), args.model, args.corpus, args.text)
            found["machine"] = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
