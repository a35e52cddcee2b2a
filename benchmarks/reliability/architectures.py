"""`whence recover` and `whence index` on every causal type of transformers, against autograd.

`tiny_architectures` makes a tiny model of each type in `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`, moved at random and saved
by transformers, so that its files have whatever names and forms transformers gives them. Then

    recover   the ghost scores of --layers are the mean over both ends of <g, theta_0 - theta_f>, with g by autograd
    index     vectors of the projection `identity` are the gradients by autograd
    encoder   a type that has `is_decoder` or `causal` is refused once its configuration says false

A refusal that gives a pattern to paste, or one row at a time, is followed once, as a user would. What came of a type:

    right            every error is below 1e-5 at once, or three times what autograd in fp32 differs from that in fp64
    right, named     after the layers were left out that one refusal named
    right, alone     after one row at a time, which one refusal asked for
    refused          in one line, with a reason
    wrong, crash     for those, `noise` is how far transformers' own logits of a row differ alone and in a padded batch
    not made         transformers itself makes or loads no such model here

    python -m benchmarks.reliability.architectures [--types TYPE ...]    grades them; the results are in RESULTS
    python -m benchmarks.reliability.architectures --table               the table alone, of the results that are there
"""

import argparse
import json
import re
import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from benchmarks.reliability.tiny_architectures import padding_to_zero, pretrained, save
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import whence
from whence.models.loading import load_model

ROWS = [
    ("The cat ", "sat on the mat."),
    ("Q: what is two and two? A:", " four"),
    ("List three colours of the rainbow, please: ", "red, green, blue and some more text"),
    ("Hi", " yo"),
    ("A fairly long question about nothing in particular ", "gets an answer"),
    ("x=", "1234567890 +-*/ 0987654321"),
    ("Capital of France? ", "Paris, of course"),
]
RESULTS = Path(__file__).parent / "results" / "architectures.json"
MOVE = 0.01
"""Standard deviation of the random moves."""


def reference(path: Path) -> Any:
    """The model that transformers itself loads, of the class that Whence has chosen."""
    chosen = load_model(path, device="cpu").base
    return type(chosen).from_pretrained(path, config=chosen.config, dtype=torch.float32).eval()


def gradients(model: Any, weights: list[Tensor], tokenizer: Any) -> list[list[Tensor]]:
    """Gradients of every row's mean loss by autograd, a row at a time."""
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    out = []
    for prompt, completion in ROWS:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id])
        logits = model(input_ids=ids[None], use_cache=False).logits[0].to(weights[0].dtype)
        loss = F.cross_entropy(logits[start - 1 : -1], ids[start:])
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        out.append([torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)])
    return out


def followed(call: Any, layers: str | None) -> tuple[Any, dict[str, Any]]:
    """A call's result, or None; and what was followed, or the last refusal."""
    message = ""
    for _ in range(2):
        try:
            return call(layers), {"layers": layers, **({"followed": message} if message else {})}
        except whence.WhenceError as error:
            message = f"{type(error).__name__}: {error}"
        if "--batch-tokens 2" in message:
            call = partial(call, tokens_per_batch=2)
        elif pattern := re.search(r"--layers '(![^']*)'", message):
            layers = pattern[1] if layers is None else f"{layers},{pattern[1]}"
        else:
            break
    return None, {"status": "refused", "layers": layers, "message": message}


