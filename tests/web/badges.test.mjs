// What badges say, and when the graph on the canvas is planned for them.

import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";

import { readAnswer } from "../../web/answers.js";
import { badgeTexts, worstWithin } from "../../web/badge_texts.js";
import { GraphPlans, REST_MS } from "../../web/graph_plans.js";
import { isQuiet, NodeBadges } from "../../web/node_badges.js";
import { readStatus } from "../../web/status.js";
import { answerJson, deviceJson, GB, response, statusJson } from "./samples.mjs";

const phase = (kind, node, peak, changes = {}) => ({
  ...answerJson("fits").phases[0], kind, node_ids: [node], short_bytes: 0,
  peak_allocated_bytes: { expected: peak * GB, lower: peak * GB, upper: peak * GB }, ...changes,
});
const MODELS = [
  { node_id: "2:1", role: "generator", file: "wan/high.safetensors", bytes: 14 * GB, resident_bytes: 13.3 * GB },
  { node_id: "2:2", role: "vae", file: "vae.safetensors", bytes: GB, resident_bytes: GB },
  { node_id: "2:9", role: "lora", file: "lora.safetensors", bytes: GB, resident_bytes: 0 },
  { node_id: "2:8", role: "other", file: "gone.safetensors", bytes: null, resident_bytes: null },
];
const PHASES = [phase("text_encode", "2:5", 6), phase("sample", "2:3", 12.5), phase("vae_decode", "2:4", 15, { short_bytes: 2 * GB }), phase("vae_encode", "2:6", 3)];
const plan = (phases = PHASES, models = MODELS) => readAnswer({ ...answerJson("fits"), phases, models });
const said = (known) => Object.fromEntries([...badgeTexts({ plan: null, run: null, status: null, ...known })].map(([id, { text }]) => [id, text]));
const run = (measured, own = plan()) => ({
  id: "a", state: /** @type {const} */ ("done"), plan: own, phase: null, at: 9, marks: [], samples: [], incidents: [], steps: new Map(), measured,
});

test("loaders say what they will take, samplers and the VAE's nodes their peak, what does not fit how much is missing", () => {
  assert.deepEqual(said({ plan: plan() }), {
    "2:1": "takes 13.3 GB", "2:2": "takes 1 GB", "2:3": "peak 12.5 GB", "2:4": "peak 15 GB, short by 2 GB", "2:6": "peak 3 GB",
  });
});

test("a loaded model's loader says where it is: ours by its node, another's by its file", () => {
  const status = readStatus({
    ...statusJson(deviceJson()),
    pipelines: [{ name: "wan", state: "idle", components: [{ name: "vae", role: "vae", placement: "cpu", bytes: GB, bytes_on_card: 0, node_id: "2:2" }] }],
    loaded_models: [{ name: "WAN21", file: "high.safetensors", role: "generator", bytes: 10 * GB, bytes_on_card: 4 * GB, registered: false, in_use: false }],
  });
  const found = said({ plan: plan(), status });
  assert.deepEqual([found["2:1"], found["2:2"]], ["13.3 GB, 40 % on the card", "1 GB, in RAM"]);
});

test("what has run says what it took beside what was predicted, also when it need not run again", () => {
  const measured = [{ phase: 1, nodeId: "2:3", bytes: 12.2 * GB, atLeast: false }, { phase: 2, nodeId: "2:4", bytes: 14 * GB, atLeast: true }];
  const nothingLeft = readAnswer({ ...answerJson("fits"), phases: [], models: [] });
  const found = said({ plan: nothingLeft, run: run(measured) });
  assert.deepEqual([found["2:3"], found["2:4"], found["2:6"]], ["peak 12.2 GB, 12.5 predicted", "peak at least 14 GB, 15 predicted", "peak 3 GB"]);
  assert.equal(found["2:1"], "takes 13.3 GB");
});

