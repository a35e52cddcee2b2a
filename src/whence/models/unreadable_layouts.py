"""Directories of trainings that hold weights in a form that Whence does not read, and the command that changes it.

FSDP's `SHARDED_STATE_DICT` writes `pytorch_model_fsdp_0/`, DeepSpeed's ZeRO-3 `global_step*/` and `zero_to_fp32.py`,
and accelerate's `save_state` the weights without the configuration, below names such as `checkpoint_0` and `epoch_1`.

Sources: accelerate 1.15, `accelerate merge-weights --help`; DeepSpeed's `zero_to_fp32.py`, the text at its head.
"""

import re
from pathlib import Path

STEP_NAMES = re.compile(r"(checkpoint|epoch|step)_\d+")
"""Names that accelerate and its examples give to checkpoints."""


def missing_weights(directory: str | Path, *, adapter: bool = False) -> str:
    """What a directory holds in place of a model's or an adapter's weights, and what to do, in one sentence or two."""
    folder = Path(directory)
    expected = "adapter_model.safetensors" if adapter else "model.safetensors"
    lack = f"{directory}: there is no {expected} or {'adapter_model' if adapter else 'pytorch_model'}.bin in it"
    if fsdp := _first(folder, "pytorch_model_fsdp*"):
        if fsdp.is_dir():
            return (
                f"{lack}: {fsdp.name} holds FSDP's shards. Join them: accelerate merge-weights {fsdp} {directory} (and "
                "train with fsdp_state_dict_type FULL_STATE_DICT)."
            )
        return f"{lack}; {fsdp.name} holds FSDP's weights: rename it to pytorch_model.bin."
    if any(folder.glob("*.distcp")):
        return f"{lack}: it holds FSDP's shards (.distcp). Join them: accelerate merge-weights {directory} OUT."
    if (folder / "zero_to_fp32.py").is_file() or _first(folder, "global_step*"):
        step = _first(folder, "global_step*")
        return (
            f"{lack}: {step.name if step else 'zero_to_fp32.py'} is DeepSpeed's ZeRO checkpoint. Join its shards: "
            f"cd {directory} && python zero_to_fp32.py . . --safe_serialization"
        )
    if steps := accelerate_checkpoints(folder):
        return f"{lack}; it holds the checkpoints {_listed(steps)}. Name one of them: {steps[-1]}."
    return f"{lack}. Give the directory of a saved model."


def missing_configuration(directory: str | Path) -> str:
    """What weights without a configuration lack, which accelerate's `save_state` writes, and the way out."""
    folder = Path(directory)
    above = next((place for place in (folder.parent, folder.parent.parent) if (place / "config.json").is_file()), None)
    source = above or "MODEL"
    return (
        f"{directory}: there are weights in it, but no config.json (accelerate's save_state writes none). Copy it and "
        f"the tokenizer from the model that was trained: cp {source}/*.json {directory}"
    )


def accelerate_checkpoints(folder: Path) -> list[Path]:
    """Directories of a run that accelerate's scripts wrote, in the order of their numbers."""
    if not folder.is_dir():
        return []
    named = [item for item in folder.iterdir() if STEP_NAMES.fullmatch(item.name) and item.is_dir()]
    return sorted(named, key=lambda item: (item.name.rpartition("_")[0], int(item.name.rpartition("_")[2])))


def _first(folder: Path, pattern: str) -> Path | None:
    return next(iter(sorted(folder.glob(pattern))), None)


def _listed(paths: list[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
