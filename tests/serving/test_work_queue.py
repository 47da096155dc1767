"""The queue: places of answers, the order of arrival, and the time after which a place may be free."""

from threading import Thread

import pytest

from qwen_vram.serving.engine.work_queue import Handle, WorkQueue
from qwen_vram.serving.wire.problem import ApiError


def handle(places=1):
    return Handle(lambda one: None, lambda event: None, places)


def opened(places, most=2, *handles):
    queue = WorkQueue(most)
    queue.open(places)
    for one in handles:
        queue.put(one)
    return queue


def test_a_free_place_is_no_place_in_the_queue():
    queue = opened(3, 1, *(handle() for _ in range(4)))
    with pytest.raises(ApiError, match="1 requests wait already") as caught:
        queue.put(handle())
    assert caught.value.status == 429
    for _ in range(3):
        queue.take()
    assert len(queue) == 1


def test_nothing_waits_if_no_request_may_wait():
    queue = opened(1, 0, handle())
    running = queue.take()
    with pytest.raises(ApiError, match="0 requests wait already"):
        queue.put(handle())
    queue.over(running, 1.0)
    queue.put(handle())


def test_a_request_waits_until_all_of_its_answers_have_a_place():
    large, small = handle(places=5), handle()
    queue = opened(3, 5, handle(), large, small)
    first, taken = queue.take(), []
    thread = Thread(target=lambda: taken.extend((queue.take(), queue.take())))
    thread.start()
    thread.join(0.2)
    assert taken == []  # five answers take all three places, and the small request came later
    queue.over(first, 1.0)
    thread.join(0.2)
    assert taken == []
    assert (large.position, small.position) == (0, 0)
    queue.over(large, 1.0)
    thread.join(10)
    assert taken == [large, small]


def test_a_request_that_leaves_lets_the_next_one_begin():
    large, small = handle(places=3), handle()
    queue = opened(3, 5, handle(), large, small)
    queue.take()
    taken = []
    thread = Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    large.cancel()
    thread.join(10)
    assert taken == [small]


def test_places_become_free_sooner_if_more_requests_run_at_once():
    alone, together = opened(1), opened(10)
    for queue in (alone, together):
        for _ in range(100):
            queue.over(handle(places=0), 50.0)
    assert (alone.retry_after(), together.retry_after()) == (50, 5)
