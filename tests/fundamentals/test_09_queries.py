"""Lesson 9: a query reads the items of a partition key, page by page. A live view stays up to date."""

from tests.helpers import wait_until
from tidewire.testing import Stage


async def test_a_query_returns_pages_in_the_order_of_the_sort_key(stage: Stage) -> None:
    alice = await stage.client("alice")
    await alice.put("members", {"room": "r", "user": "alice"})
    for number in range(5):
        await alice.put("messages", {"room": "r", "id": number})
    page = await alice.query("messages", "r", limit=3)
    assert [entry["item"]["id"] for entry in page["items"]] == [0, 1, 2]
    rest = await alice.query("messages", "r", after=page["next"])
    assert [entry["item"]["id"] for entry in rest["items"]] == [3, 4]


async def test_an_index_has_another_order_and_follows_within_moments(stage: Stage) -> None:
    backend = await stage.client("backend", role="service")
    for id_, price in (("a", 30), ("b", 10), ("c", 20)):
        await backend.put("offers", {"id": id_, "shop": "s", "price": price})
    reader = await stage.client("reader", claims={"shop": "s"})

    async def offers() -> list[str]:
        return [entry["item"]["id"] for entry in (await reader.query("offers", "s", index="by_price"))["items"]]

    async def in_order() -> bool:
        return await offers() == ["b", "c", "a"]

    await wait_until(in_order, "the offers are sorted by price")


async def test_a_live_view_is_a_dict_that_stays_up_to_date(stage: Stage) -> None:
    alice = await stage.client("alice")
    await alice.put("members", {"room": "r", "user": "alice"})
    views = alice.live("messages", room="r")
    assert await anext(views) == {}
    await alice.put("messages", {"room": "r", "id": "m1"})
    assert await anext(views) == {"m1": {"room": "r", "id": "m1"}}
