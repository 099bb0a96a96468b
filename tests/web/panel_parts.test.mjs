// The heartbeat, the pace of drawing, actions that wait, and the sentences.

import assert from "node:assert/strict";
import { readFile, readdir } from "node:fs/promises";
import { mock, test } from "node:test";

import { Actions } from "../../web/actions.js";
import { Pace } from "../../web/pace.js";
import { readStatus } from "../../web/status.js";
import { STRINGS, t, translate } from "../../web/strings.js";
import { BEAT_MS, Watch } from "../../web/watch.js";
import { files, FOLDER, written } from "./locale.mjs";
import { deviceJson, response, statusJson } from "./samples.mjs";

const settled = () => new Promise((resolve) => setImmediate(resolve));

test("the heart beats while somebody looks at a tab in sight, and the server is told when it ends", async () => {
  mock.timers.enable({ apis: ["setInterval"] });
  try {
    const told = [];
    const seen = [];
    const watch = new Watch(async (watching) => (told.push(watching), response({ status: 1, run: null })), (status) => seen.push(status));
    watch.want("panel", true);
    await settled();
    mock.timers.tick(2 * BEAT_MS);
    await settled();
    assert.deepEqual([told, seen], [[true, true, true], [1, 1, 1]]);
    watch.setHidden(true);
    await settled();
    mock.timers.tick(5 * BEAT_MS);
    assert.deepEqual(told.slice(3), [false]);
    watch.setHidden(false);
    watch.want("badges", true);
    watch.want("panel", false);
    await settled();
    assert.equal(told.at(-1), true, "the badges still look");
    watch.want("badges", false);
    await settled();
    assert.equal(told.at(-1), false);
    const before = told.length;
    mock.timers.tick(5 * BEAT_MS);
    assert.equal(told.length, before);
  } finally {
    mock.timers.reset();
  }
});

test("a server that knows no watchers is asked on, and nothing is thrown", async () => {
  const watch = new Watch(async () => response("no", 404), () => assert.fail());
  watch.want("panel", true);
  await settled();
  watch.want("panel", false);
  assert.equal(watch.isOn, false);
});

test("a hundred changes a second are drawn twice, the last of them too, and none while hidden", () => {
  mock.timers.enable({ apis: ["setTimeout", "Date"] });
  try {
    let drawn = 0;
    const pace = new Pace(() => (drawn += 1));
    for (let i = 0; i < 1000; i++) {
      pace.request();
      mock.timers.tick(10);
    }
    assert.equal(drawn, 1 + 20, "the first at once");
    pace.request();
    mock.timers.tick(500);
    assert.equal(drawn, 22, "and the last of them");
    mock.timers.tick(5000);
    assert.equal(drawn, 22);
    pace.setHidden(true);
    for (let i = 0; i < 100; i++) pace.request();
    mock.timers.tick(5000);
    assert.equal(drawn, 22);
    pace.setHidden(false);
    assert.equal(drawn, 23);
  } finally {
    mock.timers.reset();
  }
});

const statusWith = (...waiting) => readStatus({ ...statusJson(deviceJson()), waiting });

function actions(answers, outcome) {
  const told = [];
  const ports = { post: async () => answers.shift(), outcome: async () => response(outcome), tell: (words, failed) => told.push([words, failed]), changed: () => {} };
  return { asked: new Actions(ports), told };
}

test("an action that is done at once says what it freed", async () => {
  const { asked, told } = actions([response({ done: true, freed_bytes: 3 * 2 ** 30 })]);
  await asked.ask("offload", 5, "umt5");
  assert.deepEqual(told, [["umt5 is off the card: 3 GB freed.", false]]);
  assert.deepEqual(asked.pending, []);
});

test("an action that is refused says why", async () => {
  const { asked, told } = actions([response({ error: { type: "in_use", message: "umt5 is in use by node 3" } }, 409), response("no", 500)]);
  await asked.ask("offload", 5, "umt5");
  await asked.ask("pin", 5, "umt5");
  assert.deepEqual(told, [
    ["Offload umt5 did not work: umt5 is in use by node 3", true],
    ["Pin umt5 did not work: the server answered 500", true],
  ]);
});

test("an action that waits is followed to its end, which is told once", async () => {
  const { asked, told } = actions([response({ id: "a", waiting: "node" }, 202)], { id: "a", state: "done", freed_bytes: 2 ** 30, message: "" });
  await asked.ask("offload", 5, "umt5");
  assert.equal(asked.pending[0].state, "node");
  asked.follow(statusWith({ id: "a", action: "offload", key: 5, name: "umt5", waited_seconds: 1 }));
  await settled();
  assert.equal(told.length, 0);
  for (let i = 0; i < 3; i++) asked.follow(statusWith());
  for (let i = 0; i < 5; i++) await settled();
  assert.deepEqual(told, [["umt5 is off the card: 1 GB freed.", false]]);
});

test("every sentence is used, and a translation takes its place", async () => {
  const folder = new URL("../../web/", import.meta.url);
  const files = (await readdir(folder)).filter((name) => name.endsWith(".js") && name !== "strings.js");
  const code = (await Promise.all(files.map((name) => readFile(new URL(name, folder), "utf8")))).join("\n");
  assert.deepEqual(Object.keys(STRINGS).filter((key) => !code.includes(`"${key}"`)), []);
  translate({ in_use: "in Gebrauch: {n}", nonsense: "?", free_all: 5 });
  assert.deepEqual([t("in_use", { n: 3 }), t("free_all")], ["in Gebrauch: 3", "Free all"]);
  translate(null);
  assert.equal(t("share_on_the_card", { percent: 42 }), "42 % on the card");
});

test("the English locale says what the code says: node tests/web/locale.mjs writes it", async () => {
  for (const [name, content] of Object.entries(files())) assert.equal(await readFile(new URL(name, FOLDER), "utf8"), written(content), name);
});
