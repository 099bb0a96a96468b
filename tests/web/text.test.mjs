// Figures and words.

import assert from "node:assert/strict";
import { test } from "node:test";

import { levelOf } from "../../web/levels.js";
import { costWords, gigabytes, neededWords, placementWords, roleWord, shapeWords, size, sizeOrUnknown, wholePercent } from "../../web/text.js";
import { GB } from "./samples.mjs";

test("a shown percentage never contradicts its band", () => {
  for (let tenths = 0; tenths <= 1000; tenths++) assert.equal(levelOf(wholePercent(tenths / 10)), levelOf(tenths / 10));
});

test("a fix says what it does to the picture and what it costs in time", () => {
  const fix = { id: "x", title: "x", changes: [], saves: 0, note: "" };
  assert.equal(costWords({ ...fix, picture: "shorter", cost: "streams 2.6 GB per step" }), "a shorter video; streams 2.6 GB per step");
  assert.equal(costWords({ ...fix, picture: "nothing", cost: "" }), "the same picture");
  assert.equal(costWords({ ...fix, picture: "", cost: "" }), "");
});

test("a percentage stays between 0 and 100", () => {
  assert.deepEqual([-3, 0, 99.9, 100, 250].map(wholePercent), [0, 0, 99, 100, 100]);
});

test("one GB is 2**30 bytes, with one decimal at most", () => {
  assert.deepEqual([0, 5.6 * GB, 16 * GB, 15.96 * GB, 95.62 * GB].map(gigabytes), ["0", "5.6", "16", "16", "95.6"]);
  assert.equal(gigabytes(1e9), "0.9");
});

test("a size below a tenth of a GB is told in MB", () => {
  assert.deepEqual([0, 1, 50 * 2 ** 20, 0.1 * GB, 6.27 * GB].map(size), ["0 GB", "1 MB", "50 MB", "0.1 GB", "6.3 GB"]);
  assert.equal(sizeOrUnknown(null), "not known");
});

test("placements are words, a partial one with its share", () => {
  const component = { name: "high", role: /** @type {const} */ ("generator"), bytes: 14 * GB, bytesOnCard: 6 * GB };
  assert.equal(placementWords({ ...component, placement: "gpu" }), "on the card");
  assert.equal(placementWords({ ...component, placement: "cpu" }), "in RAM");
  assert.equal(placementWords({ ...component, placement: "partial" }), "42 % on the card");
  assert.equal(placementWords({ ...component, placement: "partial", bytes: 0 }), "0 % on the card");
});

test("a role that is not known is called a model, also one named like a property of every object", () => {
  assert.deepEqual(["text_encoder", "vae", "upscaler", "constructor"].map(roleWord), ["text encoder", "VAE", "model", "model"]);
});

test("a shape tells only what is known", () => {
  const phase = { title: "Sampling", needed: null, available: null, short: 0 };
  assert.equal(shapeWords({ ...phase, width: 1280, height: 720, frames: 81, batch: 1 }), "1280×720, 81 frames");
  assert.equal(shapeWords({ ...phase, width: 512, height: 512, frames: 1, batch: 4 }), "512×512, 1 frame, batch of 4");
  assert.equal(shapeWords({ ...phase, width: null, height: 720, frames: null, batch: null }), "");
});

test("bounds are shown where they say more than the expected value", () => {
  assert.equal(neededWords({ expected: 9.4 * GB, lower: 8.9 * GB, upper: 10.6 * GB }), "9.4 GB (8.9 to 10.6)");
  assert.equal(neededWords({ expected: 9.4 * GB, lower: 9.4 * GB, upper: 9.4 * GB }), "9.4 GB");
  assert.equal(neededWords(null), "not known");
});
