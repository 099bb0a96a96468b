// Which errors are accidents of memory, and what is told of them.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Accidents, toldOf } from "../../web/accidents.js";
import { readAnswer } from "../../web/answers.js";
import { answerJson } from "./samples.mjs";

const posted = (id = "p", verdict = "fits") => ({ id, output: {}, answer: readAnswer(answerJson(verdict)), auto: false, batch: 1 });
const failed = (changes = {}) => ({
  prompt_id: "p",
  node_id: "128:81",
  node_type: "KSamplerAdvanced",
  exception_type: "torch.OutOfMemoryError",
  exception_message: "Allocation on device 0 would exceed allowed memory.\nmore",
  ...changes,
});

test("out of memory is known by its class and by its words, on every kind of card", () => {
  for (const [exception_type, exception_message] of [
    ["torch.OutOfMemoryError", "x"],
    ["torch.cuda.OutOfMemoryError", "x"],
    ["RuntimeError", "MPS backend out of memory (MPS allocated: 17 GB)"],
    ["RuntimeError", "Allocation on device"],
  ]) {
    const accidents = new Accidents();
    accidents.note(posted());
    assert.equal(accidents.from(failed({ exception_type, exception_message }))?.node, "KSamplerAdvanced (node 128:81)");
  }
});

test("another error, another page's prompt, the same error twice and nonsense are none", () => {
  const accidents = new Accidents();
  accidents.note(posted());
  for (const detail of [failed({ exception_type: "ValueError", exception_message: "shapes" }), failed({ prompt_id: "q" }), null, "x", {}]) {
    assert.equal(accidents.from(detail), null);
  }
  assert.ok(accidents.from(failed()));
  assert.equal(accidents.from(failed()), null);
});

test("of one press of Run only the first is told of", () => {
  const accidents = new Accidents();
  for (const id of ["a", "b"]) accidents.note(posted(id));
  accidents.note({ ...posted("c"), batch: 2 });
  assert.deepEqual(["a", "b", "c"].map((prompt_id) => accidents.from(failed({ prompt_id })) !== null), [true, false, true]);
});

test("an error that comes before the answer to its post is told of when that is there", () => {
  const accidents = new Accidents();
  assert.equal(accidents.from(failed()), null);
  assert.equal(accidents.note(posted("q")), null);
  assert.equal(accidents.note(posted())?.node, "KSamplerAdvanced (node 128:81)");
});

test("a thousand prompts are not kept", () => {
  const accidents = new Accidents();
  for (let i = 0; i < 1000; i++) accidents.note(posted(String(i)));
  assert.equal(accidents.from(failed({ prompt_id: "967" })), null);
  assert.ok(accidents.from(failed({ prompt_id: "968" })));
});

test("it is told what ComfyUI reports, what had been expected, and what the check says now", () => {
  const accidents = new Accidents();
  accidents.note(posted());
  const accident = accidents.from(failed());
  assert.ok(accident);
  assert.deepEqual(toldOf(accident, readAnswer(answerJson("does_not_fit", "Short by 6 GB."))), [
    "ComfyUI reports: Allocation on device 0 would exceed allowed memory.",
    "The check had expected it to run: its estimate was too low, or less was free than it saw. Short by 6 GB.",
  ]);
});
