"""The pool job in processes of its own: killed at random points it ends with the same bytes; what a merge holds."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ablate import QUICK, ROWS

from conftest import byte_tokenizer, contents, save_tiny_llama, write_jsonl
from forks import forked
from whence.ablation.member_training import train_pool
from whence.ablation.merged_files import write_merged
from whence.ablation.pool import MemberWeights, begin_pool, open_pool
from whence.errors import ModelError
from whence.storage import Place

KILLS = 6
COUNTED = ("transformers/trainer.py", "transformers/trainer_callback.py", "safetensors/torch.py")
TRAIN = ["--tokens", "200", "--steps", "4", "--warmup-steps", "1", "--max-tokens", "32", "--lr", "0.005"]


def in_a_process(call):
    """What a call of this module prints as JSON, in a fresh process of one thread that gives freed memory back."""
    done = subprocess.run(
        [sys.executable, "-c", f"import test_pool; test_pool.{call}"],
        capture_output=True, text=True, cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- killed


def drive(home):
    """Kill `whence pool train` at random points; prints what was there after each kill.

    Each child is a fork of this process, which has loaded everything once and runs one thread.
    """
    torch.set_num_threads(1)
    home, dice = Path(home), random.Random(4)
    calls = forked(_counted, home, home / "whole")
    seen, built = [], [home / "pool-0"]
    while len(seen) < KILLS:
        if forked(_counted, home, built[-1], dice.randrange(1, calls // 2)) is None:
            seen.append([built[-1].name, *_left(built[-1])])
        else:
            built.append(home / f"pool-{len(built)}")
    forked(_counted, home, built[-1])
    print(json.dumps({"seen": seen, "built": [place.name for place in built]}))  # noqa: T201


def _counted(home, out, kill_after=None):
    """Run the command, and be killed before such a call into or out of Whence's or the Trainer's functions."""
    from whence.ablation import member_training as pool
    from whence.cli import app as cli

    package, made, real = str(Path(cli.__file__).parents[1]), [0], pool.begin_pool

    def count(frame, event, argument):
        file = frame.f_code.co_filename
        if event.endswith("call") and (file.startswith(package) or file.endswith(COUNTED)):
            made[0] += 1
            if made[0] == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    def begin(*given, **more):
        sys.setprofile(count)  # from the first moment that anything is written
        return real(*given, **more)

    pool.begin_pool = begin
    sys.argv = ["whence", "pool", "train", str(home / "parent"), str(home / "rows.jsonl"), "-o", str(out), *TRAIN]
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    try:
        cli.main()
    except SystemExit as left:
        sys.setprofile(None)
        if left.code:
            os._exit(1)
    return made[0]


def _left(place):
    """Finished members with their times, and whether a training or a file was left half done."""
    if not (place / "pool.json").exists():
        return [{}, False]
    members = {name: (place / member.file).stat().st_mtime_ns for name, member in open_pool(place).members.items()}
    return [members, any(place.rglob("*.tmp")) or any(place.glob("work/*/*"))]


def test_a_pool_killed_at_random_points_ends_with_the_same_bytes(tmp_path):
    """SIGKILL at six points of `whence pool train`, by the number of calls; each child goes on where it was killed.

    A child that is done before its point is followed by a pool elsewhere, until six were killed.
    """
    save_tiny_llama(tmp_path / "parent")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    found = in_a_process(f"drive('{tmp_path}')")
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == [*(f"members/{number:03d}.safetensors" for number in range(3)), "pool.json"]
    for name in found["built"]:
        assert contents(tmp_path / name) == whole, "the same members and manifest, and nothing else"
    assert len({len(members) for _, members, _ in found["seen"]}) > 1 and any(half for *_, half in found["seen"])
    for name, members, _ in found["seen"]:
        now = open_pool(tmp_path / name).members
        file = {partition: tmp_path / name / member.file for partition, member in now.items()}
        assert all(file[partition].stat().st_mtime_ns == time for partition, time in members.items()), "trained again"


def test_a_member_whose_file_is_gone_is_trained_again(tmp_path):
    parent = save_tiny_llama(tmp_path / "parent")
    pool = train_pool(parent, ROWS, tmp_path / "pool", progress=False, **QUICK)
    before = contents(tmp_path / "pool")
    (tmp_path / "pool" / pool.members["b"].file).unlink()
    train_pool(parent, ROWS, tmp_path / "pool", progress=False, **QUICK)
    assert contents(tmp_path / "pool") == before


def test_a_trainers_directory_gives_its_last_checkpoint_as_the_parent(tmp_path):
    for step in (2, 10):
        save_tiny_llama(tmp_path / "run" / f"checkpoint-{step}", seed=step)
    pool = train_pool(tmp_path / "run", ROWS, tmp_path / "pool", progress=False, **QUICK)
    assert pool.parent == str(tmp_path / "run" / "checkpoint-10")
    assert pool.partitions == ["a", "b", "c"]


def test_a_parent_that_is_no_whole_model_is_refused_before_anything_is_written(tmp_path):
    save_tiny_llama(tmp_path / "parent")
    (tmp_path / "parent" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"there is no model\.safetensors or pytorch_model\.bin in it"):
        train_pool(tmp_path / "parent", ROWS, tmp_path / "pool", progress=False, **QUICK)
    assert not (tmp_path / "pool").exists()


# -- memory


def held_by(home):
    """Largest private memory of a merge, and of storing a member, over what it was before; in bytes, as JSON.

    Read between the pieces of every file that is written and after each tensor of a member: what is held then is all
    that is ever held at length. Mapped files, which the kernel drops when it likes, do not count.
    """
    torch.set_num_threads(1)
    home, peak = Path(home), [0]

    def look():
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], 1024 * int(status.split("RssAnon:")[1].split()[0]))

    def looked_at(pieces):
        for piece in pieces:
            look()
            yield piece
            look()

    write, read = Place.write, MemberWeights.read

    def reading(self, *given):
        found = read(self, *given)
        look()
        return found

    Place.write = lambda self, name, pieces, **more: write(self, name, looked_at(pieces), **more)
    MemberWeights.read = reading
    pool, found = open_pool(home / "pool"), {}
    works = {
        "nothing": lambda: pool.start().described(),
        "merge": lambda: write_merged(pool, dict.fromkeys(pool.partitions, 0.25), home / "merged"),
        "member": lambda: pool.with_member("e", home / "member", dtype="bfloat16", tokens=1, rows=1),
    }
    for name, work in works.items():
        peak[0] = 0
        look()
        before = peak[0]
        work()
        found[name] = peak[0] - before
    print(json.dumps(found))  # noqa: T201


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_merge_holds_a_tensor_a_member_and_never_the_model(tmp_path):
    import transformers as t

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 5, "num_attention_heads": 4}
    model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=259))
    model.save_pretrained(tmp_path / "parent")
    byte_tokenizer().save_pretrained(tmp_path / "parent")
    pool = begin_pool(tmp_path / "pool", tmp_path / "parent", {})
    for partition in "abcd":
        with torch.no_grad():
            model.lm_head.weight.add_(0.01)
        model.save_pretrained(tmp_path / "member")
        pool = pool.with_member(partition, tmp_path / "member", dtype="bfloat16", tokens=1, rows=1)
    whole = sum(weight.nbytes for weight in model.parameters())
    largest = max(weight.nbytes for weight in model.parameters())
    assert whole > 60e6
    held = in_a_process(f"held_by('{tmp_path}')")
    most = (4 + 4) * largest + 4e6  # four members', the parent's, their sum, what is written, one in passing
    assert held["merge"] < most < whole / 2, held
    assert held["member"] < 4 * largest + 4e6, held
    merged = t.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged.lm_head.weight, model.lm_head.weight - 0.015, rtol=0, atol=2e-4)


def test_a_pool_reads_the_names_of_its_parents_tensors_once(tmp_path):
    pool = begin_pool(tmp_path / "pool", str(save_tiny_llama(tmp_path / "parent")), {}, corpus=None, words=None)
    assert pool.start() is pool.start()
