"""Patience, as values: how often a slot is tried, for how long a worker has been at one task."""

from __future__ import annotations

from scheduler.watch import LONGEST_PAUSE_S, MOST_START_FAILURES, MOST_START_KILLS, Attempts, Watch, look_again_s


def test_a_slot_is_tried_a_few_times_after_failures_and_often_after_kills() -> None:
    for was_killed, most in ((False, MOST_START_FAILURES), (True, MOST_START_KILLS)):
        attempts = Attempts()
        pauses = [attempts.pause_s]
        while not attempts.is_over:
            attempts.failed(was_killed=was_killed)
            pauses.append(attempts.pause_s)
        assert len(pauses) == most + 1
        assert pauses[0] == 0 and pauses == sorted(pauses) and pauses[1] > 0
        assert pauses[-1] <= LONGEST_PAUSE_S
    assert pauses[-1] == LONGEST_PAUSE_S


def test_a_slot_that_was_given_up_has_one_try_after_a_pause() -> None:
    attempts = Attempts()
    for _ in range(5):
        attempts.failed(was_killed=False)
    attempts.try_again()
    assert not attempts.is_over and attempts.pause_s > 0
    attempts.failed(was_killed=False)
    assert attempts.is_over


def test_success_is_a_new_beginning() -> None:
    attempts = Attempts(failures=2, kills=19)
    attempts.succeeded()
    assert not attempts.is_over and attempts.pause_s == 0


def test_kills_do_not_count_as_failures() -> None:
    attempts = Attempts()
    for _ in range(MOST_START_KILLS - 1):
        attempts.failed(was_killed=True)
    for _ in range(MOST_START_FAILURES - 1):
        attempts.failed(was_killed=False)
    assert not attempts.is_over


def test_time_counts_from_the_first_look_at_a_place() -> None:
    watch = Watch()
    assert watch.look((1, 0), 100.0) == 0
    assert watch.look((1, 0), 103.0) == 3
    watch.is_told = True
    assert watch.look((1, 1), 104.0) == 0 and not watch.is_told
    assert watch.look((2, 1), 106.0) == 0
    assert watch.look((2, 1), 106.5) == 0.5


def test_a_worker_that_rests_grows_no_older() -> None:
    watch = Watch()
    watch.look((1, 0), 0.0)
    assert watch.look(None, 50.0) == 0
    assert watch.look(None, 90.0) == 0
    assert watch.look((1, 0), 99.0) == 0


def test_short_timeouts_are_looked_at_more_often() -> None:
    assert look_again_s(None) == look_again_s(3600.0) == 1.0
    assert look_again_s(0.4) == 0.1
    assert look_again_s(1e-6) > 0
