// Bands, and one warning per crossing.

import assert from "node:assert/strict";
import { test } from "node:test";

import { levelOf, Levels } from "../../web/levels.js";
import { readStatus } from "../../web/status.js";
import { deviceJson, statusJson } from "./samples.mjs";

/** @param {...number} pressures of cards 0, 1, ... */
const cards = (...pressures) => readStatus(statusJson(...pressures.map((pressure_percent, index) => deviceJson({ index, pressure_percent })))).devices;

test("green below 60, amber below 80, red from there, critical from 90", () => {
  const levels = [0, 59, 59.99, 60, 79, 79.99, 80, 89, 89.99, 90, 100].map((p) => levelOf(p));
  assert.deepEqual(levels, ["ok", "ok", "ok", "high", "high", "high", "very_high", "very_high", "very_high", "critical", "critical"]);
});

test("a card that hovers around the mark is told of once, and again after it has been 5 % lower", () => {
  const levels = new Levels();
  const told = [70, 91, 89, 90, 86, 92, 85, 91, 84.9, 90, 100].map((pressure) => levels.update(cards(pressure)).length);
  assert.deepEqual(told, [0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
});

test("each card has its own crossing, and one that was there at the first look counts", () => {
  const levels = new Levels();
  assert.deepEqual(levels.update(cards(95, 10)).map((d) => d.index), [0]);
  assert.deepEqual(levels.update(cards(95, 95)).map((d) => d.index), [1]);
  assert.deepEqual(levels.update(cards(95, 95)).map((d) => d.index), []);
});

test("the mark may be set", () => {
  const levels = new Levels();
  levels.criticalAt = 75;
  assert.equal(levels.update(cards(76)).length, 1);
  assert.equal(levels.of(/** @type {any} */ (cards(71)[0])), "critical");
});
