"""A run in the panel, on made-up events: phases, the line, the terms, recoveries."""

from panels import close_panel, event, gib, open_panel, plan, play, running, serve
from playwright.sync_api import Locator, expect
from session import BAR, Session

DRAWN = """(plot) => {
    const line = plot.querySelector(".vrh-plot-line").getAttribute("d");
    const bars = [...plot.querySelectorAll("g[data-index]")].map((bar) => {
        const [box, upper] = [bar.querySelector("rect"), bar.querySelector("[data-part=upper]")];
        const left = Number(box.getAttribute("x"));
        return { left, right: left + Number(box.getAttribute("width")), upper: Number(upper.getAttribute("y1")) };
    });
    const points = [...line.matchAll(/[ML]([\\d.]+) ([\\d.]+)/g)].map(([, x, y]) => [Number(x), Number(y)]);
    return { points, bars, limit: parseFloat(plot.querySelector(".vrh-plot-limit").style.bottom) };
}"""


def rows(panel: Locator) -> list[str]:
    return [" ".join(text.split()) for text in panel.locator(".vrh-phase-row").all_inner_texts()]


def test_before_anything_has_run_it_says_so(session: Session) -> None:
    serve(session, running())
    session.page.reload()
    expect(session.page.locator(BAR)).to_have_attribute("data-state", "ok", timeout=30_000)
    panel = open_panel(session)
    expect(panel).to_contain_text("Nothing has run yet.")
    expect(panel.locator(".vrh-chart")).to_be_hidden()
    close_panel(session)


def test_a_run_is_followed_phase_by_phase_and_stays_until_the_next(session: Session, panel: Locator) -> None:
    play(session, 0)
    expect(panel.get_by_role("heading", name="This run")).to_be_visible()
    expect(panel.locator(".vrh-sentence")).to_have_text("Predicted peak: 10.2 GB.")
    play(session, 2)
    expect(panel.locator(".vrh-phase-row").nth(1)).to_have_attribute("data-state", "running")
    expect(panel).to_contain_text("step 4 of 10")
    assert [row.rpartition(" predicted")[0] for row in rows(panel)] == [
        "1 Text encoding ×2 done",
        "2 Sampling (high noise) step 4 of 10",
        "3 Sampling (low noise) to come",
        "4 VAE decoding to come",
    ]
    play(session, 5, "done")
    expect(panel.locator(".vrh-sentence")).to_have_text("Last run: predicted 10.2 GB, measured 10.1 GB.")
    expect(panel.get_by_role("heading", name="Last run")).to_be_visible()
    close_panel(session)
    open_panel(session)
    expect(panel.locator(".vrh-sentence")).to_have_text("Last run: predicted 10.2 GB, measured 10.1 GB.")
    event(session, "plan", prompt_id="next", plan=plan())
    expect(panel.locator(".vrh-sentence")).to_have_text("Predicted peak: 10.2 GB.")


def test_a_page_that_opens_late_catches_up(session: Session) -> None:
    marks = [{"phase": index, "node_id": str(index + 1), "at": 2.0 * index} for index in range(4)]
    run = {"prompt_id": "late", "state": "running", "plan": plan(), "phase": 3, "node_id": "4", "at": 7.0, "marks": marks}
    run |= {"samples": [[1.0, gib(6.6)], [5.0, gib(10.0)], [6.9, gib(10.1)]], "measured": [], "recoveries": []}
    serve(session, running(), run)
    panel = open_panel(session)
    expect(panel.locator(".vrh-phase-row").nth(2)).to_have_attribute("data-state", "running")
    expect(panel.locator(".vrh-sentence")).to_have_text("Predicted 10.2 GB, measured at least 10.1 GB.")
    close_panel(session)


def test_pointer_and_keyboard_show_what_a_figure_is_made_of(session: Session, panel: Locator) -> None:
    play(session, 5, "done")
    expect(panel.locator(".vrh-phase-row")).to_have_count(4)
    first = panel.locator(".vrh-phase-row").nth(0).get_by_role("button")
    first.focus()
    session.page.keyboard.press("ArrowDown")
    second = panel.locator(".vrh-phase-row").nth(1)
    expect(second.get_by_role("button")).to_be_focused()
    expect(second.get_by_role("button")).to_have_attribute("aria-expanded", "true")
    terms = [" ".join(text.split()) for text in second.locator(".vrh-terms dl > div").all_inner_texts()]
    assert terms == [
        "weights of this phase 7 GB",
        "self-attention 2.1 GB",
        "hidden states 1.1 GB",
        "rotary table 53 MB",
        "together 10.2 GB",
    ]
    expect(second).to_contain_text("between 10.1 GB and 10.5 GB")
    session.page.keyboard.press("End")
    expect(panel.locator(".vrh-phase-row").nth(3)).to_contain_text("between")
    assert second.locator(".vrh-terms").is_hidden()
    panel.locator(".vrh-plot").hover(position={"x": 10, "y": 60})
    expect(panel.locator(".vrh-phase-row").nth(0).locator(".vrh-terms")).to_be_visible()
    session.page.mouse.move(700, 500)


def test_the_line_lies_within_the_band_and_the_limit_above_it(session: Session, panel: Locator) -> None:
    play(session, 5, "done")
    expect(panel.locator(".vrh-run")).to_contain_text("finished")
    drawn = panel.locator(".vrh-plot").evaluate(DRAWN)
    assert len(drawn["points"]) > 40
    assert [x for x, _ in drawn["points"]] == sorted(x for x, _ in drawn["points"])
    for x, y in drawn["points"]:
        bar = next(one for one in drawn["bars"] if one["left"] <= x <= one["right"])
        assert y >= bar["upper"] or x == bar["left"], (x, y, bar)
        assert y > 100 - drawn["limit"]


def test_recoveries_stand_in_the_run_and_in_words(session: Session, panel: Locator) -> None:
    play(session, 5, "done", prompt_id="recovered")
    told = {"prompt_id": "recovered", "node_id": "3", "attempt": 1, "freed_bytes": gib(2), "file": None}
    event(session, "recovery", kind="retry", at=5.0, same_picture=True, message="tried again after 2 GB were freed", **told)
    event(session, "recovery", kind="tiles", at=9.0, same_picture=False, message="decoded in tiles of 512 px", **told)
    expect(panel.locator(".vrh-incidents li")).to_have_text(
        [
            "Tried again at 5 s, node 3: tried again after 2 GB were freed.",
            "In tiles at 9 s, node 3: decoded in tiles of 512 px. Not quite the same picture.",
        ]
    )
    marks = panel.locator(".vrh-plot-mark")
    assert marks.evaluate_all("(all) => all.map((mark) => mark.dataset.kind)") == ["retry", "tiles"]
    lefts = marks.evaluate_all("(all) => all.map((mark) => parseFloat(mark.style.left))")
    # the first in the high noise sampling, which takes a ninth to four ninths of the width, the second in the decode
    assert 11.1 < lefts[0] < 44.5
    assert lefts[1] > 77.7


def test_a_run_that_fails_says_where(session: Session, panel: Locator) -> None:
    play(session, 3, "failed", prompt_id="failed")
    expect(panel.locator(".vrh-run")).to_contain_text("failed")
    expect(panel.locator(".vrh-phase-row").nth(2)).to_have_attribute("data-state", "failed")
