// The check before a prompt is queued, against a front end that queues as ComfyUI's does.

import assert from "node:assert/strict";
import { test } from "node:test";

import { PATIENCE_MS, Preflight, withoutOurFrames } from "../../web/preflight.js";
import { answerJson, response } from "./samples.mjs";

class Silent extends Error {}

/** A front end: app.queuePrompt takes the newest item first and queues each batchCount times, while others may be added. */
class FakeApp {
  items = /** @type {any[]} */ ([]);
  busy = false;
  graph = { 3: { class_type: "KSampler", inputs: { seed: 0, steps: 20 } } };
  errors = /** @type {unknown[]} */ ([]);

  /** @param {FakeApi} api */
  constructor(api) {
    this.api = api;
  }

  /** @param {number} number @param {number} [batchCount] @param {any} [options] */
  async queuePrompt(number, batchCount = 1, options = {}) {
    this.items.push({ number, batchCount, targets: options.queueNodeIds });
    if (this.busy) return false;
    this.busy = true;
    try {
      for (let item = this.items.pop(); item; item = this.items.pop()) {
        for (let i = 0; i < item.batchCount; i++) {
          this.graph[3].inputs.seed += 1;
          try {
            await this.api.queuePrompt(item.number, { output: structuredClone(this.graph), workflow: {} }, { partialExecutionTargets: item.targets });
          } catch (error) {
            this.errors.push(error);
            break;
          }
        }
      }
    } finally {
      this.busy = false;
    }
    return true;
  }
}

class FakeApi {
  posts = /** @type {any[][]} */ ([]);
  refuse = /** @type {boolean | Error} */ (false);

  /** @param {...any} args */
  async queuePrompt(...args) {
    this.posts.push(args);
    if (this.refuse) throw this.refuse instanceof Error ? this.refuse : new Error("refused");
    return { prompt_id: String(this.posts.length) };
  }
}

/**
 * @param {Partial<{
 *   answer: (body: any, signal: AbortSignal) => any, decide: (answer: any, prompt: any) => any, auto: boolean, enforces: boolean,
 *   allow: (signal: AbortSignal) => Promise<unknown>, remembered: Set<string>,
 * }>} [how]
 */
function page(how = {}) {
  const api = new FakeApi();
  const app = new FakeApp(api);
  const seen = { checks: /** @type {any[]} */ ([]), fixes: /** @type {any[]} */ ([]), questions: /** @type {any[]} */ ([]), toasts: /** @type {any[]} */ ([]), notes: /** @type {string[]} */ ([]), allowed: /** @type {any[]} */ ([]), posted: /** @type {any[]} */ ([]) };
  const ways = {
    answer: () => response(answerJson("fits")), decide: () => "run", auto: false, enforces: false, allow: async () => {}, remembered: new Set(), ...how,
  };
  const preflight = new Preflight({
    api,
    app,
    check: async (body, signal) => {
      (JSON.parse(body).fixes ? seen.fixes : seen.checks).push(JSON.parse(body));
      return ways.answer(JSON.parse(body), signal);
    },
    question: async (answer, prompt, refused) => {
      seen.questions.push({ ...answer, refused });
      const decided = await ways.decide(answer, prompt);
      return typeof decided === "string" ? { choice: decided, remember: false } : decided;
    },
    remembered: { has: (graph) => ways.remembered.has(graph), set: (graph, wanted) => (wanted ? ways.remembered.add(graph) : ways.remembered.delete(graph)) },
    onPosted: (posted) => seen.posted.push(posted),
    toast: (toast) => seen.toasts.push(toast),
    enforces: () => ways.enforces,
    allow: async (body, signal) => {
      seen.allowed.push({ body: JSON.parse(body), posts: api.posts.length });
      await ways.allow(signal);
    },
    autoQueueIsOn: () => ways.auto,
    cancelled: () => {
      throw new Silent();
    },
    onChecked: (note) => seen.notes.push(note),
  });
  preflight.install();
  return { api, app, preflight, seen, ways };
}

const saying = (verdict, message) => () => response(answerJson(verdict, message));

