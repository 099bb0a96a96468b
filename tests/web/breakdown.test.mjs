// What fills a card, as parts that add up.

import assert from "node:assert/strict";
import { test } from "node:test";

import { breakdownOf } from "../../web/breakdown.js";
import { inventoryOf } from "../../web/inventory.js";
import { readStatus } from "../../web/status.js";
import { deviceJson, GB, statusJson } from "./samples.mjs";

const model = (key, role, onCard, changes = {}) => ({
  key, name: "M", file: `${role}.safetensors`, role, dtype: "float16", bytes: 14 * GB, bytes_on_card: onCard * GB, registered: false,
  in_use: false, elastic: false, device_index: 0, age_seconds: 0, ...changes,
});

const parts = (changes) => {
  const status = readStatus({ ...statusJson(deviceJson()), pipelines: [], loaded_models: [], ...changes });
  return breakdownOf(status, status.devices[0]).map(({ kind, bytes, back }) => [kind, bytes / GB, back]);
};

test("parts add up to the card, whoever holds it", () => {
  const all = [
    {},
    { loaded_models: [model(1, "generator", 3, { in_use: true }), model(2, "vae", 20)] },
    { devices: [deviceJson({ ours_bytes: null, others_bytes: null, active_bytes: null })] },
    { devices: [deviceJson({ reclaimable_free_bytes: 99 * GB, others_bytes: 50 * GB })] },
  ];
  for (const changes of all) {
    const found = parts(changes);
    assert.equal(found.reduce((sum, [, bytes]) => sum + bytes, 0), 16, JSON.stringify(found));
    assert.ok(found.every(([, bytes]) => bytes > 0));
  }
});

test("weights in use stand by their role, idle ones beside them as what can be given back", () => {
  // 10 GB used: 2 are others', 4 can be given back, so 4 can't
  const found = parts({ loaded_models: [model(1, "generator", 3, { in_use: true }), model(2, "text_encoder", 3.5)] });
  assert.deepEqual(found, [
    ["generator", 3, false],
    ["work", 1, false],
    ["text_encoder", 3.5, true],
    ["cached", 0.5, true],
    ["others", 2, false],
    ["free", 6, false],
  ]);
});

test("a pinned model is not given back, and a model known twice counts once", () => {
  const component = { name: "vae", role: "vae", placement: "gpu", bytes: 3 * GB, bytes_on_card: 3 * GB, key: 2, pinned: true };
  const found = parts({
    pipelines: [{ name: "wan", state: "idle", components: [component] }],
    loaded_models: [model(2, "vae", 3, { registered: true })],
  });
  assert.deepEqual(found.slice(0, 2), [["vae", 3, false], ["work", 1, false]]);
});

test("pages of a running model that can be dropped are part of what is given back", () => {
  const found = parts({ loaded_models: [model(1, "generator", 6, { in_use: true, elastic: true })] });
  assert.deepEqual(found.slice(0, 2), [["generator", 4, false], ["generator", 2, true]]);
});

test("each card has its own models", () => {
  const status = readStatus({
    ...statusJson(deviceJson(), deviceJson({ index: 1 })),
    pipelines: [],
    loaded_models: [model(1, "generator", 3, { in_use: true }), model(2, "vae", 2, { in_use: true, device_index: 1 })],
  });
  const kinds = status.devices.map((device) => breakdownOf(status, device)[0].kind);
  assert.deepEqual(kinds, ["generator", "vae"]);
});

const component = (changes) => ({
  name: "high", role: "generator", placement: "partial", bytes: 14 * GB, bytes_on_card: 7 * GB, key: 5, pinned: false, elastic: false,
  dtype: "float8_e4m3fn", in_use: false, idle_seconds: 130, age_seconds: 0, ...changes,
});

const rowsOf = (components, pending, changes = {}) =>
  inventoryOf(readStatus({ ...statusJson(deviceJson()), loaded_models: [], pipelines: [{ name: "wan", state: "idle", components }], ...changes }), pending);

test("a row tells role, dtype, place, use, and what can be done", () => {
  const [row] = rowsOf([component({})]).groups[0].rows;
  assert.deepEqual([row.size, row.facts, row.state, row.dot], ["14 GB", "generator · float8_e4m3fn · 50 % on the card", "used 2 min ago", "idle"]);
  assert.deepEqual(row.actions.map(({ name, reason }) => [name, reason]), [["offload", ""], ["pin", ""]]);
  assert.equal(row.actions[0].spoken, "Offload high");
});

test("the share of elastic weights carries its age", () => {
  const [row] = rowsOf([component({ elastic: true, age_seconds: 4.2 })]).groups[0].rows;
  assert.equal(row.facts, "generator · float8_e4m3fn · 50 % on the card, 4 s ago");
});

test("an action that is not possible says why", () => {
  const [row] = rowsOf([component({ in_use: true })]).groups[0].rows;
  assert.equal(row.actions[0].spoken, "Offload high: it is in use");
  assert.equal(rowsOf([component({ pinned: true })]).groups[0].rows[0].actions[0].reason, "it is pinned; unpin it first");
  assert.equal(rowsOf([component({ bytes_on_card: 0 })]).groups[0].rows[0].actions[0].reason, "it is off the card already");
  assert.equal(rowsOf([component({ key: null })]).groups[0].rows[0].actions[1].reason, "ComfyUI has no handle of it");
  assert.equal(rowsOf([component({ bytes_on_card: 0 })]).free.reason, "no model is on the card");
  assert.equal(rowsOf([component({ in_use: true })]).free.reason, "every model on the card is in use or pinned");
});

test("an action that waits says for what, from the moment it was asked for", () => {
  const asked = rowsOf([component({})], [{ action: "offload", key: 5, state: "asked" }]).groups[0].rows[0].actions[0];
  assert.deepEqual([asked.reason, asked.waits], ["the server was asked just now", ""]);
  const waits = rowsOf([component({})], [{ action: "offload", key: 5, state: "node" }]).groups[0].rows[0].actions[0];
  assert.deepEqual([waits.reason, waits.waits], ["it waits already", "Offload waits until the node has ended"]);
  const listed = rowsOf([component({})], [], { waiting: [{ id: "a", action: "offload", key: 5, name: "high", waited_seconds: 3.4 }] });
  assert.equal(listed.groups[0].rows[0].actions[0].waits, "Offload waits (3 s)");
});

test("models that ComfyUI's own loaders loaded are listed by their file", () => {
  const { groups } = rowsOf([], [], { loaded_models: [model(1, "vae", 1, { file: "sub/wan_2.1_vae.safetensors" }), model(2, "vae", 1, { file: null })] });
  assert.deepEqual(groups.at(-1).rows.map((row) => row.name), ["wan_2.1_vae", "M"]);
});