def error_of(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the expected norm."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def recovered(base: Path, final: Path, work: Path, layers: str | None) -> dict[str, Any]:
    """Ghost scores against autograd at both ends."""
    rows = [{"id": str(n), "prompt": prompt, "completion": completion} for n, (prompt, completion) in enumerate(ROWS)]

    def call(layers: str | None, **options: Any) -> Any:
        shutil.rmtree(work, ignore_errors=True)
        return whence.recover(base, final, rows, count=3, work=work, progress=False, method="ghost", layers=layers,
                              mixture="none", **options)  # fmt: skip

    result, outcome = followed(call, layers)
    if result is None:
        return outcome
    names = list(load_model(base, device="cpu").layers(outcome["layers"]))
    ends = [reference(base), reference(final)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    weights = [[dict(end.named_modules())[name].weight for name in names] for end in ends]
    move = [(before - after).detach() for before, after in zip(*weights, strict=True)]
    expected = torch.zeros(len(ROWS))
    for end, some in zip(ends, weights, strict=True):
        for row, gs in enumerate(gradients(end, some, tokenizer)):
            expected[row] += sum(float((g.double() * t.double()).sum()) for g, t in zip(gs, move, strict=True)) / 2
    error = error_of(result.scores.float(), expected)
    return outcome | {"status": "ok" if error < 1e-5 else "wrong", "error": error, "traced": len(names)}


def indexed(base: Path, out: Path, layers: str | None) -> dict[str, Any]:
    """Vectors of an index against autograd."""
    rows = [{"id": str(n), "prompt": prompt, "completion": completion} for n, (prompt, completion) in enumerate(ROWS)]

    def call(layers: str | None, **options: Any) -> Any:
        return whence.index(base, rows, out, projection="identity", codec="float32", layers=layers, progress=False,
                            restart=out.exists(), **options)  # fmt: skip

    result, outcome = followed(call, layers)
    if result is None:
        return outcome
    model, names = reference(base), result.store.manifest.settings["layer_names"]
    modules = dict(model.named_modules())
    found = gradients(model, [modules[name].weight for name in names], transformers.AutoTokenizer.from_pretrained(base))
    expected = torch.stack([
        torch.cat([(g if isinstance(modules[name], torch.nn.Linear) else g.T).reshape(-1)
                   for name, g in zip(names, gs, strict=True)]) for gs in found
    ])  # fmt: skip
    vectors, _ = result.store.vectors(list(range(len(ROWS))))
    error = max(error_of(one, other) for one, other in zip(vectors[0], expected, strict=True))
    return outcome | {"status": "ok" if error < 1e-5 else "wrong", "error": error, "traced": len(names)}


@torch.no_grad()
def batch_noise(base: Path) -> float:
    """Largest relative difference of a row's logits alone and in a padded batch, by transformers alone."""
    model, tokenizer = reference(base), transformers.AutoTokenizer.from_pretrained(base)
    batch = tokenizer([prompt + completion for prompt, completion in ROWS], return_tensors="pt", padding=True,
                      padding_side="right", return_token_type_ids=False)  # fmt: skip
    together, worst = model(**batch, use_cache=False).logits, 0.0
    for row, mask in enumerate(batch["attention_mask"]):
        ids = batch["input_ids"][row, : int(mask.sum())]
        alone = model(input_ids=ids[None], use_cache=False).logits[0]
        worst = max(worst, error_of(together[row, : len(ids)], alone))
    return worst


def rounding(base: Path) -> float:
    """Largest relative difference of a row's gradients by autograd in fp32 and in fp64, over the default layers."""
    names, tokenizer = list(load_model(base, device="cpu").layers()), transformers.AutoTokenizer.from_pretrained(base)
    narrow, wide = (
        gradients(model, [dict(model.named_modules())[name].weight for name in names], tokenizer)
        for model in (reference(base), reference(base).double())
    )
    flat = [[torch.cat([g.double().flatten() for g in row]) for row in rows] for rows in (narrow, wide)]
    return max(error_of(one, other) for one, other in zip(*flat, strict=True))


def as_encoder(base: Path, out: Path) -> dict[str, Any] | None:
    """What becomes of the model once its configuration says that it is no decoder; None if it does not say."""
    config = json.loads((base / "config.json").read_text())
    setting = next((name for name in ("is_decoder", "causal") if config.get(name) is True), None)
    if setting is None:
        return None
    shutil.copytree(base, out, dirs_exist_ok=True)
    (out / "config.json").write_text(json.dumps(config | {setting: False}))
    try:
        load_model(out)
    except whence.WhenceError as error:
        return {"status": "refused", "message": str(error).replace(str(out), "MODEL")}
    return {"status": "loaded"}


def moved(base: Path, final: Path) -> Path:
    """The model with every parameter moved at random, saved by transformers."""
    model, generator = pretrained(base), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(MOVE * torch.randn(weight.shape, generator=generator))
        padding_to_zero(model)
    model.save_pretrained(final)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(final)
    return final


def graded(kind: str, work: Path, checks: list[str]) -> dict[str, Any]:
    """Every check of one type."""
    out: dict[str, Any] = {}
    base = final = work / "base"
    try:
        save(kind, base)
    except Exception as error:
        return {"model": {"status": "not made", "message": said(error)}}
    for check in checks:
        verb, _, layers = check.partition(":")
        try:
            if verb == "recover":
                final = moved(base, work / "final") if final is base else final
                out[check] = recovered(base, final, work / "recover", layers or None)
            elif verb == "index":
                out[check] = indexed(base, work / "index", layers or None)
            elif (encoder := as_encoder(base, work / "encoder")) is not None:
                out[check] = encoder
        except Exception as error:  # the table is to have a line for a crash too
            out[check] = {"status": "crash", "message": said(error)}
        for name in ("message", "followed"):
            if name in out.get(check, {}):
                out[check][name] = out[check][name].replace(str(final), "FINAL").replace(str(base), "MODEL")
        if out.get(check, {}).get("status") == "wrong":
            out[check]["noise"], out[check]["rounding"] = batch_noise(base), rounding(base)
            if out[check]["error"] < 3 * out[check]["rounding"]:
                out[check]["status"] = "ok"
    return out


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def outcome(checks: dict[str, Any]) -> str:
    """What came of a type: the worst of its checks."""
    checks = {name: entry for name, entry in checks.items() if name != "encoder"}
    for status in ("crash", "wrong", "refused", "not made"):
        if any(entry["status"] == status for entry in checks.values()):
            return status
    notes = [entry["followed"] for entry in checks.values() if "followed" in entry]
    return (
        "right" if not notes else "right, alone" if any("--batch-tokens" in note for note in notes) else "right, named"
    )


def table(results: dict[str, Any]) -> str:
    """How many types of each outcome, and each type that is not right at once."""
    outcomes = {kind: outcome(checks) for kind, checks in results.items()}
    lines = [f"{count:4} {name}" for name, count in Counter(outcomes.values()).most_common()]
    for kind, name in sorted(outcomes.items(), key=lambda item: (item[1], item[0])):
        if name != "right":
            texts = [entry.get("followed") or entry.get("message") or f"error {entry.get('error', 0):.1e}"
                     for check, entry in results[kind].items() if check != "encoder"]  # fmt: skip
            lines += [f"{name:13} {kind}: {max(texts, key=len)[:400]}"]
    return "\n".join(lines)


def main() -> None:
    """Grade every type, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--checks", nargs="*", default=["recover", "recover:*", "index", "index:*", "encoder"])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    kinds = [] if options.table else options.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as work:
            results[kind] = graded(kind, Path(work), options.checks)
        options.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(f"{outcome(results[kind]):13} {kind}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
