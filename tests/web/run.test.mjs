// A run put together from events, and what is drawn of it.

import assert from "node:assert/strict";
import { test } from "node:test";

import { chartOf } from "../../web/chart.js";
import { Runs } from "../../web/run.js";
import { answerJson, GB } from "./samples.mjs";

const sizes = (expected, more = 1) => ({ expected: expected * GB, lower: (expected - 1) * GB, upper: (expected + more) * GB });
const phase = (kind, node, peak, changes = {}) => ({
  ...answerJson("fits").phases[0], kind, title: `${kind} ${node}`, node_ids: [node], peak_allocated_bytes: sizes(peak), short_bytes: 0, ...changes,
});
const plan = (...phases) => ({ ...answerJson("fits"), card: { name: "Card", total_bytes: 24 * GB, free_bytes: 24 * GB }, phases, peak_phase: 0 });
const TWO = plan(phase("sample", "3", 21), phase("vae_decode", "8", 12));

const at = (seconds, changes) => ({ prompt_id: "a", state: "running", phase: 0, node_id: "3", at: seconds, samples: [], measured: [], ...changes });
const peak = (index, node, bytes, lower = false) => ({ phase: index, node_id: node, peak_bytes: bytes * GB, exact: !lower, lower_bound: lower });

test("a run is followed from its plan to its end", () => {
  const runs = new Runs();
  runs.plan({ prompt_id: "a", plan: TWO });
  assert.equal(chartOf(runs.run).sentence, "Predicted peak: 21 GB.");
  runs.phase(at(0));
  runs.phase(at(4, { samples: [[0, 0], [2, 20 * GB]] }));
  runs.progress({ prompt_id: "a", node: "3", value: 5, max: 20 });
  let chart = chartOf(runs.run);
  assert.deepEqual(chart.rows.map((row) => row.state), ["step 5 of 20", "to come"]);
  assert.equal(chart.sentence, "Predicted 21 GB, measured at least 20 GB.");
  runs.phase(at(10, { phase: 1, node_id: "8", samples: [[9, 20.5 * GB]], measured: [peak(0, "3", 20.8)] }));
  runs.phase(at(12, { state: "done", phase: null, node_id: null, samples: [[11, 11 * GB]], measured: [peak(0, "3", 20.8), peak(1, "8", 11.5)] }));
  chart = chartOf(runs.run);
  assert.deepEqual(chart.rows.map((row) => [row.state, row.figures]), [
    ["done", "predicted 21 GB, measured 20.8 GB"],
    ["done", "predicted 12 GB, measured 11.5 GB"],
  ]);
  assert.equal(chart.sentence, "Last run: predicted 21 GB, measured 20.8 GB.");
  assert.equal(chart.caption, "finished");
});

test("the line runs through the bars in order and the bars share the width", () => {
  const runs = new Runs();
  runs.plan({ prompt_id: "a", plan: TWO });
  runs.phase(at(0));
  runs.phase(at(10, { phase: 1, node_id: "8", samples: [[0, 0], [5, 20 * GB], [9, 20 * GB]] }));
  runs.phase(at(12, { state: "done", phase: null, samples: [[11, 11 * GB]] }));
  const chart = chartOf(runs.run);
  assert.deepEqual(chart.bars.map(({ left, width }) => [left, width]), [[0, 600], [600, 400]]);
  const points = [...chart.line.matchAll(/([ML])([\d.]+) ([\d.]+)/g)].map(([, , x]) => Number(x));
  assert.deepEqual(points, [0, 300, 540, 600, 800]);
  assert.equal(chart.peak.left, 30);
  assert.equal(chart.head, null);
  // 24 GB of 25.44, which is a little above the highest thing drawn
  assert.equal(Math.round(chart.limit * 10), Math.round((1000 / 1.06)));
});

test("while it samples the line has come as far as the steps, and where none are counted to the middle", () => {
  const runs = new Runs();
  runs.plan({ prompt_id: "a", plan: TWO });
  runs.phase(at(0));
  runs.progress({ prompt_id: "a", node: "3", value: 10, max: 20 });
  runs.phase(at(5, { samples: [[5, 20 * GB]] }));
  assert.equal(chartOf(runs.run).head.left, 30);
  runs.phase(at(10, { phase: 1, node_id: "8" }));
  runs.phase(at(11, { phase: 1, node_id: "8", samples: [[11, 9 * GB]] }));
  assert.equal(chartOf(runs.run).head.left, 80);
});

test("phases alike share a bar, and the higher of them is its measure", () => {
  const runs = new Runs();
  runs.plan({ prompt_id: "a", plan: plan(phase("text_encode", "1", 6, { title: "Text" }), phase("text_encode", "2", 6, { title: "Text" })) });
  runs.phase(at(0, { node_id: "1" }));
  runs.phase(at(1, { phase: 1, node_id: "2", measured: [peak(0, "1", 5.5)] }));
  runs.phase(at(2, { state: "done", phase: null, measured: [peak(0, "1", 5.5), peak(1, "2", 5.8, true)] }));
  const chart = chartOf(runs.run);
  assert.deepEqual(chart.rows.map((row) => [row.title, row.figures]), [["1 Text ×2", "predicted 6 GB, measured at least 5.8 GB"]]);
});

test("a failed run fails in its last phase and keeps what was measured", () => {
  const runs = new Runs();
  runs.plan({ prompt_id: "a", plan: TWO });
  runs.phase(at(0));
  runs.phase(at(3, { state: "failed", samples: [[2, 22 * GB]] }));
  const chart = chartOf(runs.run);
  assert.deepEqual(chart.rows.map((row) => row.at), ["failed", "waiting"]);
  assert.equal(chart.caption, "failed");
});

