// When the server is asked, and what its silence means.

import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";

import { POLL_SECONDS, SPACING_MS, StatusClient, TIMEOUT_MS } from "../../web/status_client.js";
import { deviceJson, GB, response, statusJson } from "./samples.mjs";

const POLL_MS = 1000 * POLL_SECONDS;

const settled = () => new Promise((resolve) => setImmediate(resolve));

/** Passes simulated time in small steps, letting promises run between them. @param {number} ms */
async function pass(ms) {
  for (let at = 0; at < ms; at += 50) {
    mock.timers.tick(50);
    await settled();
  }
}

/** @param {() => Promise<Response> | Response} [answer] */
function clientOf(answer = () => response(statusJson(deviceJson()))) {
  const seen = { asked: 0, inFlight: 0, mostInFlight: 0, states: /** @type {string[]} */ ([]), signal: /** @type {AbortSignal | null} */ (null) };
  const replies = { next: answer };
  const client = new StatusClient(
    async (signal) => {
      seen.asked += 1;
      seen.inFlight += 1;
      seen.mostInFlight = Math.max(seen.mostInFlight, seen.inFlight);
      seen.signal = signal;
      try {
        return await replies.next();
      } finally {
        seen.inFlight -= 1;
      }
    },
    (snapshot) => seen.states.push(snapshot.state),
  );
  return { client, seen, replies };
}

beforeEach(() => mock.timers.enable({ apis: ["setTimeout", "Date"], now: 1_000_000 }));
afterEach(() => mock.timers.reset());

test("it asks at once, then every three seconds", async () => {
  const { client, seen } = clientOf();
  client.start(false);
  assert.equal(client.snapshot.state, "loading");
  await pass(50);
  assert.equal(seen.asked, 1);
  assert.equal(client.snapshot.state, "ok");
  await pass(POLL_MS * 3);
  assert.equal(seen.asked, 4);
  client.stop();
});

test("a thousand events bring one update in a second and a half", async () => {
  const { client, seen } = clientOf();
  client.start(false);
  await pass(50);
  for (let at = 0; at < 3000; at += 50) {
    for (let i = 0; i < 17; i++) client.refresh();
    await pass(50);
  }
  assert.ok(seen.asked >= 3 && seen.asked <= 1 + 3000 / SPACING_MS, `${seen.asked} requests`);
  client.stop();
});

test("only one request is under way, and events meanwhile bring one more after it", async () => {
  /** @type {(r: Response) => void} */
  let answer = () => {};
  const { client, seen, replies } = clientOf(() => new Promise((resolve) => (answer = resolve)));
  client.start(false);
  await pass(50);
  for (let i = 0; i < 100; i++) client.refresh();
  await pass(SPACING_MS);
  assert.equal(seen.asked, 1);
  replies.next = () => response(statusJson(deviceJson()));
  answer(response(statusJson(deviceJson())));
  await pass(100);
  assert.equal(seen.asked, 2);
  assert.equal(seen.mostInFlight, 1);
  client.stop();
});

test("nothing is asked while the page is hidden, and at once when it is shown again", async () => {
  const { client, seen } = clientOf();
  client.start(false);
  await pass(1000);
  client.setHidden(true);
  client.refresh();
  await pass(POLL_MS * 10);
  assert.equal(seen.asked, 1);
  client.setHidden(false);
  await pass(50);
  assert.equal(seen.asked, 2);
  client.stop();
});

test("started in a hidden page it waits to be seen", async () => {
  const { client, seen } = clientOf();
  client.start(true);
  await pass(POLL_MS * 2);
  assert.equal(seen.asked, 0);
  client.setHidden(false);
  await pass(50);
  assert.equal(seen.asked, 1);
  client.stop();
});

test("each kind of failure has its state and reason, and it goes on asking", async () => {
  const { client, seen, replies } = clientOf(() => response("boom", 500));
  client.start(false);
  await pass(50);
  assert.deepEqual([client.snapshot.state, client.snapshot.reason], ["error", "the server answered 500"]);
  replies.next = () => response("<html>");
  await pass(POLL_MS);
  assert.deepEqual([client.snapshot.state, client.snapshot.reason], ["error", "the answer is no JSON"]);
  replies.next = () => response({ devices: 3 });
  await pass(POLL_MS);
  assert.deepEqual([client.snapshot.state, client.snapshot.reason], ["error", "devices is no list"]);
  replies.next = () => Promise.reject(new TypeError("Failed to fetch"));
  await pass(POLL_MS);
  assert.deepEqual([client.snapshot.state, client.snapshot.reason], ["disconnected", "ComfyUI does not answer"]);
  replies.next = () => response(statusJson());
  await pass(POLL_MS);
  assert.equal(client.snapshot.state, "no_gpu");
  assert.equal(seen.asked, 5);
  client.stop();
});

test("a request without an answer is given up after its time, whether or not the fetch obeys the signal", async () => {
  const { client, seen } = clientOf(() => new Promise(() => {}));
  client.start(false);
  await pass(TIMEOUT_MS + 100);
  assert.deepEqual([client.snapshot.state, client.snapshot.reason], ["error", "no answer within 5 s"]);
  assert.equal(seen.signal?.aborted, true);
  await pass(POLL_MS);
  assert.equal(seen.asked, 2);
  client.stop();
});

test("a lost connection is said at once and keeps the last answer", async () => {
  const { client } = clientOf();
  client.start(false);
  await pass(50);
  client.connectionLost();
  assert.equal(client.snapshot.state, "disconnected");
  assert.equal(client.snapshot.status?.devices.length, 1);
  client.refresh();
  await pass(SPACING_MS);
  assert.equal(client.snapshot.state, "ok");
  client.stop();
});

test("stopped it asks nothing, says nothing, and can be started again", async () => {
  /** @type {(r: Response) => void} */
  let answer = () => {};
  const { client, seen, replies } = clientOf(() => new Promise((resolve) => (answer = resolve)));
  client.start(false);
  await pass(50);
  client.stop();
  answer(response(statusJson(deviceJson())));
  client.refresh();
  client.connectionLost();
  await pass(POLL_MS * 2);
  assert.equal(seen.asked, 1);
  assert.deepEqual(seen.states, []);
  replies.next = () => response(statusJson(deviceJson()));
  client.start(false);
  await pass(50);
  assert.deepEqual(seen.states, ["ok"]);
  client.stop();
});

test("a reading that was sent by itself is shown, and an older answer that comes after it is not", async () => {
  const answers = [statusJson(deviceJson()), statusJson(deviceJson({ used_bytes: GB })), statusJson(deviceJson({ used_bytes: 2 * GB }))];
  answers.forEach((answer, i) => (answer.taken_at = [10, 12, 11][i]));
  const seen = [];
  const client = new StatusClient(async () => response(answers[0]), (snapshot) => seen.push(snapshot.status.devices[0].used / GB));
  client.receive(answers[1]);
  assert.deepEqual(seen, [], "nobody reads");
  client.start(false);
  await pass(50);
  for (const answer of [answers[1], answers[2], "no reading"]) client.receive(answer);
  assert.deepEqual(seen, [10, 1, 1]);
  client.receive({ ...answers[2], taken_at: 0.5 });
  assert.equal(seen.at(-1), 2, "a server that was started anew");
  client.stop();
});
