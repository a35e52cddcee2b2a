"""Online data mixing: which domain the next batch comes from, learnt from the losses of the batches before.

The mixer is a bandit with an arm for each of K domains. A domain's reward is the training loss of its batch, so that
domains on which the model is still bad are drawn more often. With R_i a domain's reward so far and t the step, from 1:

    e_t = min(1 / K, sqrt(ln K / (K t)))                                    the least share of any domain
    p_i = e_t + (1 - K e_t) * prior_i exp(e_{t-1} R_i) / (sum of the same)  Gibbs; or prior_i R_i in place of it: linear
    R_i <- a R_i + (1 - a) r / p_i                                          r from the loss of the domain that was drawn

e_t is 1 / K up to t = K ln K, so that the first steps are uniform whatever the prior; `warmup` steps before them follow
the prior. Published codes differ from the paper and from each other, and each difference is an option of `MixOptions`.

A loss that cannot fall (noise, names in another language) earns as much as one that can, so watch the epochs of each
domain. Nothing here needs torch.

Source: Albalak et al. 2023, Efficient Online Data Mixing, https://arxiv.org/abs/2312.02406, after EXP3 (Auer et al.
2002, https://doi.org/10.1137/S0097539701398375). The defaults are the paper's.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from whence.checksums import digest
from whence.errors import ChecksumError, CorpusError, JobError, SettingError
from whence.records import Count, MisfitError, fitting
from whence.storage import Place

LARGEST_EXPONENT = 50.0
"""A larger loss earns exp(50), about 5e21: larger powers would overflow in weighted sums."""
STATE = "online_mixing.json"
"""File in each checkpoint."""
LOG = "online_mixing.jsonl"
"""File in the run's directory, with a line for each step."""
REWARDS = ("loss", "exp", "scaled")
UPDATES = ("gibbs", "linear")


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """Choices on which implementations differ. The defaults are the paper's."""

    reward: str = "loss"
    """"loss"; "exp", its exponential; or "scaled", the loss divided by `scale`, as in the authors' code."""
    scale: float = 10.0
    weighted: bool = True
    """Divide a reward by its domain's probability, so that rare domains are not underrated."""
    smoothing: float | None = 0.9
    """a of the moving mean; None sums rewards, as EXP3 and the authors' code do."""
    update: str = "gibbs"
    """"gibbs", exponential in rewards; or "linear", proportional to them."""
    warmup: int = 0
    """Number of first steps that follow the prior, while rewards are collected."""
    prior: Mapping[str, float] | None = None
    """Weights of the domains, all above 0, with any sum; None: all alike."""

    def __post_init__(self) -> None:
        """Refuse values that no mixer can use."""
        for name, value, known in (("reward", self.reward, REWARDS), ("update", self.update, UPDATES)):
            if value not in known:
                raise SettingError(f"--mix-set {name}={value}: choose one of {', '.join(known)}")
        if self.smoothing is not None and not 0 <= self.smoothing < 1:
            raise SettingError(f"--mix-set smoothing={self.smoothing}: a share from 0 and below 1 is expected, or none")
        if not 0 < self.scale < math.inf:
            raise SettingError(f"--mix-set scale={self.scale}: a number above 0 is expected")
        if self.warmup < 0:
            raise SettingError(f"--mix-set warmup={self.warmup}: a number of steps is expected")
        for domain, weight in (self.prior or {}).items():
            if not 0 < weight < math.inf:
                raise SettingError(f"--mix-set prior.{domain}={weight}: a number above 0 is expected")


def read_options(options: Mapping[str, Any]) -> MixOptions:
    """Options by name, with values as such or as text; `prior.DOMAIN` is the prior of a domain.

    >>> read_options({"smoothing": "none", "weighted": "false", "prior.a": "0.5", "prior.b": "0.5"}).prior
    {'a': 0.5, 'b': 0.5}

    Raises:
        SettingError: There is no such option, or it cannot have this value.
    """
    names = {field.name for field in fields(MixOptions)}
    priors = {name.removeprefix("prior."): value for name, value in options.items() if name.startswith("prior.")}
    plain = {name: value for name, value in options.items() if not name.startswith("prior.")}
    if unknown := plain.keys() - names:
        raise SettingError(f"--mix-set {min(unknown)}: choose among {', '.join(sorted(names))}")
    out: dict[str, Any] = {name: _parsed(name, value) for name, value in plain.items()}
    if priors:
        out["prior"] = {domain: _number(f"prior.{domain}", text) for domain, text in priors.items()}
    return MixOptions(**out)


