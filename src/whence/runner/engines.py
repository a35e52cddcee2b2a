"""Where jobs run: this process, one job after another, or workers of Ray, here or on a cluster."""

import importlib.util
from dataclasses import dataclass

from whence.errors import MissingExtraError, SettingError

LOCAL, RAY = "local", "ray"
ENGINES = (LOCAL, RAY)


@dataclass(frozen=True)
class Engine:
    """Where jobs run, and on how many workers.

    Raises:
        SettingError: No such engine, a number that no engine can have, or one that the local engine has not.
        MissingExtraError: Ray is not installed.
    """

    name: str = LOCAL
    workers: int | None = None
    """Processes. None: one for each GPU of the machine or cluster; where there is none, one for each processor core."""
    address: str | None = None
    """Of a Ray cluster, as HOST:PORT, or "auto" for one that this machine is of. None: that of the environment variable
    RAY_ADDRESS, or workers of this machine alone, which end with this process."""
    gpus_per_worker: int | float | None = None
    """GPUs, or a share of one, that each worker has to itself. None: one where there are any."""

    def __post_init__(self):
        if self.name not in ENGINES:
            raise SettingError(f"--engine {self.name}: one of {', '.join(ENGINES)} is expected")
        if self.workers is not None and self.workers < 1:
            raise SettingError(f"--workers {self.workers}: 1 or more, or auto, is expected")
        if self.gpus_per_worker is not None and not 0 <= self.gpus_per_worker < 1024:
            raise SettingError(f"--gpus-per-worker {self.gpus_per_worker:g}: 0 or more is expected")
        if self.name == LOCAL:
            for flag, value in (
                ("--workers", None if self.workers == 1 else self.workers),
                ("--address", self.address),
                ("--gpus-per-worker", self.gpus_per_worker),
            ):
                if value is not None:
                    raise SettingError(f"{flag} {value}: --engine {LOCAL} is this process; add --engine {RAY}")
        elif importlib.util.find_spec("ray") is None:
            raise MissingExtraError("--engine ray needs a package that is not installed: pip install 'whence[ray]'")


EngineOption = Engine | str
"""An engine, or its name, which means as many workers as suit it."""


def check_engine(engine: EngineOption) -> Engine:
    """The engine of a name; refuses an unknown one before any work is done."""
    return engine if isinstance(engine, Engine) else Engine(engine)
