"""Who asks waits in line: places are told, anybody may leave, one failure is nobody else's."""

import logging
import queue
import threading

import pytest

from whence import runner
from whence.errors import SettingError
from whence.explorer.waiting_line import FAILED, Line, LineFullError

PATIENCE = 20


@pytest.fixture
def line():
    line = Line(most=3)
    yield line
    line.close()


def events(told):
    """All events of a request, which has to end."""
    out = []
    while (event := told.get(timeout=PATIENCE)) is not None:
        out.append(event)
    return out


def held(line):
    """Keep the line busy; the event lets it go on."""
    told, started, gate = queue.Queue(), threading.Event(), threading.Event()

    def work(request):
        started.set()
        assert gate.wait(PATIENCE)
        request.tell("done")

    request = line.enter(work, told.put)
    assert started.wait(PATIENCE)
    return request, told, gate


def held_midway(line, order):
    """A long request that waits for the event, then tells how far it is; `order` is told when it ends there."""
    told, started, gate = queue.Queue(), threading.Event(), threading.Event()

    def long(request):
        started.set()
        assert gate.wait(PATIENCE)
        try:
            request.progress(1, 2, "going")
        finally:
            order.append("long is left")

    request = line.enter(long, told.put, is_long=True)
    assert started.wait(PATIENCE)
    return request, told, gate


def test_requests_run_in_their_order_and_see_their_places(line):
    _, first, gate = held(line)
    order, tolds = [], [queue.Queue(), queue.Queue()]
    for number, told in enumerate(tolds):
        line.enter(lambda request, number=number: order.append(number), told.put)
    gate.set()
    assert [event["type"] for event in events(first)] == ["queue", "done"]
    assert [event["position"] for event in events(tolds[0])] == [1, 0]
    assert [event["position"] for event in events(tolds[1])] == [2, 1, 0]
    assert order == [0, 1]


def test_one_that_leaves_is_skipped_and_others_move_up(line):
    _, _, gate = held(line)
    ran, leaving, staying = [], queue.Queue(), queue.Queue()
    gone = line.enter(lambda request: ran.append("gone"), leaving.put)
    line.enter(lambda request: ran.append("stayed"), staying.put)
    line.leave(gone)
    assert staying.get(timeout=PATIENCE)["position"] == 2
    assert staying.get(timeout=PATIENCE)["position"] == 1
    gate.set()
    events(staying)
    assert ran == ["stayed"]


def test_what_runs_stops_at_its_next_event(line):
    request, told, gate = held(line)
    line.leave(request)
    gate.set()
    assert "done" not in [event["type"] for event in events(told)]


def test_an_error_is_told_and_the_next_is_served(line, caplog):
    def refuse(request):
        raise SettingError("no such thing")

    def fail(request):
        raise ZeroDivisionError("secret")

    for work, message in ((refuse, "no such thing"), (fail, FAILED)):
        told = queue.Queue()
        with caplog.at_level(logging.CRITICAL):
            line.enter(work, told.put)
            assert events(told)[-1] == {"type": "error", "error": message}


def test_a_full_line_refuses(line):
    _, _, gate = held(line)
    tolds = [queue.Queue() for _ in range(3)]
    for told in tolds:
        line.enter(lambda request: None, told.put)
    with pytest.raises(LineFullError, match="3 questions wait already"):
        line.enter(lambda request: None, queue.Queue().put)
    gate.set()
    for told in tolds:
        events(told)


def test_one_that_gives_way_begins_anew_after_another(line):
    told, other, started, order = queue.Queue(), queue.Queue(), threading.Event(), []

    def slow(request):
        order.append("begun")
        started.set()
        for number in range(10_000):
            if order.count("begun") > 1:
                break
            request.progress(number, 10_000, "waiting")
            gate.wait(0.01)
        order.append("done")
        request.tell("level")

    gate = threading.Event()
    line.enter(slow, told.put, gives_way=True)
    assert started.wait(PATIENCE)
    line.enter(lambda request: order.append("other"), other.put)
    events(other)
    assert events(told)[-1] == {"type": "level"}, "what it tells goes on"
    assert order == ["begun", "other", "begun", "done"]


def test_those_that_give_way_wait_behind_the_others(line):
    _, _, gate = held(line)
    order, tolds = [], [queue.Queue() for _ in range(3)]
    for name, told in zip(("low", "first", "second"), tolds, strict=True):
        line.enter(lambda request, name=name: order.append(name), told.put, gives_way=name == "low")
    gate.set()
    for told in tolds:
        events(told)
    assert order == ["first", "second", "low"]