test("what fits is queued with its own arguments and nothing is said", async () => {
  const { api, app, seen } = page();
  await app.queuePrompt(-1, 1, { queueNodeIds: ["3"] });
  assert.deepEqual(api.posts.map(([number, , options]) => [number, options.partialExecutionTargets]), [[-1, ["3"]]]);
  assert.deepEqual(seen.checks, [{ prompt: { 3: { class_type: "KSampler", inputs: { seed: 1, steps: 20 } } }, partial_execution_targets: ["3"], fixes: false }]);
  assert.deepEqual([seen.questions.length, seen.toasts.length, seen.notes], [0, 0, ["fits"]]);
});

test("a verdict of unknown says nothing", async () => {
  const { api, app, seen } = page({ answer: saying("unknown") });
  await app.queuePrompt(0);
  assert.deepEqual([api.posts.length, seen.questions.length, seen.toasts.length], [1, 0, 0]);
});

test("further arguments, of a front end to come, are passed on", async () => {
  const { api } = page();
  await api.queuePrompt(0, { output: {} }, { previewMethod: "auto" }, "more");
  assert.equal(api.posts[0]?.[3], "more");
});

test("cancelling a batch of three asks once, checks once and posts nothing", async () => {
  const { api, app, seen } = page({ answer: saying("does_not_fit"), decide: () => "cancel" });
  await app.queuePrompt(0, 3);
  assert.deepEqual([seen.questions.length, seen.checks.length, api.posts.length], [1, 1, 0]);
  assert.equal(app.errors.length, 1);
  assert.ok(app.errors[0] instanceof Silent);
});

test("where cancelling returns instead of throwing, the rest of the batch is cancelled as well", async () => {
  const { api, app, seen, preflight } = page({ answer: saying("does_not_fit"), decide: () => "cancel" });
  preflight.remove();
  const quiet = new Preflight({
    ...partsOf(),
    api,
    app,
    check: async () => response(answerJson("does_not_fit")),
    question: async (answer) => (seen.questions.push(answer), { choice: "cancel", remember: false }),
    cancelled: () => ({ node_errors: {} }),
  });
  quiet.install();
  await app.queuePrompt(0, 3);
  assert.deepEqual([seen.questions.length, api.posts.length, app.errors.length], [1, 0, 0]);
});

test("running a batch of three anyway asks once and posts three", async () => {
  const { api, app, seen } = page({ answer: saying("does_not_fit") });
  await app.queuePrompt(0, 3);
  assert.deepEqual([seen.questions.length, seen.checks.length, api.posts.length], [1, 1, 3]);
});

test("a second press of Run is a new question", async () => {
  const { app, seen } = page({ answer: saying("does_not_fit") });
  await app.queuePrompt(0);
  await app.queuePrompt(0);
  assert.deepEqual([seen.questions.length, seen.checks.length], [2, 2]);
});

test("in one batch another text with the same sentence is not asked about again, another sentence is", async () => {
  let text = 0;
  const { api, app, seen, ways } = page({ answer: saying("does_not_fit", "Short by 6 GB.") });
  const raw = app.graph[3].inputs;
  Object.defineProperty(raw, "text", { enumerable: true, get: () => `prompt ${text++}` });
  await app.queuePrompt(0, 3);
  assert.deepEqual([seen.checks.length, seen.questions.length, api.posts.length], [3, 1, 3]);
  let short = 0;
  ways.answer = () => response(answerJson("does_not_fit", `Short by ${short++} GB.`));
  await app.queuePrompt(0, 2);
  assert.equal(seen.questions.length, 3);
});

test("prompts queued while the question is open share its answer", async () => {
  /** @type {(decision: string) => void} */
  let decide = () => {};
  const { api, app, seen } = page({ answer: saying("does_not_fit"), decide: () => new Promise((resolve) => (decide = resolve)) });
  const first = app.queuePrompt(0);
  while (seen.questions.length === 0) await new Promise((resolve) => setImmediate(resolve));
  await app.queuePrompt(0, 2);
  decide("run");
  await first;
  assert.deepEqual([seen.questions.length, seen.checks.length, api.posts.length], [1, 1, 3]);
});

test("auto-queue gets a toast instead of the question, and runs", async () => {
  const { api, app, seen } = page({ answer: saying("does_not_fit", "Short by 6 GB.") });
  await app.queuePrompt(0, 1, { intent: { trigger_source: "auto_queue" } });
  assert.deepEqual([api.posts.length, seen.questions.length], [1, 0]);
  assert.deepEqual(seen.toasts, [{ severity: "warn", summary: "Does not fit this card", detail: "Short by 6 GB." }]);
});

