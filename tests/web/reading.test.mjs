// From a status to what the bar shows.

import assert from "node:assert/strict";
import { test } from "node:test";

import { levelOf } from "../../web/levels.js";
import * as reading from "../../web/reading.js";
import { readStatus } from "../../web/status.js";
import { deviceJson, GB, statusJson } from "./samples.mjs";

/** @type {import("../../web/reading.js").View} */
const VIEW = { shows: "pressure", card: "fullest", pollSeconds: 3, level: (device) => levelOf(device.pressure) };
const readingOf = (snapshot, view = {}) => reading.readingOf(snapshot, { ...VIEW, ...view });
const detailsOf = (snapshot, view = {}) => reading.detailsOf(snapshot, { ...VIEW, ...view });

const ok = (...devices) => ({ state: /** @type {const} */ ("ok"), status: readStatus(statusJson(...devices)), reason: "" });

test("pressure is the figure, used of total stands beside it", () => {
  const reading = readingOf(ok(deviceJson()));
  assert.equal(reading.level, "ok");
  assert.equal(reading.pressure, 37);
  assert.equal(reading.headline, "37 %");
  assert.equal(reading.amount, "10 of 16 GB");
  assert.equal(reading.spoken, "VRAM pressure 37 percent, ok, 10 of 16 GB used");
});

test("in use, reclaimable and others are told apart, and in use with others is the pressure", () => {
  const { shares } = readingOf(ok(deviceJson()));
  assert.deepEqual(shares, { inUse: 25, reclaimable: 25, others: 12.5 });
});

test("memory whose owner is not known counts as in use", () => {
  const { shares } = readingOf(ok(deviceJson({ ours_bytes: null, others_bytes: null })));
  assert.deepEqual(shares, { inUse: 37.5, reclaimable: 25, others: 0 });
});

test("others are what is not ours where only ours is known", () => {
  const { shares } = readingOf(ok(deviceJson({ others_bytes: null })));
  assert.deepEqual(shares, { inUse: 25, reclaimable: 25, others: 12.5 });
});

test("figures that contradict each other never draw more than a full bar", () => {
  const { shares } = readingOf(ok(deviceJson({ used_bytes: 99 * GB, others_bytes: 50 * GB, reclaimable_free_bytes: 90 * GB })));
  assert.equal((shares?.inUse ?? 0) + (shares?.reclaimable ?? 0) + (shares?.others ?? 0), 100);
});

test("of several cards the fullest is shown", () => {
  const reading = readingOf(ok(deviceJson(), deviceJson({ index: 1, name: "Second", pressure_percent: 91 }), deviceJson({ index: 2, pressure_percent: 70 })));
  assert.equal(reading.device?.name, "Second");
  assert.equal(reading.level, "critical");
  assert.equal(reading.pressure, 91);
});

test("loading, no GPU, error and disconnected have words instead of figures", () => {
  /** @type {[any, string, string][]} */
  const cases = [
    [{ state: "loading", status: null, reason: "" }, "VRAM …", "VRAM, waiting for the first reading"],
    [{ state: "no_gpu", status: readStatus(statusJson()), reason: "" }, "No GPU", "No GPU: ComfyUI runs on the CPU"],
    [{ state: "error", status: null, reason: "the server answered 500" }, "VRAM ?", "VRAM not known: the server answered 500"],
    [{ state: "disconnected", status: null, reason: "ComfyUI does not answer" }, "VRAM offline", "VRAM not known: ComfyUI does not answer"],
  ];
  for (const [snapshot, headline, spoken] of cases) {
    const reading = readingOf(snapshot);
    assert.equal(reading.state, snapshot.state);
    assert.equal(reading.headline, headline);
    assert.equal(reading.spoken, spoken);
    assert.equal(reading.level, null);
    assert.equal(reading.pressure, null);
  }
});

test("the details list the card's figures, every component with its place, and models of nobody", () => {
  const [card, wan, rest, ...more] = detailsOf(ok(deviceJson({ active_bytes: null })));
  assert.equal(card?.title, "Simulated 16 GB");
  assert.deepEqual(Object.fromEntries((card?.rows ?? []).map((r) => [r.label, r.value])), {
    Pressure: "37 %",
    Total: "16 GB",
    Used: "10 GB (62 %)",
    Free: "6 GB",
    "Can be given back": "4 GB",
    Reserved: "9 GB",
    Active: "not known",
    ComfyUI: "8 GB",
    "Other programs": "2 GB",
  });
  assert.equal(wan?.title, "Pipeline wan, active");
  assert.deepEqual(wan?.rows, [
    { label: "high (generator)", value: "14 GB, 42 % on the card, active", dot: "active" },
    { label: "umt5 (text encoder)", value: "6 GB, in RAM, offloaded", dot: "offloaded" },
    { label: "vae (VAE)", value: "50 MB, on the card, active", dot: "active" },
  ]);
  assert.deepEqual(rest, { title: "Other models ComfyUI holds", rows: [{ label: "SDXL", value: "1 GB of 5 GB on the card, idle", dot: "idle" }] });
  assert.equal(more.length, 0);
});

test("the details say why there is no reading, and the age of an old one", () => {
  assert.equal(detailsOf({ state: "error", status: null, reason: "no answer within 5 s" })[0]?.title, "No reading: no answer within 5 s. Trying again every 3 s.");
  const rows = detailsOf(ok(deviceJson({ stale: true, age_seconds: 12.4 })))[0]?.rows ?? [];
  assert.deepEqual(rows.at(-1), { label: "Reading", value: "12 s old" });
});

test("a person may have the plain used percentage; level and meter then still follow pressure", () => {
  const reading = readingOf(ok(deviceJson({ used_bytes: 15.2 * GB, free_bytes: 0.8 * GB, reclaimable_free_bytes: 12 * GB, pressure_percent: 25 })), { shows: "used" });
  assert.deepEqual([reading.headline, reading.figure, reading.pressure, reading.level], ["95 % used", 95, 25, "ok"]);
  assert.equal(reading.spoken, "VRAM 95 percent used, pressure 25 percent, ok, 15.2 of 16 GB used");
});

test("a person may have another card than the fullest; where it is gone it is the fullest again", () => {
  const two = ok(deviceJson(), deviceJson({ index: 1, pressure_percent: 91 }));
  assert.equal(readingOf(two, { card: 0 }).device?.index, 0);
  assert.equal(readingOf(two, { card: 7 }).device?.index, 1);
  assert.match(readingOf(two).amount, /^GPU 1: /);
});

test("high and critical have their words, and critical says what is left instead of what is held", () => {
  const words = [59, 60, 80, 90].map((pressure_percent) => readingOf(ok(deviceJson({ pressure_percent, reclaimable_free_bytes: 1.1 * GB }))));
  assert.deepEqual(words.map((r) => r.word), ["", "high", "very high", "critical"]);
  assert.deepEqual(words.map((r) => r.amount), ["10 of 16 GB", "10 of 16 GB", "10 of 16 GB", "1.1 GB left"]);
});

test("an old reading says that it is old, to the eye and to the ear", () => {
  const reading = readingOf(ok(deviceJson({ stale: true, age_seconds: 12.4 })));
  assert.deepEqual([reading.stale, reading.amount], [true, "10 of 16 GB (old)"]);
  assert.match(reading.spoken, /an old reading$/);
});
