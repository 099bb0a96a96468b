// Where everything of a run's drawing stands, as numbers and words: predicted bars, the measured line, the limit, the peak, incidents.

import { t } from "./strings.js";
import { size } from "./text.js";
import { stretches, widthOf } from "./timeline.js";

/**
 * @import { Answer, Estimate, Phase } from "./answers.js"
 * @import { Incident, Run } from "./run.js"
 * @import { Key } from "./strings.js"
 *
 * @typedef {"waiting" | "running" | "done" | "failed" | "interrupted"} PhaseState
 *
 * @typedef {object} Bar `left` and `width` in thousandths of the drawing's width, heights in percent of its height
 * @property {number} left
 * @property {number} width
 * @property {string} kind
 * @property {number | null} weights null: nothing is predicted
 * @property {number} work what computing needs on top of them
 * @property {number | null} upper
 * @property {number | null} measured
 * @property {boolean} short
 * @property {PhaseState} state
 *
 * @typedef {object} PhaseRow one for each bar
 * @property {string} title with its number
 * @property {string} state
 * @property {PhaseState} at
 * @property {string} figures
 * @property {string[]} notes
 * @property {{ name: string, size: string }[]} terms
 * @property {string[]} bounds sentences below the terms
 *
 * @typedef {{ left: number, bottom: number, words: string }} Point in percent
 * @typedef {{ left: number, kind: string, words: string }} Mark
 *
 * @typedef {object} Chart
 * @property {Bar[]} bars
 * @property {PhaseRow[]} rows
 * @property {string} line of an SVG path in a box of 1000 by 100
 * @property {{ left: number, bottom: number } | null} head where the line is now
 * @property {Point | null} peak
 * @property {number | null} limit percent
 * @property {number} others percent, below the limit
 * @property {string} limitWords
 * @property {string[]} axis words from the bottom to the top
 * @property {Mark[]} incidents
 * @property {string} sentence
 * @property {string} caption of the state
 */

/** @typedef {{ first: number, times: number, left: number, width: number }} Place of a stretch of phases */
/** @typedef {{ left: number, width: number, from: number, to: number, ends: number }} Span a phase's own share of it, its time, and how much of it that time has filled */

const STATE_KEYS = /** @type {Readonly<Record<Run["state"], Key>>} */ (
  Object.freeze({ running: "run_running", done: "run_done", failed: "run_failed", interrupted: "run_interrupted" })
);
const PHASE_KEYS = /** @type {Readonly<Record<PhaseState, Key>>} */ (
  Object.freeze({ waiting: "phase_waiting", running: "phase_running", done: "phase_done", failed: "phase_failed", interrupted: "phase_interrupted" })
);
const INCIDENT_KEYS = /** @type {Readonly<Record<string, Key>>} */ (
  Object.freeze({
    retry: "incident_retry",
    tiles: "incident_tiles",
    smaller: "incident_smaller",
    kept: "incident_kept",
    gave_up: "incident_gave_up",
    refused: "incident_refused",
  })
);

/** How much of its bar a phase that counts no steps fills while it runs. */
const UNCOUNTED = 0.5;

/** @param {Run} run @returns {Chart} */
export function chartOf(run) {
  const plan = run.plan;
  const found = plan ? stretches(plan, null) : [];
  const places = placed(found.map(({ phase, first, times }) => ({ first, times, weight: widthOf(phase) })));
  const spans = spansOf(run, places);
  const peak = peakOf(run);
  const top = topOf(run, peak?.bytes ?? 0);
  /** @param {number} bytes */
  const high = (bytes) => rounded((100 * bytes) / top);
  const bars = found.map(({ phase }, i) => barOf(run, phase, /** @type {Place} */ (places[i]), high));
  const rows = found.map(({ phase, times, first }, i) => rowOf(run, phase, first, times, i, stateOf(run, first, times)));
  const { line, head, pointAt } = lineOf(run, spans, high);
  const total = plan?.total ?? null;
  return {
    bars,
    rows,
    line,
    head: run.state === "running" ? head : null,
    peak: peak && { ...pointAt(peak.at, peak.phase), bottom: high(peak.bytes), words: size(peak.bytes) },
    limit: total === null ? null : high(total),
    others: total === null ? 0 : high(Math.min(plan?.others ?? 0, total)),
    limitWords: total === null ? "" : size(total),
    axis: ["0", size(top / 2), size(top)],
    incidents: run.incidents.map((one) => ({ left: pointAt(one.at, null).left, kind: one.kind, words: incidentWords(one) })),
    sentence: sentenceOf(run),
    caption: t(STATE_KEYS[run.state]),
  };
}