test("a front end that does not say who asked is taken for auto-queue while auto-queue is on", async () => {
  const { app, seen } = page({ answer: saying("does_not_fit"), auto: true });
  await app.queuePrompt(0, 1, ["3"]);
  assert.deepEqual([seen.questions.length, seen.toasts.length], [0, 1]);
  await app.queuePrompt(0, 1, { intent: { trigger_source: "button" } });
  assert.equal(seen.questions.length, 1);
});

test("a graph that fits with offloading is toasted once in a row", async () => {
  const { api, app, seen, ways } = page({ answer: saying("fits_with_offload", "4 GB stream.") });
  await app.queuePrompt(0, 3);
  await app.queuePrompt(0);
  assert.deepEqual(seen.toasts, [{ severity: "info", summary: "Fits with offloading", detail: "4 GB stream." }]);
  app.graph[3].inputs.steps = 4;
  await app.queuePrompt(0);
  assert.equal(seen.toasts.length, 2);
  ways.answer = saying("fits");
  await app.queuePrompt(0);
  ways.answer = saying("fits_with_offload");
  await app.queuePrompt(0);
  assert.equal(seen.toasts.length, 3);
  assert.equal(api.posts.length, 7);
});

test("a check that fails in any way lets the prompt through and notes why", async () => {
  /** @type {[() => any, string][]} */
  const ways = [
    [() => response("no such route", 404), "not checked: the server answered 404"],
    [() => response("boom", 500), "not checked: the server answered 500"],
    [() => response("{nope"), "not checked: the answer is no JSON"],
    [() => response({ fits: false }), "not checked: verdict is none of the four"],
    [() => Promise.reject(new TypeError("Failed to fetch")), "not checked: Failed to fetch"],
    [() => null, ""],
  ];
  for (const [answer, note] of ways) {
    const { api, app, seen } = page({ answer });
    await app.queuePrompt(0);
    assert.deepEqual([api.posts.length, seen.questions.length], [1, 0]);
    if (note) assert.deepEqual(seen.notes, [note]);
  }
});

test("a question that cannot be shown lets the prompt through", async () => {
  const { api, app } = page({ answer: saying("does_not_fit"), decide: () => Promise.reject(new Error("no dialog")) });
  await app.queuePrompt(0);
  assert.equal(api.posts.length, 1);
});

test("a server that hangs delays a whole batch by its patience once", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { api, app, seen } = page({ answer: () => new Promise(() => {}) });
  const queued = app.queuePrompt(0, 3);
  while (seen.checks.length === 0) await new Promise((resolve) => setImmediate(resolve));
  t.mock.timers.tick(PATIENCE_MS - 1);
  await new Promise((resolve) => setImmediate(resolve));
  assert.equal(api.posts.length, 0);
  t.mock.timers.tick(1);
  await queued;
  assert.deepEqual([api.posts.length, seen.checks.length], [3, 1]);
  assert.equal(seen.notes[0], "not checked: no answer within 1.5 s");
});

test("what is no prompt is passed on unread", async () => {
  const { api } = page({ answer: () => response("bad", 400) });
  await api.queuePrompt(0, undefined);
  await api.queuePrompt(0, { output: null });
  assert.equal(api.posts.length, 2);
});

test("it calls the host's function on its own object, whatever calls us", async () => {
  const api = { name: "api", queuePrompt() { return this.name; } };
  const app = { name: "app", queuePrompt() { return this.name; } };
  const preflight = new Preflight({ ...partsOf(), api, app });
  preflight.install();
  const other = { name: "other" };
  assert.equal(await api.queuePrompt.call(other), "api");
  assert.equal(app.queuePrompt.call(other), "app");
});

test("installed twice it checks once; removed it leaves the host as it was", async () => {
  const { api, app, preflight, seen } = page();
  preflight.install();
  await app.queuePrompt(0);
  assert.equal(seen.checks.length, 1);
  preflight.remove();
  assert.deepEqual([Object.hasOwn(api, "queuePrompt"), Object.hasOwn(app, "queuePrompt")], [false, false]);
  assert.equal(api.queuePrompt, FakeApi.prototype.queuePrompt);
  await app.queuePrompt(0);
  assert.deepEqual([seen.checks.length, api.posts.length], [1, 2]);
});

