"""A registry that was away makes no process dead, and dead processes are detected."""

from __future__ import annotations

import heapq

from hypothesis import given
from hypothesis import strategies as st

from tidewire.process.liveness import Liveness

LEASE_S = 3.0
BEAT_S = LEASE_S / 3


class TestLiveness:
    def watch(
        self,
        *beats: tuple[float, dict[str, bool]],
    ) -> tuple[list[set[str]], list[set[str]]]:
        """(live, dead) at each of some beats: when each began, and whose word had expired then."""
        liveness = Liveness(LEASE_S)
        verdicts = [liveness.judge(at, at + 0.01, expired) for at, expired in beats]
        return [set(one.live) for one in verdicts], [set(one.dead) for one in verdicts]

    def test_a_death_is_confirmed_by_a_second_look(self) -> None:
        before = [(float(at), {"a": False}) for at in range(5)]
        live, dead = self.watch(*before, (5, {"a": True}), (6, {"a": True}))
        assert live == [{"a"}] * 5 + [set(), set()], "who is suspected takes no part"
        assert dead == [set()] * 6 + [{"a"}]

    def test_a_second_look_may_clear_the_suspect(self) -> None:
        before = [(float(at), {"a": False}) for at in range(5)]
        live, dead = self.watch(*before, (5, {"a": True}), (6, {"a": False}), (7, {"a": True}))
        assert dead == [set()] * 8
        assert live[6] == {"a"}

    def test_after_a_gap_in_contact_each_process_has_a_lease_to_come_back(self) -> None:
        before = [(float(at), {"a": False}) for at in range(5)]
        live, dead = self.watch(*before, *((float(at), {"a": True}) for at in range(12, 18)))
        assert live[5:] == [{"a"}] * 3 + [set()] * 3
        assert dead[5:] == [set()] * 4 + [{"a"}] * 2

    def test_a_beat_that_took_long_is_a_gap(self) -> None:
        liveness = Liveness(LEASE_S)
        for at in range(5):
            liveness.judge(at, at + 0.01, {"a": False})
        verdict = liveness.judge(5, 5 + LEASE_S, {"a": True})
        assert verdict.interrupted
        assert verdict.live == {"a"}

    def test_a_newcomer_does_not_count_on_words_that_it_never_saw_valid(self) -> None:
        live, dead = self.watch((0, {"a": True, "b": False}), (1, {"a": True, "b": False}))
        assert live == [{"b"}, {"b"}]
        assert dead == [set(), set()], "and yet it holds nobody for dead so early"

    def test_the_dead_do_not_come_back_in_a_later_gap(self) -> None:
        live, _ = self.watch(*((float(at), {"a": at > 2}) for at in range(8)), (20, {"a": True}))
        assert live[-1] == set()


@given(
    stalls=st.lists(st.tuples(st.floats(0.5, 30), st.floats(0.1, 20)), max_size=4),
    phases=st.lists(st.floats(0, BEAT_S), min_size=2, max_size=4),
    latency_s=st.floats(0.001, 0.2),
)
def test_while_redis_stalls_the_living_are_never_dead_and_a_dead_one_is_found(
    stalls: list[tuple[float, float]], phases: list[float], latency_s: float
) -> None:
    """Every service beats; Redis answers at once, or after the stall. One more has died at the start."""
    windows, at = [], 2 * LEASE_S  # all have seen each other by then
    for after_s, length_s in stalls:
        windows.append((at + after_s, at + after_s + length_s))
        at = windows[-1][1]
    quiet_from, end = at, at + 4 * LEASE_S

    def served(asked_s: float) -> float:
        return next((stop for start, stop in windows if start <= asked_s < stop), asked_s)

    words = {"ghost": LEASE_S}
    observers = {f"s{number}": Liveness(LEASE_S) for number in range(len(phases))}
    # Commands reach the server in the order of their times, and the words are looked at then.
    calls = [(served(phase), phase, name) for phase, name in zip(phases, observers, strict=True)]
    heapq.heapify(calls)
    found: dict[str, float] = {}
    while calls:
        now, begun, name = heapq.heappop(calls)
        if now > end:
            break
        words[name] = now + LEASE_S
        answered = now + latency_s
        verdict = observers[name].judge(begun, answered, {one: expiry <= now for one, expiry in words.items()})
        assert verdict.dead <= {"ghost"}
        registered = words.keys() - {"ghost"}
        assert registered <= verdict.live, "nobody rebalances because of a stall"
        if "ghost" in verdict.dead:
            found.setdefault(name, answered)
        following = answered + BEAT_S
        heapq.heappush(calls, (served(following), following, name))
    limit = quiet_from + LEASE_S + 3 * (BEAT_S + latency_s) + LEASE_S
    assert all(found.get(name, end) <= limit for name in observers)