test("a recovery stands where it happened and says whether the picture is the same", () => {
  const runs = new Runs();
  runs.plan({ prompt_id: "a", plan: TWO });
  runs.phase(at(0));
  runs.recovery({ prompt_id: "a", node_id: "3", kind: "retry", attempt: 1, at: 5, freed_bytes: 0, same_picture: true, file: null, message: "Tried again after 2 GB were freed." });
  runs.phase(at(10, { phase: 1, node_id: "8" }));
  runs.recovery({ prompt_id: "a", node_id: "8", kind: "tiles", attempt: 1, at: 10, freed_bytes: 0, same_picture: false, file: "x.latent", message: "Tiles of 256" });
  const [first, second] = chartOf(runs.run).incidents;
  assert.deepEqual([first.left, first.words], [30, "Tried again at 5 s, node 3: Tried again after 2 GB were freed."]);
  assert.equal(second.words, "In tiles at 10 s, node 8: Tiles of 256. Not quite the same picture. Kept in x.latent.");
});

test("the terms of a phase sum to its figure", () => {
  const runs = new Runs();
  const terms = [{ name: "small", bytes: GB }, { name: "large", bytes: 6 * GB }, { name: "none", bytes: 0 }];
  runs.plan({ prompt_id: "a", plan: plan(phase("sample", "3", 23, { resident_bytes: 14 * GB, other_models_bytes: 2 * GB, activation_terms: terms })) });
  const [row] = chartOf(runs.run).rows;
  assert.deepEqual(row.terms.map(({ name, size }) => `${name} ${size}`), [
    "weights of this phase 14 GB", "weights of other models 2 GB", "large 6 GB", "small 1 GB", "together 23 GB",
  ]);
  assert.deepEqual(row.bounds, ["between 22 GB and 24 GB", "there is room for 15 GB beside the weights"]);
});

test("a page that opens late catches up, and what it has followed itself it keeps", () => {
  const report = { prompt_id: "a", state: "done", plan: TWO, phase: null, node_id: null, at: 12, samples: [[0, GB], [11, 9 * GB]], measured: [peak(0, "3", 20)], recoveries: [],
    marks: [{ phase: 0, node_id: "3", at: 0 }, { phase: 1, node_id: "8", at: 10 }] };
  const late = new Runs();
  assert.equal(late.report(null), false);
  assert.equal(late.report(report), true);
  assert.deepEqual(chartOf(late.run).rows.map((row) => row.state), ["done", "done"]);
  assert.match(chartOf(late.run).line, /^M0 /);
  const followed = new Runs();
  followed.plan({ prompt_id: "a", plan: TWO });
  followed.phase(at(0));
  followed.phase(at(10, { phase: 1, node_id: "8", samples: [[0, GB]] }));
  assert.equal(followed.report({ ...report, at: 9, state: "running" }), false, "events know more");
  assert.equal(followed.report({ ...report, marks: [] }), true, "the tab was hidden as it ended");
  assert.deepEqual(chartOf(followed.run).rows.map((row) => row.state), ["done", "done"]);
});

test("a recovery is shown once, whichever of its event, the report and the end of the run before comes first", () => {
  const retry = (changes = {}) => ({ prompt_id: "a", node_id: "3", kind: "retry", attempt: 1, at: 5, freed_bytes: 0, same_picture: true, file: null, message: "again", ...changes });
  const report = (recoveries) => ({ prompt_id: "a", state: "running", plan: TWO, phase: 0, node_id: "3", at: 6, samples: [], measured: [], marks: [], recoveries });
  const seen = (runs) => runs.run.incidents.map((one) => [one.at, one.message]);

  const made = new Runs();
  made.phase(at(2));
  made.recovery(retry());
  assert.equal(made.report(report([])), true, "made before the recovery, and here after it");
  assert.deepEqual(seen(made), [[5, "again"]]);

  const knows = new Runs();
  knows.report(report([retry()]));
  assert.equal(knows.recovery(retry()), false, "its event comes after the report that has it");
  assert.equal(knows.recovery(retry({ at: 5.5 })), true, "another one that says the same");
  assert.deepEqual(seen(knows), [[5, "again"], [5.5, "again"]]);

  const behind = new Runs();
  behind.phase(at(20, { prompt_id: "before" }));
  behind.recovery(retry());
  behind.phase(at(21, { prompt_id: "before", state: "done" }));
  assert.deepEqual([behind.run.id, behind.run.state, behind.run.at], ["before", "done", 21]);
  behind.plan({ prompt_id: "a", plan: TWO });
  assert.deepEqual([behind.run.id, ...seen(behind)], ["a", [5, "again"]]);
});

test("a run that could not be planned is drawn alone, and nonsense is no run", () => {
  const runs = new Runs();
  runs.plan({ prompt_id: "b", plan: null });
  runs.phase({ prompt_id: "b", state: "running", phase: null, node_id: "3", at: 4, samples: [[1, GB], [2, 2 * GB], "no", [3]], measured: "no" });
  const chart = chartOf(runs.run);
  assert.deepEqual([chart.bars, chart.rows], [[], []]);
  assert.match(chart.line, /^M250 .*L500 /);
  for (const detail of [null, 5, {}, { prompt_id: 7 }]) assert.equal(runs.phase(detail), false);
});

test("ten thousand samples stay few enough to draw", () => {
  const runs = new Runs();
  for (let i = 0; i < 10_000; i++) runs.phase(at(i, { samples: [[i, i]] }));
  assert.ok(runs.run.samples.length <= 1200);
  assert.equal(runs.run.samples.at(-1)[0], 9999);
});
