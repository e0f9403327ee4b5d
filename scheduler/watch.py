"""When to lose patience: with a worker that does not get on with its task, and with a slot whose workers die as they start.

Promises: a worker is never held to have been at a task for longer than it was; a slot is not tried for ever, nor without pauses.
Relies on nothing; whoever calls brings the time. Never put here: clocks, processes, what is done about it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MOST_START_FAILURES", "MOST_START_KILLS", "STALLED_S", "Attempts", "Watch", "look_again_s"]

MOST_START_FAILURES = 3  # in a row, of one slot: exits, signals other than SIGKILL, what cannot be started at all
MOST_START_KILLS = 20  # somebody else's doing, who may stop it: an administrator, the system short of memory for a while
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
STALLED_S = 30.0  # at one task, before anyone asks whether the worker is stopped
LOOK_S = 1.0
LOOKS_PER_TIMEOUT = 4  # a task is stopped after 1 to 1.5 times what it was given
SHORTEST_LOOK_S = 0.01


@dataclass(slots=True)
class Attempts:
    """Workers of one slot that were lost before any of them began a task, in a row."""

    failures: int = 0
    kills: int = 0
    is_over: bool = False  # given up, until `try_again`

    def failed(self, *, was_killed: bool) -> None:
        """Count one. ``was_killed``: by a SIGKILL that was not ours."""
        if was_killed:
            self.kills += 1
        else:
            self.failures += 1
        self.is_over = self.failures >= MOST_START_FAILURES or self.kills >= MOST_START_KILLS

    def succeeded(self) -> None:
        """Begin anew: one did its work."""
        self.failures = self.kills = 0
        self.is_over = False

    @property
    def pause_s(self) -> float:
        """How long to wait before the next one; 0 when none was lost."""
        if not self.failures and not self.kills:
            return 0.0
        return float(min(FIRST_PAUSE_S * max(4.0 ** (self.failures - 1), 2.0 ** (self.kills - 1)), LONGEST_PAUSE_S))

    def try_again(self) -> None:
        """Give a slot that was given up one attempt more, after the pause that is due."""
        self.is_over = False


@dataclass(slots=True)
class Watch:
    """Where a worker was when it was last looked at, and since when."""

    at: tuple[int, ...] | None = None
    since_s: float = 0.0
    is_told: bool = False  # that it stalls; once per place

    def look(self, at: tuple[int, ...] | None, now_s: float) -> float:
        """Return for how many seconds it has been seen at this place, which no worker comes to twice; None: it rests."""
        if at is None or at != self.at:
            self.at, self.since_s, self.is_told = at, now_s, False
        return now_s - self.since_s


def look_again_s(timeout_s: float | None) -> float:
    """Return how soon to look again at a worker whose task may take ``timeout_s``; None: as long as it likes."""
    return LOOK_S if timeout_s is None else min(LOOK_S, max(timeout_s / LOOKS_PER_TIMEOUT, SHORTEST_LOOK_S))
