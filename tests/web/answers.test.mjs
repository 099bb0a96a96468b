// What the server may say, and what is turned away.

import assert from "node:assert/strict";
import { test } from "node:test";

import { readAnswer } from "../../web/answers.js";
import { jsonOf, Malformed } from "../../web/fields.js";
import { readStatus } from "../../web/status.js";
import { answerJson, deviceJson, GB, response, statusJson } from "./samples.mjs";

test("a status is read with every number of its card", () => {
  const [device] = readStatus(statusJson(deviceJson())).devices;
  assert.deepEqual(device, {
    index: 0,
    name: "Simulated 16 GB",
    total: 16 * GB,
    used: 10 * GB,
    free: 6 * GB,
    reserved: 9 * GB,
    active: 8 * GB,
    ours: 8 * GB,
    others: 2 * GB,
    reclaimableFree: 10 * GB,
    pressure: 37.5,
    stale: false,
    age: 0.1,
  });
});

test("what a driver cannot tell stays unknown", () => {
  const [device] = readStatus(statusJson(deviceJson({ reserved_bytes: null, others_bytes: null }))).devices;
  assert.equal(device?.reserved, null);
  assert.equal(device?.others, null);
});

test("an entry that stands for no card is no card", () => {
  const status = readStatus(statusJson(deviceJson({ kind: "none" }), deviceJson({ total_bytes: 0 })));
  assert.equal(status.devices.length, 0);
});

test("a status without its numbers is turned away", () => {
  for (const bad of [null, [], "x", {}, { devices: {} }, statusJson(deviceJson({ used_bytes: "10" })), statusJson(deviceJson({ free_bytes: NaN }))]) {
    assert.throws(() => readStatus(bad), Malformed);
  }
});

test("a verdict and a sentence are enough for an answer", () => {
  const json = { verdict: "unknown", message: "Foo is not known." };
  const rest = { card: "this card",
    total: null,
    others: 0, phases: [], peakPhase: null, models: [], fixes: [], ram: null, assumptions: [], raw: json };
  assert.deepEqual(readAnswer(json), { ...json, ...rest });
});

test("an answer without them is turned away", () => {
  for (const bad of [null, [], { fits: true }, { verdict: "maybe", message: "x" }, { verdict: "fits" }, { verdict: "fits", message: "" }]) {
    assert.throws(() => readAnswer(bad), Malformed);
  }
});

test("a phase is read with its bounds, and a peak that points nowhere is dropped", () => {
  const answer = readAnswer(answerJson("does_not_fit"));
  assert.equal(answer.peakPhase, 0);
  assert.deepEqual(answer.phases[0]?.needed, { expected: 7 * GB, lower: 6 * GB, upper: 8 * GB });
  assert.equal(answer.phases[0]?.weights, 16 * GB);
  assert.equal(answer.phases[0]?.short, 6 * GB);
  assert.equal(readAnswer({ ...answerJson("fits"), peak_phase: 7 }).peakPhase, null);
});

test("a fix is read with its changes; one with a change that cannot be read is no fix", () => {
  const [first, ...others] = readAnswer(answerJson("does_not_fit")).fixes;
  assert.deepEqual(first, {
    id: "shorter_video",
    title: "Make the video 53 frames long instead of 81",
    changes: [{ node: "3", input: "length", value: 53 }],
    saves: GB,
    cost: "",
    picture: "shorter",
    note: "",
  });
  assert.deepEqual(others.map((fix) => fix.changes), [[{ node: "8", classType: "VAEDecodeTiled", inputs: { samples: ["3", 0] } }], []]);
  const broken = { title: "x", changes: [{ node_id: 3, input: "length", value: 53 }] };
  assert.deepEqual(readAnswer({ ...answerJson("does_not_fit"), fixes: [broken, { changes: [] }, "x"] }).fixes, []);
});

test("system memory is read with what is missing", () => {
  const ram = { verdict: "does_not_fit", message: "Short by 3 GB.", needed_bytes: 8 * GB, available_bytes: 5 * GB };
  assert.deepEqual(readAnswer({ ...answerJson("fits"), ram }).ram, { verdict: "does_not_fit", message: "Short by 3 GB.", short: 3 * GB });
  assert.equal(readAnswer({ ...answerJson("fits"), ram: { verdict: "perhaps", message: "x" } }).ram, null);
});

test("a refusal and broken JSON are both told in words", async () => {
  await assert.rejects(jsonOf(response("boom", 500)), { message: "the server answered 500" });
  await assert.rejects(jsonOf(response("{nope")), { message: "the answer is no JSON" });
});
