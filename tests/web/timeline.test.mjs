// Which phase is to blame, and which belong together.

import assert from "node:assert/strict";
import { test } from "node:test";

import { readAnswer } from "../../web/answers.js";
import { offender, stretches } from "../../web/timeline.js";
import { answerJson, GB } from "./samples.mjs";

const phases = (...shorts) => ({
  ...answerJson("does_not_fit"),
  phases: shorts.map((short) => ({ ...answerJson("fits").phases[0], title: short ? "Sampling" : "Text encoding", short_bytes: short * GB })),
});

test("the phase to blame is the peak if it is short, else the one that is most short, else the peak", () => {
  assert.equal(offender(readAnswer({ ...phases(0, 1, 3), peak_phase: 1 })), 1);
  assert.equal(offender(readAnswer({ ...phases(0, 1, 3), peak_phase: 0 })), 2);
  assert.equal(offender(readAnswer({ ...phases(0, 1, 3), peak_phase: null })), 2);
  assert.equal(offender(readAnswer({ ...phases(0, 0), peak_phase: 1 })), 1);
  assert.equal(offender(readAnswer({ ...phases(0, 0), peak_phase: null })), null);
});

test("phases alike that follow each other are one stretch, and keep the mark", () => {
  const found = stretches(readAnswer(phases(0, 0, 2, 2, 0)), 3);
  assert.deepEqual(found.map(({ phase, times, marked }) => [phase.title, times, marked]), [
    ["Text encoding", 2, false],
    ["Sampling", 2, true],
    ["Text encoding", 1, false],
  ]);
});