/** @param {Answer | null} plan @returns {number | null} bytes of the highest phase, by its expected value */
export function predictedPeak(plan) {
  const peaks = (plan?.phases ?? []).flatMap((phase) => predictedOf(phase)?.expected ?? []);
  return peaks.length ? Math.max(...peaks) : null;
}

/** What a phase takes in all. @param {Phase} phase @returns {Estimate | null} */
export function predictedOf({ peak, needed, weights }) {
  if (peak) return peak;
  return needed && { expected: weights + needed.expected, lower: weights + needed.lower, upper: weights + needed.upper };
}

/** @param {{ first: number, times: number, weight: number }[]} stretches @returns {Place[]} */
function placed(stretches) {
  const all = stretches.reduce((sum, one) => sum + one.weight, 0);
  let left = 0;
  return stretches.map(({ first, times, weight }) => {
    const width = (1000 * weight) / all;
    const place = { first, times, left, width };
    left += width;
    return place;
  });
}

/** @param {Run} run @param {Place[]} places @returns {Map<number, Span>} by index of the phase; one that never ran has none */
function spansOf(run, places) {
  const begun = [...new Set(run.marks.flatMap(({ phase }) => phase ?? []))];
  /** @type {Map<number, { left: number, width: number }>} */
  const boxes = new Map();
  for (const { first, times, left, width } of places) {
    // phases alike share a bar in the order they ran in: which of two texts comes first is ComfyUI's affair
    const own = Array.from({ length: times }, (_, i) => first + i);
    const order = [...begun.filter((phase) => own.includes(phase)), ...own.filter((phase) => !begun.includes(phase))];
    for (const [i, phase] of order.entries()) boxes.set(phase, { left: left + (i * width) / times, width: width / times });
  }
  if (boxes.size === 0 && run.samples.length) boxes.set(-1, { left: 0, width: 1000 });
  /** @type {Map<number, Span>} */
  const spans = new Map();
  if (!run.plan) {
    const box = boxes.get(-1);
    if (box) spans.set(-1, { ...box, from: 0, to: Math.max(run.at, run.samples.at(-1)?.[0] ?? 0), ends: 1 });
    return spans;
  }
  for (const [i, mark] of run.marks.entries()) {
    const box = mark.phase === null ? undefined : boxes.get(mark.phase);
    if (mark.phase === null || !box) continue;
    const to = run.marks[i + 1]?.from ?? run.at;
    const isLast = run.state === "running" && run.marks[i + 1] === undefined;
    const steps = mark.nodeId === null ? undefined : run.steps.get(mark.nodeId);
    const ends = isLast ? (steps ? steps.done / steps.total : UNCOUNTED) : 1;
    const before = spans.get(mark.phase);
    spans.set(mark.phase, { ...box, from: before?.from ?? mark.from, to, ends });
  }
  return spans;
}

/** Where the line is highest; where none was sampled, the highest of what was counted. @param {Run} run */
function peakOf(run) {
  /** @type {{ bytes: number, at: number | null, phase: number | null } | null} */
  let peak = null;
  for (const [at, bytes] of run.samples) if (bytes > (peak?.bytes ?? 0)) peak = { bytes, at, phase: null };
  if (peak) return peak;
  const most = highest(run.measured);
  return most && { bytes: most.bytes, at: null, phase: most.phase };
}

/**
 * What the run took at its most. Peaks that were counted leave out what the allocator keeps beside them, as predictions do: samples
 * stand in for them only until they are there.
 * @param {Run} run
 * @returns {{ bytes: number, atLeast: boolean } | null}
 */
