"""Of those that wait for a stage, the listener who would run dry first goes next; one too many is told when to come back."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from barkstream.admission import Admission
from barkstream.pacing import Cancelled, Player, Turns


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def stays():
    """A listener who does not leave."""
    return False


def test_a_player_starts_at_the_first_chunk_and_never_skips(clock):
    player = Player(clock)
    clock.now_s += 0.4
    assert player.is_silent and player.age_s == pytest.approx(0.4)
    assert not player.take(1.0)
    assert not player.is_silent
    clock.now_s += 0.4
    assert not player.take(1.0)
    assert player.deadline == (True, pytest.approx(102.4))


def test_a_chunk_after_playback_ran_dry_is_late_and_plays_from_then_on(clock):
    player = Player(clock)
    player.take(1.0)
    clock.now_s += 1.5
    assert player.take(1.0)
    assert player.deadline == (True, 102.5)


def test_no_audio_yet_comes_first_then_the_nearest_underrun(clock):
    old, ahead, near = Player(clock), Player(clock), Player(clock)
    clock.now_s += 1
    new = Player(clock)
    ahead.take(9.0)
    near.take(2.0)
    assert sorted([ahead, new, near, old], key=lambda player: player.deadline) == [old, new, near, ahead]


def order_of_turns(players: list[Player]) -> list[Player]:
    """Who is served when all wait for a stage that makes one call at a time; they come in the order of the list."""
    turns, served = Turns(1), []

    def call(player):
        with turns.turn(player, stays):
            served.append(player)

    with ThreadPoolExecutor(len(players)) as pool:
        with turns.turn(Player(), stays):
            for n_waiting, player in enumerate(players, 1):
                pool.submit(call, player)
                wait_until(lambda n=n_waiting: len(turns._waiting) == n)
        pool.shutdown(wait=True)
    return served


def wait_until(condition):
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


def test_turns_go_by_deadline_not_by_the_order_of_coming(clock):
    ahead, near, fresh = Player(clock), Player(clock), Player(clock)
    ahead.take(9.0)
    near.take(2.0)
    assert order_of_turns([ahead, near, fresh]) == [fresh, near, ahead]


def test_equal_deadlines_are_served_in_the_order_of_coming(clock):
    players = [Player(clock) for _ in range(5)]
    assert order_of_turns(players) == players


def test_nobody_waits_while_there_is_room():
    turns, ahead = Turns(2), Player()
    ahead.take(60.0)
    with turns.turn(Player(), stays), turns.turn(ahead, stays) as waited_s:
        assert waited_s == 0


def test_a_call_that_fails_gives_its_room_back():
    turns = Turns(1)
    with pytest.raises(ZeroDivisionError), turns.turn(Player(), stays):
        1 / 0  # noqa: B018
    with turns.turn(Player(), stays) as waited_s:
        assert waited_s == 0


def test_a_listener_who_has_left_gets_no_turn():
    turns = Turns(1)
    with pytest.raises(Cancelled), turns.turn(Player(), lambda: True):
        raise AssertionError("the call was made")
    with turns.turn(Player(), stays):
        pass


def test_a_listener_who_leaves_while_waiting_holds_nobody_up():
    turns, left = Turns(1), threading.Event()

    def wait(player):
        with turns.turn(player, left.is_set):
            raise AssertionError("the call was made")

    with ThreadPoolExecutor(1) as pool, turns.turn(Player(), stays):
        waiting = pool.submit(wait, Player())
        wait_until(lambda: turns._waiting)
        left.set()
        assert isinstance(waiting.exception(timeout=1), Cancelled)
        assert not turns._waiting


N_AHEAD = 8  # streams that have all the audio they need


def calls_before_first_audio(n_at_once: int) -> int:
    """Calls that a machine makes, one at a time in the order of their coming, until a newcomer has made the 3 for its first chunk."""
    turns, done = Turns(n_at_once), threading.Event()
    served: list[Player] = []

    def work(player):
        time.sleep(0.005)
        served.append(player)

    def call(player):
        with contextlib.suppress(Cancelled), turns.turn(player, done.is_set):
            machine.submit(work, player).result()

    def go_on(player):
        while not done.is_set():
            call(player)

    with ThreadPoolExecutor(1) as machine, ThreadPoolExecutor(N_AHEAD) as pool:
        for _ in range(N_AHEAD):
            player = Player()
            player.take(60.0)
            pool.submit(go_on, player)
        wait_until(lambda: len(set(served)) == N_AHEAD or len(served) > 2 * N_AHEAD)
        n_before, newcomer = len(served), Player()
        for _ in range(3):
            call(newcomer)
        n_after = len(served)
        done.set()
    return n_after - n_before


def test_a_newcomer_among_streams_far_ahead_waits_for_a_few_calls_not_for_all_of_theirs():
    assert calls_before_first_audio(n_at_once=1) <= 8 < calls_before_first_audio(n_at_once=N_AHEAD + 1)


def test_room_is_taken_and_given_back():
    admission = Admission(2)
    assert [admission.enter() for _ in range(3)] == [True, True, False]
    admission.leave(1.0)
    assert [admission.enter() for _ in range(2)] == [True, False]


def test_the_refusal_says_the_limit_and_when_to_come_back():
    admission = Admission(4)
    assert admission.refusal() == "all 4 streams of this server are busy; retry after 1 s"
    for _ in range(100):
        admission.enter()
        admission.leave(20.0)
    assert admission.refusal().endswith("retry after 5 s")