test("a node of several phases says the highest, and an unknown peak is said to be unknown", () => {
  const unknown = phase("sample", "7", 1, { peak_allocated_bytes: null, activation_bytes: null });
  const found = said({ plan: plan([phase("sample", "3", 4), phase("sample", "3", 9), unknown], []) });
  assert.deepEqual(found, { 3: "peak 9 GB", 7: "peak not known" });
});

test("a subgraph says what the worst of its nodes says: what does not fit before what is large", () => {
  const texts = badgeTexts({ plan: plan([...PHASES, phase("sample", "2:7", 90), phase("sample", "22:1", 95)]), run: null, status: null });
  assert.equal(worstWithin(texts, "2")?.text, "peak 15 GB, short by 2 GB");
  assert.equal(worstWithin(texts, "22")?.text, "peak 95 GB");
  assert.equal(worstWithin(texts, "3"), null);
});

function canvas(...nodes) {
  const app = { rootGraph: { nodes, links: new Map() }, redraws: 0, canvas: { setDirty: () => (app.redraws += 1) } };
  return app;
}

class FakeBadge {
  constructor(options) {
    Object.assign(this, options);
  }
}

const shown = (node) => node.badges.map((badge) => badge().text);

test("badges are put on nodes once, drawn anew only when they say something else, and say nothing when switched off", () => {
  const inner = { id: 3, badges: [] };
  const outer = { id: 2, badges: [], subgraph: { nodes: [inner], links: new Map() } };
  const other = { id: 9, badges: [() => new FakeBadge({ text: "theirs" })] };
  const app = canvas(outer, other);
  const states = [];
  const badges = new NodeBadges(app, () => FakeBadge, (state) => (states.push(state), state));
  badges.created(other);
  badges.created(other);
  assert.deepEqual(shown(other), ["theirs", ""], "there from the start, or Vue nodes would never see it");
  const known = { plan: plan(), run: null, status: null };
  badges.show(known);
  assert.deepEqual(shown(inner), [], "switched off");
  badges.switch(true);
  const before = app.redraws;
  for (let i = 0; i < 3; i++) badges.show(known);
  assert.deepEqual([shown(inner), shown(outer), shown(other)], [["peak 12.5 GB"], ["peak 15 GB, short by 2 GB"], ["theirs", ""]]);
  assert.equal(inner.badges[0](), inner.badges[0](), "the canvas asks at every frame");
  assert.equal(app.redraws - before, 1);
  badges.switch(false);
  assert.deepEqual([shown(inner), shown(outer)], [[""], [""]]);
  badges.switch(true);
  badges.show(known);
  assert.deepEqual([shown(inner), states.length], [["peak 12.5 GB"], 1]);
});

test("a node that was made anew says what the one before it said, and so does that one to a front end that asks it still", () => {
  const before = { id: 3, badges: [] };
  const app = canvas(before);
  const badges = new NodeBadges(app, () => FakeBadge, (state) => state);
  badges.switch(true);
  const known = { plan: plan([phase("sample", "3", 4)]), run: null, status: null };
  badges.show(known);
  const anew = { id: 3, badges: [] };
  badges.created(anew);
  app.rootGraph.nodes = [anew];
  assert.deepEqual(shown(anew), [""], "nothing is known of it yet");
  const redraws = app.redraws;
  badges.show(known);
  assert.deepEqual([shown(anew), shown(before), app.redraws - redraws], [["peak 4 GB"], ["peak 4 GB"], 1], "Vue nodes are told");
  badges.show({ ...known, plan: plan([phase("sample", "3", 5)]) });
  assert.deepEqual([shown(anew), shown(before)], [["peak 5 GB"], ["peak 5 GB"]]);
});