def test_a_long_one_lets_short_ones_through_and_goes_on(line):
    """Others that are long, or give way, wait for its end; what one that failed tells is its own."""
    tolds = {name: queue.Queue() for name in ("long", "second", "low", "short", "fails")}
    order, started, gate = [], threading.Event(), threading.Event()

    def long(request):
        started.set()
        assert gate.wait(PATIENCE)
        request.progress(1, 2, "going")
        order.append("long")

    def fails(request):
        order.append("fails")
        raise SettingError("not this one")

    line.enter(long, tolds["long"].put, is_long=True)
    assert started.wait(PATIENCE)
    line.most = 4
    line.enter(lambda request: order.append("second"), tolds["second"].put, is_long=True)
    line.enter(lambda request: order.append("low"), tolds["low"].put, gives_way=True)
    line.enter(lambda request: order.append("short"), tolds["short"].put)
    line.enter(fails, tolds["fails"].put)
    gate.set()
    told = {name: events(each) for name, each in tolds.items()}
    assert order == ["short", "fails", "long", "second", "low"]
    assert [event["position"] for event in told["short"]] == [2, 0], "before the one that gives way"
    assert told["fails"][-1] == {"type": "error", "error": "not this one"}
    assert [event["type"] for event in told["long"]] == ["queue", "progress"]


def test_a_long_one_that_nobody_waits_for_stops_before_others_are_served_in_its_midst(line):
    other, order = queue.Queue(), []
    request, told, gate = held_midway(line, order)
    line.enter(lambda request: order.append("other"), other.put)
    line.leave(request)
    gate.set()
    events(told), events(other)
    assert order == ["long is left", "other"]


def test_one_that_leaves_while_another_is_served_in_its_midst_stops_after_it(line):
    """Others that wait are served when it is left, not one after another in its midst."""
    tolds, order = [queue.Queue(), queue.Queue()], []
    request, told, gate = held_midway(line, order)
    line.enter(lambda own: (order.append("first"), line.leave(request)), tolds[0].put)
    line.enter(lambda own: order.append("second"), tolds[1].put)
    gate.set()
    for each in (told, *tolds):
        events(each)
    assert order == ["first", "long is left", "second"]


def test_what_comes_while_others_are_served_waits_for_the_next_time(line):
    """So that a steady flow of questions does not hold the long one up."""
    told, late, started, gate, order = queue.Queue(), queue.Queue(), threading.Event(), threading.Event(), []

    def long(request):
        started.set()
        assert gate.wait(PATIENCE)
        for number in range(2):
            request.progress(number, 2, "going")
            order.append(number)

    line.enter(long, told.put, is_long=True)
    assert started.wait(PATIENCE)

    def asks_again(request):
        order.append("first")
        line.enter(lambda own: order.append("late"), late.put)

    line.enter(asks_again, queue.Queue().put)
    gate.set()
    events(told), events(late)
    assert order == ["first", 0, "late", 1]


def test_a_closed_line_stops_what_runs_in_the_midst_of_another(line):
    told, started, gate, inside = queue.Queue(), threading.Event(), threading.Event(), threading.Event()
    said = []

    def long(request):
        started.set()
        assert gate.wait(PATIENCE)
        request.progress(1, 2, "going")

    def talks(request):
        inside.set()
        for number in range(10_000):
            request.tell("token", number=number)
            said.append(number)
            threading.Event().wait(0.005)

    line.enter(long, told.put, is_long=True)
    assert started.wait(PATIENCE)
    line.enter(talks, told.put)
    gate.set()
    assert inside.wait(PATIENCE)
    line.close()
    assert len(said) < 1_000


def test_what_is_counted_in_its_midst_is_not_told_as_its_own(line):
    told, other, started, gate = queue.Queue(), queue.Queue(), threading.Event(), threading.Event()

    def long(request):
        started.set()
        assert gate.wait(PATIENCE)
        with runner.shown_as(request.progress, "All of it"):
            request.progress(1, 2, "going")

    def counts(request):
        for _ in runner.counted(range(3), "Other things", 3, lambda item: 1):
            request.tell("step")

    line.enter(long, told.put, is_long=True)
    assert started.wait(PATIENCE)
    line.enter(counts, other.put)
    gate.set()
    assert {event.get("what") for event in events(told) if event["type"] == "progress"} == {"going"}
    assert [event["type"] for event in events(other)] == ["queue", "queue", "step", "step", "step"]
