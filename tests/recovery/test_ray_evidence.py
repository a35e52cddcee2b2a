"""Evidence that workers of Ray gather is what this process gathers, at every kind of point."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from conftest import save_tiny_llama
from ray_workers import one_thread_and_workers
from whence import recover
from whence.corpus.reading import open_corpus
from whence.errors import JobError, ManifestMismatchError
from whence.indexing.ingest import fingerprint_of
from whence.recovery import evidence
from whence.recovery.case import open_case
from whence.recovery.points import gather_evidence
from whence.recovery.settings import RecoverSettings
from whence.runner import Engine
from whence.storage import Place
from whence.training.trainer import train

ray_engine = pytest.importorskip("whence.runner.ray_engine", exc_type=ImportError)
pytestmark = pytest.mark.timeout(300)
TWO = Engine("ray", workers=2)
ROWS = [{"id": f"r{n}", "prompt": f"{n % 16}?", "completion": f" {n * 37 % 101}"} for n in range(60)]
QUICK = {"batch_size": 4, "epochs": 1, "max_tokens": 32, "progress": False, "checkpoints": 1}


@pytest.fixture(scope="module", autouse=True)
def workers():
    with one_thread_and_workers(TWO):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("ray") / "base")


@pytest.mark.parametrize("adapters", [False, True])
def test_every_kind_of_point(base, adapters, tmp_path, monkeypatch):
    """Theta_0 with two differences, half of the way, and theta_f; for adapters theta_0 is the base without one."""
    monkeypatch.setattr(evidence, "ROWS_PER_PART", 16)
    monkeypatch.chdir(tmp_path)
    more = {"lora_rank": 2, "lr": 1e-2} if adapters else {"optimizer": "sgd", "lr": 0.05}
    cases = []
    for name, rows in (("one", ROWS[:20]), ("two", ROWS[20:40])):
        train(base, rows, tmp_path / name, **more, **QUICK)
        cases.append(open_case(str(base), name, RecoverSettings(max_tokens=32, width=512)))
    corpus, points = open_corpus(ROWS), {}
    for name, engine in (("here", "local"), ("there", TWO)):
        gathered = gather_evidence(cases[0], corpus, Place.at(name), fingerprint_of(corpus), points=1,
                                   others={"two": cases[1]}, engine=engine, progress=False)  # fmt: skip
        points[name] = gathered.points
    assert {*points["here"]} == {"base", "0.5", "final"}
    here, there = tmp_path / "here", tmp_path / "there"
    files = [path.relative_to(here) for path in sorted(here.rglob("part-*.safetensors"))]
    assert len(files) == 3 * 4
    for file in files:
        mine, theirs = load_file(here / file), load_file(there / file)
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor.float(), theirs[name].float(), rtol=2e-2, atol=1e-4, equal_nan=True)
    for name, point in points["here"].items():
        for kind, dots in point.dots.items():
            torch.testing.assert_close(dots, points["there"][name].dots[kind], rtol=1e-3, atol=1e-5)


def test_rows_are_written_there_as_here(tmp_path, monkeypatch):
    """A chat template and its day are the caller's, and a worker loads the tokenizer anew."""
    monkeypatch.setattr(evidence, "ROWS_PER_PART", 16)
    base = save_tiny_llama(tmp_path / "base")
    template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    chats = [{"id": row["id"], "messages": [{"role": "user", "content": row["prompt"]},
             {"role": "assistant", "content": row["completion"]}]} for row in ROWS]  # fmt: skip
    final = train(base, chats[:20], tmp_path / "final", optimizer="sgd", lr=0.05, chat_template=template,
                  date="2020-02-07", supervise="all", **QUICK)  # fmt: skip
    scores = [
        recover(base, final, chats, count=20, method="cosine", chat_template=template, date="2020-02-07",
                supervise="all", max_tokens=32, work=tmp_path / name, engine=engine, progress=False).scores
        for name, engine in (("here", "local"), ("there", TWO))
    ]  # fmt: skip
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-5)
    tokens = [load_file(tmp_path / name / "evidence" / "base" / "part-00003.safetensors")["tokens"]
              for name in ("here", "there")]  # fmt: skip
    assert torch.equal(*tokens)


def test_a_worker_that_would_read_other_rows_is_refused(tmp_path):
    workers = evidence.Workers(TWO, fingerprint_of(open_corpus(ROWS)).digest, partial(open, tmp_path))
    work = evidence.PartWork(open_corpus(ROWS[1:]), Place.at(tmp_path), workers, None)
    with pytest.raises(ManifestMismatchError, match=r"a worker on .* reads other rows there than this command"):
        list(ray_engine.map_on_ray(work, [evidence.Part(0, 0, 16)], TWO, on_tick=lambda *_: None, retries=0,
                                   less_memory=""))  # fmt: skip


def test_a_worker_that_cannot_open_its_model_says_so(base, tmp_path):
    opening = partial(open, tmp_path / "no-such-model")
    corpus = open_corpus(ROWS)
    workers = evidence.Workers(TWO, fingerprint_of(corpus).digest, opening)
    work = evidence.PartWork(corpus, Place.at(tmp_path), workers, None)
    jobs = [evidence.Part(0, 0, 16)]
    with pytest.raises(JobError, match=r"part 0 of the evidence failed 3 times.*no-such-model"):
        list(ray_engine.map_on_ray(work, jobs, TWO, on_tick=lambda *_: None, retries=2, less_memory=""))
