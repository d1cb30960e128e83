"""Streams well ahead of playback let those go first that are not; one listener too many is told when to come back."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from barkstream.admission import Admission, Backlog
from barkstream.pacing import NEEDY_S, Hold, Pacer, Player

LEAD_S = 4.0


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def test_a_player_starts_at_the_first_chunk_and_never_skips(clock):
    player = Player(clock)
    assert player.lead_s == -math.inf
    assert not player.take(1.0)
    clock.now_s += 0.4
    assert player.lead_s == pytest.approx(0.6)
    assert not player.take(1.0)
    assert player.lead_s == pytest.approx(1.6)


def test_a_chunk_after_playback_ran_dry_is_late_and_plays_from_then_on(clock):
    player = Player(clock)
    player.take(1.0)
    clock.now_s += 1.5
    assert player.lead_s == pytest.approx(-0.5)
    assert player.take(1.0)
    assert player.lead_s == pytest.approx(1.0)


def test_a_player_may_have_something_in_hand_before_its_first_chunk(clock):
    pacer = Pacer(LEAD_S, clock)
    with pacer.player(2.5) as going_on, pacer.player() as fresh:
        assert (going_on.lead_s, fresh.lead_s) == (2.5, -math.inf)
        assert pacer.in_hand_s == 2.5
        clock.now_s += 2
        assert not pacer.take(going_on, 1.0) and going_on.lead_s == pytest.approx(1.5)
        clock.now_s += 2
        assert pacer.take(going_on, 1.0)


def waits(pacer, player):
    """Whether `player` would have to wait: a listener who has left is let through at once, so it takes no time to ask."""
    asked = []
    pacer.wait(player, lambda: not asked.append(True))
    return bool(asked)


def test_a_stream_far_ahead_yields_to_one_without_audio(clock):
    pacer = Pacer(LEAD_S, clock)
    with pacer.player() as ahead, pacer.player() as fresh:
        pacer.take(ahead, LEAD_S + 1)
        assert waits(pacer, ahead)
        assert not waits(pacer, fresh)


def test_a_stream_far_ahead_yields_to_one_near_an_underrun(clock):
    pacer = Pacer(LEAD_S, clock)
    with pacer.player() as ahead, pacer.player() as near:
        pacer.take(ahead, 2 * LEAD_S)
        pacer.take(near, NEEDY_S + 0.2)
        assert not waits(pacer, ahead)
        clock.now_s += 0.21
        assert waits(pacer, ahead)


def test_nobody_waits_when_nobody_is_in_need(clock):
    pacer = Pacer(LEAD_S, clock)
    with pacer.player() as one, pacer.player() as other:
        for player in (one, other):
            pacer.take(player, 3 * LEAD_S)
        assert not waits(pacer, one)
        assert not waits(pacer, other)


def test_a_stream_alone_never_waits(clock):
    pacer = Pacer(LEAD_S, clock)
    with pacer.player() as player:
        pacer.take(player, 100.0)
        assert pacer.wait(player, lambda: False) == 0


def test_waiting_ends_before_the_lead_is_used_up(clock):
    pacer = Pacer(LEAD_S, clock)
    with pacer.player() as ahead, pacer.player():
        pacer.take(ahead, LEAD_S + 1)
        clock.now_s += 1.01
        assert not waits(pacer, ahead)


def test_an_infinite_lead_turns_pacing_off(clock):
    pacer = Pacer(math.inf, clock)
    with pacer.player() as ahead, pacer.player():
        pacer.take(ahead, 1e6)
        assert not waits(pacer, ahead)


@pytest.mark.parametrize("relief", ["a chunk", "the end"])
def test_who_waits_goes_on_as_soon_as_the_other_has_audio_or_is_gone(relief):
    pacer = Pacer(LEAD_S)
    waited_s = []
    with pacer.player() as ahead:
        pacer.take(ahead, 60.0)
        with pacer.player() as fresh:
            thread = threading.Thread(target=lambda: waited_s.append(pacer.wait(ahead, lambda: False)))
            thread.start()
            thread.join(0.2)
            assert thread.is_alive()
            if relief == "a chunk":
                pacer.take(fresh, LEAD_S)
        thread.join(5)
    assert 0.1 < waited_s[0] < 5


def test_a_listener_who_leaves_does_not_wait():
    pacer = Pacer(LEAD_S)
    with pacer.player() as ahead, pacer.player():
        pacer.take(ahead, 60.0)
        left = threading.Event()
        threading.Timer(0.1, left.set).start()
        start = time.monotonic()
        pacer.wait(ahead, left.is_set)
        assert time.monotonic() - start < 2


def test_room_is_taken_and_given_back():
    admission = Admission(2)
    assert [admission.enter() is None for _ in range(3)] == [True, True, False]
    admission.leave(1.0)
    assert [admission.enter() is None for _ in range(2)] == [True, False]


def test_the_refusal_says_the_limit_and_when_to_come_back():
    admission = Admission(4)
    for _ in range(4):
        admission.enter()
    assert admission.enter() == "all 4 streams of this server are busy; retry after 1 s"
    for _ in range(100):
        admission.leave(20.0)
        admission.enter()
    assert str(admission.enter()).endswith("retry after 5 s")


def test_a_server_that_owes_too_much_audio_refuses_until_it_has_caught_up(clock):
    pacer = Pacer(LEAD_S, clock)
    admission = Admission(9, backlog=Backlog(1.5 * LEAD_S, LEAD_S, lambda: pacer.in_hand_s))
    with pacer.player() as one, pacer.player():
        assert [admission.enter() for _ in range(2)] == [None, None]  # the second one: the first lacks a whole lead
        assert admission.enter() == "this server's streams lack more than 6 s of audio; retry after 1 s"
        assert admission.enter(goes_on=True) is None
        admission.leave(0.0)
        pacer.take(one, 60.0)  # counts as no more than the lead
        assert admission.enter() is None
        assert admission.enter()  # the third has no player yet, and lacks as much
        clock.now_s += 57.0  # one has 3 s left
        admission.leave(1.0)
        assert pacer.in_hand_s == 3.0
        assert admission.enter() is None
        clock.now_s += 30.0  # one has run dry, which counts as nothing in hand
        assert pacer.in_hand_s == 0.0
        admission.leave(1.0)
        assert admission.enter()


def test_a_listener_who_goes_on_is_bounded_by_the_number_of_streams_alone():
    admission = Admission(2, backlog=Backlog(0.0, LEAD_S))
    assert [admission.enter(goes_on=True) for _ in range(2)] == [None, None]
    assert admission.enter(goes_on=True) == "all 2 streams of this server are busy; retry after 1 s"


def test_a_backlog_without_bound_refuses_nobody():
    admission = Admission(9)
    assert [admission.enter() for _ in range(9)] == [None] * 9


N_AHEAD = 8  # streams that have all the audio they need


def calls_before_first_audio(lead_s: float) -> int:
    """Calls that a machine makes, one at a time in the order of their coming, until a newcomer has made the 3 for its first chunk."""
    pacer, done = Pacer(lead_s), threading.Event()
    served: list[Player] = []

    def work(player):
        time.sleep(0.005)
        served.append(player)

    def call(player):
        pacer.wait(player, done.is_set)
        machine.submit(work, player).result()

    def go_on(player):
        while not done.is_set():
            call(player)

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as machine, ThreadPoolExecutor(N_AHEAD) as pool:
        for _ in range(N_AHEAD):
            player = stack.enter_context(pacer.player())
            pacer.take(player, 60.0)
            pool.submit(go_on, player)
        while len(set(served)) < N_AHEAD:
            time.sleep(0.001)
        with pacer.player() as newcomer:
            n_before = len(served)
            for _ in range(3):
                call(newcomer)
            n_after = len(served)
            done.set()
    return n_after - n_before


def test_a_newcomer_among_streams_far_ahead_waits_for_a_round_of_theirs_at_most():
    assert calls_before_first_audio(LEAD_S) <= N_AHEAD + 3 < calls_before_first_audio(math.inf)


def test_a_crowds_first_chunks_are_held_in_proportion_and_nobody_elses():
    hold = Hold(crowd=24, until_s=0.24)
    assert [hold.left_s(n, 0.0) for n in (1, 24)] == [0.0, 0.0]
    assert [hold.left_s(n, 0.0) for n in (27, 30, 36, 60)] == pytest.approx([0.06, 0.12, 0.24, 0.24])
    assert hold.left_s(36, 0.2) == pytest.approx(0.04)  # whoever has waited so long waits no longer
    assert hold.left_s(36, 0.3) == 0.0
    assert Hold(crowd=0, until_s=0.0).left_s(5, 0.0) == 0.0
    assert [hold.is_crowd(n) for n in (0, 23, 24, 40)] == [False, False, True, True]
    assert not Hold(crowd=0, until_s=0.0).is_crowd(5)
