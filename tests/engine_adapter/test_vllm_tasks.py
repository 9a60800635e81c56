"""Work on behalf of requests: it ends once, and what was stopped touches nothing any more."""

import os
import threading

import numpy as np
import pytest
import torch
from holdfast.engine_adapter.vllm.caches import NULL_BLOCK, Caches, runs
from holdfast.engine_adapter.vllm.tasks import Stopped, Task, Tasks
from vllm_cases import PAGE, SPEC

from daemon_process import until


def tasks(**given):
    return Tasks("test", **{"threads": 1, "limit": 4, "seconds": 100.0, **given})


def task(request, work):
    return Task(request, work, lambda task, why: (request, why))


def taken(found, count=1):
    """What ends next, in whatever order."""
    ended = set()
    until(lambda: ended.update(found.take()) or len(ended) >= count, "tasks end")
    return ended


def test_a_task_ends_once_by_itself_or_by_being_stopped():
    found, ready, free = tasks(), threading.Event(), threading.Event()

    def work(task):
        ready.set()
        assert free.wait(20)
        with task.touching():
            return "r", "done"

    found.start(task("r", work))
    found.start(task("q", lambda task: ("q", "done")))
    assert ready.wait(20)
    found.stop("r", "stopped")
    assert not found.needs_blocks("r")
    assert found.take() == [("r", "stopped")]
    free.set()
    assert taken(found) == {("q", "done")}
    assert not found.take()
    found.close()


def test_what_needs_no_blocks_any_more_goes_on_when_they_are_taken_away():
    found, ready, free = tasks(), threading.Event(), threading.Event()

    def work(task):
        task.let_go()
        ready.set()
        assert free.wait(20)
        return "r", "done"

    found.start(task("r", work))
    assert ready.wait(20)
    assert not found.needs_blocks("r")
    found.stop("r", "stopped")
    assert not found.take()
    free.set()
    assert taken(found) == {("r", "done")}
    found.close()


def test_whoever_stops_a_task_waits_for_one_piece_only():
    found, ready, free = tasks(), threading.Event(), threading.Event()
    pieces = []

    def work(task):
        while True:  # it asks for the lock again at once
            with task.touching():
                pieces.append(len(pieces))
                ready.set()
                assert free.wait(20)

    found.start(task("r", work))
    assert ready.wait(20)
    taking = threading.Thread(target=found.stop, args=("r", "stopped"))
    taking.start()
    taking.join(0.05)
    assert taking.is_alive()
    free.set()
    taking.join(20)
    assert pieces == [0]
    assert found.take() == [("r", "stopped")]
    found.close()


def test_stopped_tasks_that_wait_are_forgotten():
    found, ready, free = tasks(limit=2), threading.Event(), threading.Event()
    found.start(task("r", lambda task: (ready.set(), free.wait(20), ("r", "done"))[-1]))
    assert ready.wait(20)
    for _ in range(5):
        found.start(task("q", lambda task: ("q", "done")))
        found.stop("q", "stopped")
    assert not found._queue
    found.start(task("q", lambda task: ("q", "done")))
    found.start(task("full", lambda task: ("full", "done")))
    assert found.take()[-1] == ("full", "2 others wait already")
    free.set()
    assert taken(found, 2) == {("r", "done"), ("q", "done")}
    found.close()


def test_a_task_beyond_its_time_is_stopped():
    found, free = tasks(seconds=1e-9), threading.Event()
    found.start(task("r", lambda task: free.wait(20) and ("r", "done")))
    assert found.take() == [("r", "not within 1e-09 s")]
    free.set()
    found.close()


def test_a_bug_ends_one_task_and_not_its_thread(caplog):
    found = tasks()
    found.start(task("r", lambda task: {}["missing"]))
    assert taken(found) == {("r", "KeyError: 'missing'")}
    found.start(task("q", lambda task: ("q", "done")))
    assert taken(found) == {("q", "done")}
    found.close()


def test_a_stopped_task_touches_nothing():
    one = task("r", lambda task: None)
    assert one.stop()
    assert not one.stop()
    with pytest.raises(Stopped), one.touching():
        raise AssertionError("it touched")


def test_several_threads_touch_at_once_and_whoever_stops_waits_for_all():
    one, inside, free = task("r", lambda task: None), threading.Barrier(3), threading.Event()

    def touch():
        with one.touching():
            inside.wait(20)
            assert free.wait(20)

    threads = [threading.Thread(target=touch) for _ in range(2)]
    stopper = threading.Thread(target=one.stop)
    for thread in threads:
        thread.start()
    inside.wait(20)  # both are in
    stopper.start()
    until(lambda: one._stopped, "it is stopped")
    assert stopper.is_alive()
    free.set()
    for thread in (*threads, stopper):
        thread.join(20)
    assert not stopper.is_alive()


def test_work_may_run_on_all_cores_whatever_the_engine_bound_itself_to():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        found = tasks()
        found.start(task("r", lambda task: ("r", os.sched_getaffinity(0))))
        ended = []
        until(lambda: ended.extend(found.take()) or ended, "it ends")
    finally:
        os.sched_setaffinity(0, allowed)
    assert ended == [("r", allowed)]
    found.close()


@pytest.mark.parametrize("blocks", [[], [0], [5], [1, 2, 3], [3, 2, 1], [0, 1, 2], [4, 0, 0, 5, 6, 9, 10, 1]])
def test_runs_join_neighbours_and_leave_null_blocks_alone(blocks):
    found = list(runs(np.array(blocks, np.int64)))
    assert [block for _, run in found for block in run] == blocks
    assert [blocks[place] for place, _ in found] == [run[0] for _, run in found]
    assert all(len(run) == 1 for _, run in found if 0 in run)
    assert len(found) == sum(1 for a, b in zip([None, *blocks], blocks, strict=False) if a in (None, 0) or b != a + 1)


@pytest.mark.parametrize("each", [1, 2, 3, 12])
@pytest.mark.parametrize("seed", range(8))
def test_pages_of_extents_go_into_whatever_blocks_the_engine_gave(each, seed):
    """Alone and in runs that begin and end inside extents; null blocks stay as they are."""
    rng = np.random.default_rng(seed)
    page_bytes, count = SPEC.page_bytes(), 12
    order = np.roll(np.arange(1, count + 1), rng.integers(count)) if seed % 2 else rng.permutation(count) + 1
    order[rng.integers(count, size=seed % 3)] = NULL_BLOCK
    tensor = torch.zeros(count + 2, 2, PAGE, 64, dtype=torch.bfloat16)
    caches = Caches(SPEC, dict.fromkeys(range(3), (0, tensor)))
    slots = rng.integers(0, 256, (count // each, 5, each, page_bytes), np.uint8)  # other layers lie in between
    caches.put(1, order.astype(np.int64), slots[:, 3])
    wanted = np.zeros((count + 2, page_bytes), np.uint8)
    kept = order != NULL_BLOCK
    wanted[order[kept]] = slots[:, 3].reshape(count, page_bytes)[kept]
    assert np.array_equal(tensor.view(torch.uint8).reshape(count + 2, -1).numpy(), wanted)
