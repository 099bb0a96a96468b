// The command that sends text encoders off the card.

import assert from "node:assert/strict";
import { test } from "node:test";

import { offloadEncoders } from "../../web/encoders.js";
import { response, statusJson } from "./samples.mjs";

const model = (key, role, bytes_on_card) => ({ key, name: "Model", file: "f", role, dtype: "", bytes: 2 ** 30, bytes_on_card, pipeline: null });
const MODELS = [model(1, "text_encoder", 2 ** 30), model(2, "text_encoder", 0), model(3, "vae", 5), model(4, "text_encoder", 2 ** 29)];

function ports(answers, models = MODELS) {
  const asked = [];
  const post = async (action, key) => (asked.push([action, key]), answers.shift());
  return { asked, status: async () => response({ ...statusJson(), loaded_models: models }), post };
}

test("every text encoder on the card is asked to leave, and what became free is told", async () => {
  const given = ports([response({ done: true, freed_bytes: 2 ** 30 }), response({ done: true, freed_bytes: 2 ** 29 })]);
  const told = await offloadEncoders(given);
  assert.deepEqual(given.asked, [["offload", 1], ["offload", 4]]);
  assert.deepEqual([told.severity, told.summary, told.detail], ["success", "The text encoder is off the card", "1.5 GB freed."]);
});

test("one that waits for a node and one that is in use are both told", async () => {
  const waits = await offloadEncoders(ports([response({ id: "1", waiting: "node" }, 202), response({ done: true, freed_bytes: 0 })]));
  assert.equal(waits.summary, "The text encoder will leave the card");
  const used = await offloadEncoders(ports([response({ error: { type: "in_use", message: "It is in use." } }, 409), response({ done: true })]));
  assert.deepEqual([used.severity, used.detail], ["warn", "It is in use."]);
});

test("without one nothing is asked, and a server that can't be read is an error", async () => {
  const given = ports([], MODELS.slice(1, 3));
  assert.equal((await offloadEncoders(given)).summary, "No text encoder is on the card");
  assert.deepEqual(given.asked, []);
  await assert.rejects(offloadEncoders({ ...given, status: async () => response("no", 500) }));
});
