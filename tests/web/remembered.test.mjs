// Graphs not to be asked about.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Remembered } from "../../web/remembered.js";

function store(first = /** @type {string | null} */ (null)) {
  let kept = first;
  return { getItem: () => kept, setItem: (/** @type {string} */ _, /** @type {string} */ value) => void (kept = value) };
}

test("a graph is remembered, and forgotten when it is to be asked about again", () => {
  const shared = store();
  new Remembered(shared).set("a", true);
  assert.deepEqual([new Remembered(shared).has("a"), new Remembered(shared).has("b")], [true, false]);
  new Remembered(shared).set("a", false);
  assert.equal(new Remembered(shared).has("a"), false);
});

test("of very many the oldest are asked about again", () => {
  const remembered = new Remembered(store());
  for (let i = 0; i < 300; i++) remembered.set(String(i), true);
  assert.deepEqual([remembered.has("99"), remembered.has("100"), remembered.has("299")], [false, true, true]);
});

test("a store that is full, closed or holds something else only means to ask", () => {
  const full = { getItem: () => null, setItem: () => { throw new Error("quota"); } };
  new Remembered(full).set("a", true);
  const closed = { getItem: () => { throw new Error("denied"); }, setItem: () => {} };
  assert.equal(new Remembered(closed).has("a"), false);
  for (const other of ["{", "{}", "3", '[{"a":1}]']) assert.equal(new Remembered(store(other)).has("a"), false);
});