test("two nodes of one subgraph share their inner nodes, and are drawn once all the same", () => {
  const inner = { id: 3, badges: [] };
  const [one, other] = [2, 22].map((id) => ({ id, badges: [], subgraph: { nodes: [inner], links: new Map() } }));
  const app = canvas(one, other);
  const badges = new NodeBadges(app, () => FakeBadge, (state) => state);
  badges.switch(true);
  const before = app.redraws;
  for (let i = 0; i < 3; i++) badges.show({ plan: plan([phase("sample", "2:3", 4), phase("sample", "22:3", 5)]), run: null, status: null });
  assert.deepEqual([shown(one), shown(other), app.redraws - before], [["peak 4 GB"], ["peak 5 GB"], 1]);
});

test("a front end without badges gets none", () => {
  const node = { id: 3, badges: [] };
  const badges = new NodeBadges(canvas(node), () => undefined, (state) => state);
  badges.switch(true);
  badges.show({ plan: plan([phase("sample", "3", 4)]), run: null, status: null });
  assert.deepEqual(node.badges, []);
});

test("a graph whose widgets upload when they are read is not read by itself", () => {
  const quiet = canvas({ id: 1, widgets: [{ name: "seed", value: 1 }, { name: "text", serializeValue: () => "" }] });
  assert.equal(isQuiet(quiet), true);
  assert.equal(isQuiet(canvas({ id: 1, subgraph: { nodes: [{ id: 2, widgets: [{ name: "image", serializeValue: async () => "" }] }] } })), false);
});

beforeEach(() => mock.timers.enable({ apis: ["setTimeout"] }));
afterEach(() => mock.timers.reset());

const settled = () => new Promise((resolve) => setImmediate(resolve));

async function rest(times = 1) {
  for (let i = 0; i < times; i++) {
    mock.timers.tick(REST_MS);
    for (let k = 0; k < 6; k++) await settled();
  }
}

function plans(quiet = true, answer = () => response(answerJson("fits"))) {
  const seen = { asked: 0, read: 0, found: [], output: { 3: { class_type: "KSampler", inputs: { seed: 1, steps: 20 } } } };
  const graph = new GraphPlans({
    prompt: async () => ((seen.read += 1), { output: structuredClone(seen.output) }),
    isQuiet: () => quiet,
    check: async (body) => ((seen.asked += 1), (seen.body = JSON.parse(body)), answer()),
    found: (plan) => seen.found.push(plan.answer?.verdict ?? null),
  });
  return { graph, seen };
}

test("a graph is planned once it rests, and once only while its content stays", async () => {
  const { graph, seen } = plans();
  graph.changed();
  await rest();
  assert.equal(seen.asked, 0, "switched off");
  graph.switch(true);
  for (let i = 0; i < 20; i++) {
    graph.changed();
    mock.timers.tick(REST_MS / 2);
  }
  await rest();
  assert.deepEqual([seen.asked, seen.found, seen.body.fixes], [1, ["fits"], false]);
  seen.output[3].inputs.seed = 2;
  graph.changed();
  await rest();
  assert.equal(seen.asked, 1, "a seed needs no memory");
  seen.output[3].inputs.steps = 30;
  graph.changed();
  await rest();
  assert.equal(seen.asked, 2);
  graph.worldChanged();
  await rest();
  assert.equal(seen.asked, 3);
});

test("a hidden tab plans nothing and catches up when it is back", async () => {
  const { graph, seen } = plans();
  graph.switch(true);
  graph.setHidden(true);
  graph.changed();
  await rest(3);
  assert.deepEqual([seen.read, seen.asked], [0, 0]);
  graph.setHidden(false);
  await rest();
  assert.equal(seen.asked, 1);
});

test("a graph that can't be read quietly is not read, and one that is not finished has no plan", async () => {
  const loud = plans(false);
  loud.graph.switch(true);
  await rest();
  assert.equal(loud.seen.read, 0);
  const unfinished = plans(true, () => response({ error: {} }, 400));
  unfinished.graph.switch(true);
  await rest();
  assert.deepEqual(unfinished.seen.found, [null]);
  const broken = plans(true, () => response("no", 500));
  broken.graph.switch(true);
  await rest();
  assert.deepEqual(broken.seen.found, []);
});