test("below another pack's wrapper it only passes through when removed, and works again when installed", async () => {
  const { api, app, preflight, seen } = page();
  const below = api.queuePrompt;
  const theirs = (/** @type {any[]} */ ...args) => below.apply(app, args);
  api.queuePrompt = theirs;
  preflight.remove();
  assert.equal(api.queuePrompt, theirs);
  await app.queuePrompt(0);
  assert.deepEqual([seen.checks.length, api.posts.length], [0, 1]);
  preflight.install();
  await app.queuePrompt(0);
  assert.deepEqual([seen.checks.length, api.posts.length], [1, 2]);
});

test("the host's errors pass through without our files in their stack", async () => {
  const { api } = page();
  api.refuse = true;
  const error = await api.queuePrompt(0, { output: {} }).catch((/** @type {Error} */ e) => e);
  assert.equal(error.message, "refused");
  assert.match(error.stack ?? "", /preflight\.test\.mjs/);
  assert.doesNotMatch(error.stack ?? "", /web\/preflight\.js/);
});

test("a cancelled prompt blames nobody", async () => {
  const { api } = page({ answer: saying("does_not_fit"), decide: () => "cancel" });
  const error = await api.queuePrompt(0, { output: {} }).catch((/** @type {Error} */ e) => e);
  assert.ok(error instanceof Silent);
  assert.doesNotMatch(error.stack ?? "", /web\/preflight\.js/);
  assert.equal(withoutOurFrames("no error"), "no error");
});

function partsOf() {
  return {
    check: async () => response(answerJson("fits")),
    question: async () => ({ choice: /** @type {const} */ ("run"), remember: false }),
    remembered: { has: () => false, set: () => {} },
    onPosted: () => {},
    toast: () => {},
    enforces: () => false,
    allow: async () => {},
    autoQueueIsOn: () => false,
    cancelled: () => undefined,
    onChecked: () => {},
  };
}

test("who insists where the server enforces is let through, once for each post and before it", async () => {
  const { api, app, preflight, seen } = page({ answer: () => response(answerJson("does_not_fit")), enforces: true });
  preflight.install();
  await app.queuePrompt(0, 2);
  assert.equal(api.posts.length, 2);
  assert.deepEqual(seen.allowed.map(({ posts }) => posts), [0, 1]);
  assert.deepEqual(seen.allowed.map(({ body }) => body.prompt), api.posts.map(([, data]) => data.output));
});

test("nobody has to be let through where the server only warns, where it fits, or where the person cancels", async () => {
  for (const how of [{ enforces: false }, { enforces: true, answer: () => response(answerJson("fits")) }, { enforces: true, decide: () => "cancel" }]) {
    const { app, preflight, seen } = page({ answer: () => response(answerJson("does_not_fit")), ...how });
    preflight.install();
    await app.queuePrompt(0);
    assert.deepEqual(seen.allowed, []);
  }
});

test("if letting through fails the prompt is posted all the same, and the server says why it refuses", async () => {
  const { api, app, preflight, seen } = page({
    answer: () => response(answerJson("does_not_fit")),
    enforces: true,
    allow: async () => {
      throw new Error("server gone");
    },
  });
  preflight.install();
  await app.queuePrompt(0);
  assert.equal(api.posts.length, 1);
  assert.ok(seen.notes.includes("not allowed: server gone"));
});

test("what does not fit is asked about with its fixes, which are looked for only then", async () => {
  const { app, seen, ways } = page();
  await app.queuePrompt(0);
  assert.equal(seen.fixes.length, 0);
  ways.answer = () => response(answerJson("does_not_fit"));
  await app.queuePrompt(0);
  assert.deepEqual([seen.checks.length, seen.fixes.length], [2, 1]);
  assert.deepEqual(seen.questions[0].fixes.map((/** @type {any} */ fix) => fix.id), ["shorter_video", "tiled_decode", "flag_lowvram"]);
});

