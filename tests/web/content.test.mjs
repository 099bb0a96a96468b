// What counts as the same graph.

import assert from "node:assert/strict";
import { test } from "node:test";

import { contentKey, graphKey } from "../../web/content.js";

const graph = (inputs = {}, title = "A") => ({
  3: { class_type: "KSampler", inputs: { seed: 1, noise_seed: 2, steps: 20, model: ["4", 0], ...inputs }, _meta: { title } },
});

test("seeds and titles do not change the key", () => {
  const key = contentKey(graph());
  assert.match(key, /^[0-9a-f]{16}$/);
  assert.equal(contentKey(graph({ seed: 99, noise_seed: 0.5 })), key);
  assert.equal(contentKey(graph({}, "B")), key);
});

test("everything else does: a step, a link, a seed that is linked, a name that merely contains seed", () => {
  const keys = [
    contentKey(graph()),
    contentKey(graph({ steps: 21 })),
    contentKey(graph({ model: ["5", 0] })),
    contentKey(graph({ seed: ["7", 0] })),
    contentKey(graph({ seedling: 1 })),
    contentKey(graph({ seedling: 2 })),
    contentKey(graph(), ["3"]),
    contentKey(graph(), ["4"]),
  ];
  assert.equal(new Set(keys).size, keys.length);
});

test("ten thousand sizes have ten thousand keys", () => {
  const keys = new Set();
  for (let width = 0; width < 10000; width++) keys.add(contentKey(graph({ width })));
  assert.equal(keys.size, 10000);
});

test("the order of nodes and inputs does not change the key", () => {
  const one = { 1: { class_type: "A", inputs: { a: 1, b: ["2", 0] } }, 2: { class_type: "B", inputs: {} } };
  const other = { 2: { inputs: {}, class_type: "B" }, 1: { inputs: { b: ["2", 0], a: 1 }, class_type: "A" } };
  assert.equal(contentKey(one), contentKey(other));
});

test("a graph stays the same while its prompt is reworded, and not when a size or a file changes", () => {
  const said = (text, width = 832, unet_name = "a.safetensors") => ({ 6: { class_type: "CLIPTextEncode", inputs: { text, width, unet_name } } });
  assert.equal(graphKey(said("a cat")), graphKey(said("a dog")));
  assert.notEqual(contentKey(said("a cat")), contentKey(said("a dog")));
  assert.notEqual(graphKey(said("a cat")), graphKey(said("a cat", 640)));
  assert.notEqual(graphKey(said("a cat")), graphKey(said("a cat", 832, "b.safetensors")));
});