export function measuredPeak(run) {
  const counted = highest(run.measured);
  const sampled = Math.max(0, ...run.samples.map(([, bytes]) => bytes));
  if (counted && (run.state !== "running" || counted.bytes >= sampled)) return counted;
  return sampled > 0 ? { bytes: sampled, atLeast: true } : null;
}

/** @param {Run["measured"]} measured */
function highest(measured) {
  return measured.reduce((/** @type {Run["measured"][number] | null} */ most, m) => (most && most.bytes >= m.bytes ? most : m), null);
}

/** @param {Run} run @param {number} peak bytes at the top of the drawing */
function topOf(run, peak) {
  const uppers = (run.plan?.phases ?? []).map((phase) => upperOf(phase) ?? 0);
  return 1.06 * Math.max(1, run.plan?.total ?? 0, peak, ...uppers);
}

/** @param {Phase} phase */
function upperOf(phase) {
  const predicted = predictedOf(phase);
  return predicted && Math.max(predicted.upper, phase.reservedPeak?.upper ?? 0);
}

/** @param {Run} run @param {Phase} phase @param {Place} place @param {(bytes: number) => number} high @returns {Bar} */
function barOf(run, phase, { first, times, left, width }, high) {
  const predicted = predictedOf(phase);
  const upper = upperOf(phase);
  const weights = predicted ? Math.min(phase.weights, predicted.expected) : null;
  const measured = measuredOf(run, first, times);
  return {
    left: rounded(left),
    width: rounded(width),
    kind: phase.kind,
    weights: weights === null ? null : high(weights),
    work: predicted && weights !== null ? high(predicted.expected - weights) : 0,
    upper: upper === null ? null : high(upper),
    measured: measured && high(measured.bytes),
    short: phase.short > 0,
    state: stateOf(run, first, times),
  };
}

/** @param {Run} run @param {number} first @param {number} times the highest of the stretch */
function measuredOf(run, first, times) {
  return highest(run.measured.filter((m) => m.phase !== null && m.phase >= first && m.phase < first + times));
}

/** @param {Run} run @param {number} first @param {number} times @returns {PhaseState} */
function stateOf(run, first, times) {
  const own = run.marks.filter((m) => m.phase !== null && m.phase >= first && m.phase < first + times);
  const last = run.marks.at(-1);
  const isLast = last !== undefined && own.includes(last);
  if (own.length === 0) return measuredOf(run, first, times) || run.state === "done" ? "done" : "waiting";
  if (!isLast || run.state === "done") return "done";
  // its node has ended, and one that computes nothing runs
  const left = run.state === "running" && run.phase === null && run.measured.some((m) => m.phase === last.phase);
  return left ? "done" : run.state;
}

/** @param {Run} run @param {Phase} phase @param {number} first @param {number} times @param {number} at @param {PhaseState} state @returns {PhaseRow} */
function rowOf(run, phase, first, times, at, state) {
  const predicted = predictedOf(phase);
  const measured = measuredOf(run, first, times);
  const steps = phase.nodeIds.map((id) => run.steps.get(id)).find((s) => s !== undefined);
  const counted = state !== "waiting" && state !== "done" && steps ? t("phase_steps", steps) : t(PHASE_KEYS[state]);
  const figures = [
    predicted ? t("phase_predicted", { size: size(predicted.expected) }) : t("phase_unknown"),
    measured ? t("phase_measured", { size: measuredWords(measured) }) : "",
  ];
  const peak = run.plan?.peakPhase ?? -1;
  const isPeak = predicted !== null && peak >= first && peak < first + times;
  const notes = [
    isPeak ? t("phase_peak") : "",
    phase.short > 0 ? t("phase_short", { size: size(phase.short) }) : "",
    phase.streamed > 0 ? t("phase_streams", { size: size(phase.streamed) }) : "",
  ];
  const title = times > 1 ? t("phase_times", { title: phase.title, n: times }) : phase.title;
  return { title: `${at + 1} ${title}`, state: counted, at: state, figures: figures.filter(Boolean).join(", "), notes: notes.filter(Boolean), ...termsOf(phase) };
}

