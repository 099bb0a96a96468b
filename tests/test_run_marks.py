"""When the phases of a run began: exact, however seldom the browser is told."""

from vram_headroom.vram.run_record import MOST_MARKS, RunRecord, RunSeen


def seen(record: RunRecord) -> RunSeen:
    found = record.seen()
    assert found is not None
    return found


def test_a_mark_is_counted_from_the_prompts_start_and_ends_with_it() -> None:
    now = 10.0
    record = RunRecord(lambda: now)
    record.mark("1", now)
    record.start("a")
    now = 10.25
    record.mark("1", now)
    now = 11.5
    record.mark("2", now)
    assert seen(record).marks == (("1", 0.25), ("2", 1.5))
    record.end("done")
    record.mark("3", now)
    assert len(seen(record).marks) == 2
    record.start("b")
    assert seen(record).marks == ()


def test_a_loop_does_not_grow_the_marks_without_end() -> None:
    record = RunRecord(lambda: 0.0)
    record.start("a")
    for _ in range(10_000):
        record.mark("1", 0.0)
    assert len(seen(record).marks) == MOST_MARKS
