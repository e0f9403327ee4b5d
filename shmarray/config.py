"""Settings: how many workers, how much memory, where to spill, how large a chunk, which engine and scheduler.

Values come, later ones winning, from the defaults here, the environment (``SHMARRAY_WORKERS=4``), `Config.set`. A setting
inside ``with config.set(...)`` holds for that block, in that thread (and asyncio task) alone.
Never put here: what a value means; only its name, type and default.
"""

from __future__ import annotations

import contextvars
import math
import os
import pkgutil
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from scheduler import executors
from scheduler.limits import parse_bytes

__all__ = ["ENGINES", "Config", "config"]

ENGINES = ("auto", "numpy", "llvm")


def _positive(value: Any) -> int:
    number = int(value)
    if number != float(value) or number < 1:
        raise ValueError(f"got {value!r}, expected a positive whole number")
    return number


def _nbytes(value: Any) -> int:
    number = parse_bytes(value)
    if number < 1:
        raise ValueError(f"got {value!r}, expected a positive number of bytes")
    return number


def _seconds(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"got {value!r}, expected a positive number of seconds")
    return number


def _flag(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("0", "1", "false", "true", "off", "on", "no", "yes"):
        return value.lower() in ("1", "true", "on", "yes")
    if value in (False, True):
        return bool(value)
    raise ValueError(f"got {value!r}, expected True or False")


def _text(value: Any) -> str:
    return os.path.expanduser(str(os.fspath(value)))


def _scheduler(value: Any) -> str:
    known = sorted(module.name for module in pkgutil.iter_modules(executors.__path__))
    if value not in known:
        raise ValueError(f"scheduler {value!r} is not known; there are {', '.join(map(repr, known))}")
    return str(value)


def _engine(value: Any) -> str:
    if value not in ENGINES:
        raise ValueError(f"engine {value!r} is not known; there are {', '.join(map(repr, ENGINES))}")
    return str(value)


_CHECKS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "workers": _positive,
        "memory_limit": _nbytes,
        "spill_directory": _text,
        "chunk_size": _nbytes,
        "scheduler": _scheduler,
        "engine": _engine,
        "cache_directory": _text,
        "task_timeout": _seconds,
        "progress": _flag,
    }
)
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "workers": None,  # the processors this process may use
        "memory_limit": None,  # 60 % of what is available
        "spill_directory": None,  # the first temporary directory that lies on a disk
        "chunk_size": 16 * 2**20,
        "scheduler": None,  # tiny work in this process, the rest in worker processes
        "engine": "auto",  # compiled kernels where the work pays for compiling
        "cache_directory": None,  # of compiled kernels: the user's cache directory
        "task_timeout": None,
        "progress": False,
    }
)


class Config:
    """The settings, as attributes: ``sa.config.workers``. None gives a setting its default.

    =================== ===================== =====================================================================
    name                default               meaning (environment: ``SHMARRAY_`` and the name in capitals)
    =================== ===================== =====================================================================
    workers             processors            worker processes of the default pool
    memory_limit        60 % of what is there memory of the default pool, in bytes or as "8 GiB"
    spill_directory     a temporary one       where a pool puts what exceeds its memory; "off": nowhere
    chunk_size          16 MiB                of chunks made by ``chunks="auto"``
    scheduler           by size of the work   "processes", "threads" or "synchronous"
    engine              "auto"                "auto", "llvm" or "numpy": which kernels are compiled
    cache_directory     ~/.cache/shmarray     where compiled kernels are kept
    task_timeout        none                  seconds that one task may keep a worker process before that is killed
    progress            False                 whether computations show how far they are, as in `ProgressBar`
    =================== ===================== =====================================================================

    >>> import shmarray as sa
    >>> with sa.config.set(scheduler="synchronous"):
    ...     sa.config.scheduler
    'synchronous'
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        values = dict(_DEFAULTS)
        for name in _DEFAULTS:
            variable = "SHMARRAY_" + name.upper()
            text = (os.environ if environment is None else environment).get(variable)
            if text:
                values[name] = _checked(name, text, f"the environment variable {variable}")
        self._mutex = threading.Lock()  # held while _base is replaced
        self._base: dict[str, Any] = values
        self._local: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("shmarray_config", default=MappingProxyType({}))

    def get(self, name: str) -> Any:
        """Return the value of a setting. Raises KeyError for an unknown name."""
        if name not in self._base:
            raise KeyError(f"there is no setting {name!r}; settings are {', '.join(sorted(self._base))}")
        return self._local.get().get(name, self._base[name])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self.get(name)
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self.set(**{name: value})

    def set(self, **settings: Any) -> _Setting:
        """Change settings at once, for good; or, used with ``with``, until the block ends.

        Raises KeyError for an unknown name and ValueError for a bad value. Settings of the default pool (``workers``,
        ``memory_limit``, ``spill_directory``) take effect when that pool is next made.
        """
        for name in settings:
            self.get(name)
        checked = {name: _checked(name, value, f"config.set({name}=...)") for name, value in settings.items()}
        return _Setting(self, checked)

    __call__ = set

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter([(name, self.get(name)) for name in self._base])

    def __repr__(self) -> str:
        return "config(" + ", ".join(f"{name}={value!r}" for name, value in self) + ")"


class _Setting:
    """A change of settings: made when built, taken back and made locally when entered."""

    def __init__(self, owner: Config, changes: dict[str, Any]) -> None:
        self._owner = owner
        self._changes = changes
        with owner._mutex:
            self._before = {name: owner._base[name] for name in changes}
            owner._base = {**owner._base, **changes}
        self._token: contextvars.Token[Mapping[str, Any]] | None = None

    def __enter__(self) -> Config:
        owner = self._owner
        with owner._mutex:
            owner._base = {**owner._base, **self._before}
        self._token = owner._local.set(MappingProxyType({**owner._local.get(), **self._changes}))
        return owner

    def __exit__(self, *exc_info: object) -> None:
        assert self._token is not None
        self._owner._local.reset(self._token)


def _checked(name: str, value: Any, where: str) -> Any:
    if value is None:
        return _DEFAULTS[name]
    try:
        return _CHECKS[name](value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


config = Config()
