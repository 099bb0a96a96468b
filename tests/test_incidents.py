"""The log of what recovery did: bounded, by prompt, told to whoever watches, and never in the way of a recovery."""

import threading

import pytest
from vram_headroom.vram.incidents import Incident, IncidentLog

GIB = 2**30


def incident(prompt_id: str = "p", attempt: int = 1, **fields: object) -> Incident:
    told = {"node_id": "8", "kind": "retry", "freed_bytes": GIB, "same_picture": True, "message": "tried again"}
    return Incident(prompt_id=prompt_id, attempt=attempt, taken_at=2.5, **{**told, **fields})  # type: ignore[arg-type]


def test_incidents_of_a_prompt_are_kept_in_their_order_apart_from_others() -> None:
    log = IncidentLog()
    first, other, second = incident(), incident("q"), incident(attempt=2, kind="gave_up", freed_bytes=0)
    for one in (first, other, second):
        log.record(one)
    assert log.of("p") == (first, second)
    assert log.of("q") == (other,)
    assert log.of("none") == ()
    assert first.file is None


def test_the_oldest_incidents_go_when_there_are_too_many() -> None:
    log = IncidentLog(most=3)
    for attempt in range(5):
        log.record(incident(attempt=attempt))
    assert [one.attempt for one in log.of("p")] == [2, 3, 4]


@pytest.mark.parametrize("most", [0, -1])
def test_a_log_that_holds_nothing_is_refused(most: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        IncidentLog(most=most)


def test_watchers_are_told_after_it_can_be_read_and_one_that_fails_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    log = IncidentLog()
    seen: list[tuple[Incident, bool]] = []

    def fails(one: Incident) -> None:
        raise RuntimeError("the browser is gone")

    log.watch(fails)
    log.watch(lambda one: seen.append((one, one in log.of("p"))))
    log.record(incident())
    assert seen == [(incident(), True)]
    assert "the browser is gone" in caplog.text


def test_incidents_are_recorded_from_any_thread() -> None:
    log = IncidentLog(most=1000)
    threads = [threading.Thread(target=lambda: [log.record(incident()) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.of("p")) == 400