def _parsed(name: str, value: Any) -> Any:
    if not isinstance(value, str) or name in ("reward", "update"):
        return value
    if name == "weighted":
        if value.lower() not in ("true", "false"):
            raise SettingError(f"--mix-set weighted={value}: true or false is expected")
        return value.lower() == "true"
    if name == "smoothing" and value.lower() == "none":
        return None
    number = _number(name, value)
    return int(number) if name == "warmup" and math.isfinite(number) else number


def _number(name: str, text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        raise SettingError(f"--mix-set {name}={text}: a number is expected") from None


class OnlineMixer:
    """Probabilities over domains that follow their losses.

    Args:
        domains: Names, all different.
        options: See `MixOptions`.

    Raises:
        SettingError: There is no domain, a name is given twice, or the prior is of other domains.

    >>> mixer = OnlineMixer(["a", "b"])
    >>> mixer.probs()
    {'a': 0.5, 'b': 0.5}
    >>> mixer.update("a", 2.0)
    >>> {name: round(share, 3) for name, share in mixer.probs().items()}
    {'a': 0.508, 'b': 0.492}
    """

    def __init__(self, domains: Sequence[str], options: MixOptions | None = None):
        self.domains, self.options = list(domains), options or MixOptions()
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise SettingError(f"domains are {', '.join(self.domains) or 'none'}: different names are expected")
        prior = self.options.prior or dict.fromkeys(self.domains, 1.0)
        if prior.keys() != set(self.domains):
            raise SettingError(f"the prior is of {', '.join(prior)}; the domains are {', '.join(self.domains)}")
        weights = np.array([prior[domain] for domain in self.domains], dtype=np.float64)
        self._prior, self._rewards, self.steps = weights / weights.sum(), np.zeros(len(weights)), 0

    def probs(self) -> dict[str, float]:
        """Share of each domain in the next draw. They sum to 1."""
        return dict(zip(self.domains, self._shares().tolist(), strict=True))

    def update(self, domain: str, loss: float) -> None:
        """Reward a domain with the loss of a step's batch, which came from it.

        Args:
            domain: The domain that was drawn with the probabilities of `probs`.
            loss: Nats, mean over the batch's supervised tokens.

        Raises:
            SettingError: There is no such domain.
            JobError: The loss is not finite.
        """
        if domain not in self.domains:
            raise SettingError(f"no domain {domain!r}; they are {', '.join(self.domains)}")
        if not math.isfinite(loss):
            raise JobError(f"the loss of {domain} is {loss} at step {self.steps + 1}: try a lower --lr")
        place = self.domains.index(domain)
        reward = _reward(loss, self.options) / (self._shares()[place] if self.options.weighted else 1.0)
        a, before = self.options.smoothing, self._rewards[place]
        self._rewards[place] = before + reward if a is None else a * before + (1 - a) * reward
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The state that the next probabilities depend on, as JSON values."""
        return {"domains": self.domains, "rewards": self._rewards.tolist(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            SettingError: The state is of other domains.
        """
        if list(state["domains"]) != self.domains:
            raise SettingError(f"the state is of {', '.join(state['domains'])}; domains are {', '.join(self.domains)}")
        self._rewards, self.steps = np.array(state["rewards"], dtype=np.float64), int(state["steps"])

    def _shares(self) -> np.ndarray:
        count, t = len(self.domains), self.steps + 1
        if t <= self.options.warmup:
            return self._prior
        least = _least_share(count, t)
        if self.options.update == "gibbs":
            powers = np.log(self._prior) + _least_share(count, t - 1) * self._rewards
            gains = np.exp(powers - powers.max())  # exp of what is at most 0 cannot overflow
        else:
            gains = self._prior * self._rewards.clip(min=0)
            gains = gains if gains.any() else self._prior
        shares = least + max(0.0, 1 - count * least) * (gains / gains.sum())
        return shares / shares.sum()


def _least_share(count: int, t: int) -> float:
    """e_t: the least share of a domain at step t; at most 1 / K, as before the first step."""
    return 1 / count if t == 0 else min(1 / count, math.sqrt(math.log(count) / (count * t)))


def _reward(loss: float, options: MixOptions) -> float:
    if options.reward == "exp":
        return math.exp(min(loss, LARGEST_EXPONENT))
    return loss / options.scale if options.reward == "scaled" else loss


class OnlineBatches:
    """The rows of each training step: all of one domain, which an `OnlineMixer` draws and the step's loss then rewards.

    Within a domain rows come in a random order, none again before all have come. A draw depends only on the seed, the
    step, the rewards and the number of rows drawn so far, so that a checkpoint needs to hold little.

    Args:
        rows: Row numbers of each domain.
        directory: Directory of the log: a line a step with its domain, loss and probabilities, and epochs so far.
        options: Options of the mixer.
        seed: Seed of all draws, at least 0.
    """

    def __init__(self, rows: Mapping[str, Sequence[int]], directory: Path, options: MixOptions, *, seed: int):
        self.rows, self.seed = dict(sorted(rows.items())), seed
        self.mixer = OnlineMixer(list(self.rows), options)
        self.rows_drawn = dict.fromkeys(self.rows, 0)
        self.log, self.domain, self.losses = directory / LOG, "", 0.0
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def draw(self, step: int, count: int) -> list[int]:
        """Draw the rows of a step; steps count from 0."""
        shares = list(self.mixer.probs().values())
        number = np.random.default_rng([self.seed, zlib.crc32(b"domain"), step]).choice(len(shares), p=shares)
        self.domain = list(self.rows)[number]
        return list(self._stream(self.domain, count))

    def add(self, loss: float) -> None:
        """Add the share of the step's loss that comes from one pass."""
        self.losses += loss

    def close(self, step: int) -> None:
        """End the step: reward its domain, and write its line to the log."""
        line = {"step": step + 1, "domain": self.domain, "loss": self.losses, "probs": self.mixer.probs()}
        self.mixer.update(self.domain, self.losses)
        self.losses = 0.0
        line["epochs"] = {domain: round(count / len(self.rows[domain]), 4) for domain, count in self.rows_drawn.items()}
        with self.log.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint."""
        state = self.mixer.state_dict() | {"taken": self.rows_drawn, "log": digest([self.log.read_bytes()])}
        (checkpoint / STATE).write_text(json.dumps(state) + "\n")

    def load(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, or begin; the log loses the lines of later steps.

        Raises:
            SettingError: The checkpoint has no state, or one of other domains.
            ChecksumError: The log is damaged.
        """
        steps, logged = 0, None
        if checkpoint is not None:
            try:
                state = fitting(_StoredState, json.loads((checkpoint / STATE).read_bytes()))
                self._check_sizes(state)
            except (OSError, ValueError, RecursionError) as error:
                raise SettingError(f"{checkpoint / STATE}: not a state of --mix online ({error})") from None
            self.mixer.load_state_dict(state)
            self.rows_drawn = {domain: state["taken"][domain] for domain in self.rows}
            steps, logged = self.mixer.steps, state.get("log")
        lines = b"".join(self.log.read_bytes().splitlines(keepends=True)[:steps]) if self.log.exists() else b""
        if logged not in (None, digest([lines])):
            raise ChecksumError(
                f"{self.log}: its lines are not those that were written up to {checkpoint}. Restore it from a copy, or "
                "train into another directory."
            )
        Place.at(self.log.parent).write(self.log.name, [lines], total=len(lines))

    def _check_sizes(self, state: "_StoredState") -> None:
        if len(state["rewards"]) != len(state["domains"]) or {*state["taken"]} != {*state["domains"]}:
            raise MisfitError("its domains, rewards and rows taken are not of one length")

    def _stream(self, domain: str, count: int) -> Iterator[int]:
        rows = self.rows[domain]
        for _ in range(count):
            epoch, place = divmod(self.rows_drawn[domain], len(rows))
            if self._orders.get(domain, (-1,))[0] != epoch:
                rng = np.random.default_rng([self.seed, zlib.crc32(f"rows/{domain}".encode()), epoch])
                self._orders[domain] = epoch, rng.permutation(len(rows))
            yield rows[self._orders[domain][1][place]]
            self.rows_drawn[domain] += 1


class _StoredState(TypedDict):
    """The state in a checkpoint: the mixer's own, and the rows drawn of each domain."""

    domains: list[str]
    rewards: list[float]
    steps: Count
    taken: dict[str, Count]


def domains_of(values: Sequence[Any], ids: Sequence[str], *, by: str) -> dict[str, list[int]]:
    """Row numbers by the value of a column.

    Raises:
        CorpusError: A row has no such value, or all rows have the same one.
    """
    rows_by_domain: dict[str, list[int]] = {}
    for number, (value, name) in enumerate(zip(values, ids, strict=True)):
        if value is None or value == "":
            raise CorpusError(f"row {name} has no `{by}`, by which --mix online is to divide the corpus; see --by")
        rows_by_domain.setdefault(str(value), []).append(number)
    if len(rows_by_domain) < 2:
        only = min(rows_by_domain, default="")
        raise CorpusError(f"every row has the same `{by}`, {only!r}: there is nothing to mix")
    return rows_by_domain