/** What the figure of a phase is made of. @param {Phase} phase @returns {Pick<PhaseRow, "terms" | "bounds">} */
function termsOf(phase) {
  const predicted = predictedOf(phase);
  if (!predicted) return { terms: [], bounds: [t("phase_unknown")] };
  const own = [...phase.terms].sort((a, b) => b.bytes - a.bytes);
  const terms = [
    { name: t("term_weights"), bytes: phase.weights - phase.otherWeights },
    { name: t("term_other_models"), bytes: phase.otherWeights },
    ...own,
    { name: t("term_sum"), bytes: predicted.expected },
  ];
  const bounds = [t("term_band", { lower: size(predicted.lower), upper: size(predicted.upper) })];
  if (phase.available !== null) bounds.push(t("term_available", { size: size(phase.available) }));
  return { terms: terms.filter((term) => term.bytes > 0).map(({ name, bytes }) => ({ name, size: size(bytes) })), bounds };
}

/**
 * The measured line, phase by phase: time runs through each bar from its left to its right, however long it took.
 * @param {Run} run
 * @param {Map<number, Span>} spans
 * @param {(bytes: number) => number} high
 */
function lineOf(run, spans, high) {
  const ordered = [...spans.values()].sort((a, b) => a.from - b.from);
  /** @param {Span} span @param {number} at */
  const across = (span, at) => {
    const share = span.to > span.from ? Math.min(1, Math.max(0, (at - span.from) / (span.to - span.from))) : 1;
    return span.left + span.width * span.ends * share;
  };
  /** @type {string[]} */
  const path = [];
  let head = /** @type {{ left: number, bottom: number } | null} */ (null);
  let end = -1;
  for (const span of ordered) {
    const inside = run.samples.filter(([at]) => at >= span.from && at <= span.to);
    const before = run.samples.filter(([at]) => at < span.from).at(-1);
    const points = before ? [/** @type {const} */ ([span.from, before[1]]), ...inside] : inside;
    for (const [i, [at, bytes]] of points.entries()) {
      const [x, y] = [rounded(across(span, at)), high(bytes)];
      const joins = i > 0 || (end >= 0 && Math.abs(span.left - end) < 1);
      path.push(`${joins ? "L" : "M"}${x} ${rounded(100 - y)}`);
      head = { left: rounded(x / 10), bottom: y };
    }
    if (points.length) end = span.left + span.width;
  }
  /** @param {number | null} at seconds @param {number | null} phase */
  const pointAt = (at, phase) => {
    const own = phase === null ? undefined : spans.get(phase);
    if (own) return { left: rounded((own.left + (own.width * own.ends) / 2) / 10) };
    const moment = at ?? 0;
    const span = ordered.find((s) => moment >= s.from && moment <= s.to) ?? [...ordered].reverse().find((s) => s.from <= moment) ?? ordered[0];
    return { left: span ? rounded(across(span, moment) / 10) : 0 };
  };
  return { line: path.join(""), head, pointAt };
}

/** @param {Run} run */
function sentenceOf(run) {
  const [predicted, measured] = [predictedPeak(run.plan), measuredPeak(run)];
  const told = { predicted: predicted === null ? "" : size(predicted), measured: measured === null ? "" : measuredWords(measured) };
  if (predicted !== null && measured !== null) return t(run.state === "running" ? "run_sentence" : "run_sentence_last", told);
  if (measured !== null) return t("run_measured", told);
  return predicted !== null ? t("run_predicted", told) : "";
}

/** @param {{ bytes: number, atLeast: boolean }} measured */
export function measuredWords({ bytes, atLeast }) {
  return atLeast ? t("measured_at_least", { size: size(bytes) }) : size(bytes);
}

/** @param {Incident} incident */
export function incidentWords({ kind, at, nodeId, message, samePicture, file }) {
  const key = INCIDENT_KEYS[kind];
  const sentence = /[.!?]$/.test(message) ? message : `${message}.`;
  const line = t("incident_line", { kind: key ? t(key) : kind, seconds: Math.round(at), node: nodeId || "?", message: sentence });
  return [line, samePicture ? "" : t("incident_other_picture"), file && !message.includes(file) ? t("incident_file", { file }) : ""].filter(Boolean).join(" ");
}

/** @param {number} value */
function rounded(value) {
  return Math.round(value * 100) / 100;
}