test("fixes that can't be had do not hold up the question", async () => {
  const { app, seen } = page({ answer: (body) => (body.fixes ? response("boom", 500) : response({ verdict: "does_not_fit", message: "Short by 6 GB." })) });
  await app.queuePrompt(0);
  assert.deepEqual(seen.questions.map((/** @type {any} */ q) => [q.message, q.fixes.length]), [["Short by 6 GB.", 0]]);
});

test("an applied fix is what is posted, and its step of undo ends when all of the batch is queued", async () => {
  const { api, app, seen, ways } = page({ answer: saying("does_not_fit") });
  const order = /** @type {string[]} */ ([]);
  const fixed = { 3: { class_type: "KSampler", inputs: { seed: 1, steps: 10 } } };
  ways.decide = () => {
    app.graph[3].inputs.steps = 10;
    ways.answer = () => response(answerJson("fits"));
    return { choice: "apply", remember: false, applied: { queued: { output: fixed, workflow: { fixed: true } }, done: () => order.push(`done after ${api.posts.length}`) } };
  };
  await app.queuePrompt(0, 3);
  assert.deepEqual(api.posts.map(([, data]) => data.output[3].inputs.steps), [10, 10, 10]);
  assert.deepEqual(api.posts[0]?.[1].workflow, { fixed: true });
  await new Promise((resolve) => setImmediate(resolve));
  assert.deepEqual([order, seen.questions.length], [["done after 3"], 1]);
});

test("a graph that is not to be asked about is told of and queued, through enforcement too, and cancelling remembers nothing", async () => {
  const { api, app, seen, ways } = page({ answer: saying("does_not_fit"), enforces: true });
  ways.decide = () => ({ choice: "cancel", remember: true });
  await app.queuePrompt(0);
  assert.deepEqual([seen.questions.length, api.posts.length], [1, 0]);
  ways.decide = () => ({ choice: "run", remember: true });
  await app.queuePrompt(0);
  await app.queuePrompt(0);
  assert.deepEqual([seen.questions.length, api.posts.length, seen.allowed.length], [2, 2, 2]);
  assert.deepEqual(seen.toasts.map((/** @type {any} */ toast) => toast.summary), ["Does not fit this card"]);
  app.graph[3].inputs.steps = 21;
  await app.queuePrompt(0);
  assert.equal(seen.questions.length, 3);
});

test("system memory that is short has a note of its own", async () => {
  const ram = { verdict: "does_not_fit", message: "Short by 3 GB of memory.", needed_bytes: 8, available_bytes: 5 };
  const { app, seen } = page({ answer: () => response({ ...answerJson("fits_with_offload"), ram }) });
  await app.queuePrompt(0);
  assert.deepEqual(seen.toasts.map((/** @type {any} */ toast) => [toast.severity, toast.detail]), [
    ["info", "It is fits_with_offload."],
    ["warn", "Short by 3 GB of memory."],
  ]);
});

test("a refusal by the server opens the question, and insisting lets it through though this browser only warns", async () => {
  const { api, app, seen, ways } = page({ answer: saying("fits") });
  const refusal = Object.assign(new Error("no"), { response: { error: { extra_info: { vram_headroom: { verdict: "does_not_fit" } } } } });
  api.refuse = refusal;
  ways.decide = () => {
    api.refuse = false;
    return "run";
  };
  await app.queuePrompt(0);
  assert.deepEqual([seen.questions.length, seen.questions[0].refused, api.posts.length, seen.allowed.length], [1, true, 2, 1]);
  api.refuse = refusal;
  await app.queuePrompt(0, 1, { intent: { trigger_source: "auto_queue" } });
  assert.deepEqual([seen.questions.length, app.errors.at(-1)], [1, refusal]);
});

test("who posted what is told, so that an accident later can be explained", async () => {
  const { app, seen } = page({ answer: saying("fits") });
  await app.queuePrompt(0, 2);
  assert.deepEqual(seen.posted.map((/** @type {any} */ p) => [p.id, p.answer.verdict, p.auto]), [["1", "fits", false], ["2", "fits", false]]);
});

test("a search for fixes that takes the server longer than it waits is asked for again", async () => {
  let busy = 2;
  const { app, seen } = page({ answer: (body) => (body.fixes && busy-- > 0 ? response("slow", 503) : response(answerJson("does_not_fit"))) });
  await app.queuePrompt(0);
  assert.deepEqual([seen.fixes.length, seen.questions[0].fixes.length], [3, 3]);
});
