// The run that is going on, or the last one: put together from the server's events, or from its report for a page that opens late.

import { readAnswer } from "./answers.js";
import { isObject, numberOrNull, objects, oneOf, text } from "./fields.js";

/**
 * @import { Answer } from "./answers.js"
 *
 * @typedef {"running" | "done" | "failed" | "interrupted"} RunState
 * @typedef {{ phase: number | null, nodeId: string | null, from: number }} Mark from when on this was computing, in seconds since the start
 * @typedef {[seconds: number, bytes: number]} Sample
 * @typedef {{ phase: number | null, nodeId: string, bytes: number, atLeast: boolean }} Measured `atLeast`: the true peak may have been higher
 * @typedef {{ kind: string, nodeId: string, at: number, samePicture: boolean, file: string, message: string }} Incident
 *
 * @typedef {object} Run
 * @property {string} id of the prompt
 * @property {RunState} state
 * @property {Answer | null} plan null where it could not be planned
 * @property {number | null} phase that computes right now; null between two of them and at the end
 * @property {number} at seconds since the start, of the last news
 * @property {Mark[]} marks in order
 * @property {Sample[]} samples in order
 * @property {Measured[]} measured
 * @property {Incident[]} incidents
 * @property {ReadonlyMap<string, { done: number, total: number }>} steps by node
 */

/** Samples kept: twice what the server's report holds, and more than a chart has pixels. */
const MOST_SAMPLES = 1200;

const STATES = ["running", "done", "failed", "interrupted"];

export class Runs {
  /** @type {Run | null} */
  run = null;
  /** @type {Run | null} shown before it: what is told of it late must not make the newer one forget what it knows */
  #other = null;
  /** @type {Map<string, { done: number, total: number }>} of the prompt that runs, known before its plan comes */
  #steps = new Map();
  #stepsOf = "";

  /** @param {unknown} detail of vram_headroom.plan @returns {boolean} whether anything changed, as for all of these */
  plan(detail) {
    if (!isObject(detail)) return false;
    const id = text(detail.prompt_id, "");
    if (!id) return false;
    const plan = planOf(detail.plan);
    this.#show({ ...this.#of(id), plan });
    return true;
  }

  /** @param {unknown} detail of vram_headroom.phase */
  phase(detail) {
    if (!isObject(detail)) return false;
    const id = text(detail.prompt_id, "");
    if (!id) return false;
    const run = this.#of(id);
    const at = numberOrNull(detail.at) ?? run.at;
    const state = /** @type {RunState} */ (oneOf(detail.state, STATES, "running"));
    const mark = { phase: numberOrNull(detail.phase), nodeId: typeof detail.node_id === "string" ? detail.node_id : null, from: at };
    // a server that marks phases itself knows of those too that are over between two events
    const marks = Array.isArray(detail.marks) ? objects(detail.marks).map(markOf) : withMark(run.marks, mark);
    this.#show({
      ...run,
      state,
      phase: mark.phase,
      at,
      marks,
      samples: joined(run.samples, samples(detail.samples)),
      measured: Array.isArray(detail.measured) ? objects(detail.measured).map(measured) : run.measured,
    });
    return true;
  }

  /** @param {unknown} detail of vram_headroom.recovery */
  recovery(detail) {
    if (!isObject(detail)) return false;
    const id = text(detail.prompt_id, "");
    const [run, now] = [this.#of(id), incident(detail)];
    // a report that has it may have come before its event
    if (run.incidents.some((one) => one.at === now.at && one.kind === now.kind && one.message === now.message)) return false;
    this.#show({ ...run, incidents: [...run.incidents, now] });
    return true;
  }

  /** @param {unknown} detail of ComfyUI's own `progress` */
  progress(detail) {
    if (!isObject(detail)) return false;
    const [id, node] = [text(detail.prompt_id, this.run?.id ?? ""), detail.node === undefined ? "" : String(detail.node)];
    const [done, total] = [numberOrNull(detail.value), numberOrNull(detail.max)];
    if (!node || done === null || total === null || total <= 0) return false;
    if (this.#stepsOf !== id) this.#steps.clear();
    this.#stepsOf = id;
    this.#steps.set(node, { done, total });
    if (this.run?.id !== id) return false;
    this.run = { ...this.run, steps: new Map(this.#steps) };
    return true;
  }

  /** @param {unknown} json the RunReport of the server; null: nothing has run since it started */
  report(json) {
    if (!isObject(json)) return false;
    const id = text(json.prompt_id, "");
    const at = numberOrNull(json.at) ?? 0;
    const known = this.#known(id);
    // events that came meanwhile know more, and what was followed is known better than a report tells it
    if (!id || (known && (known.at > at || (known.at === at && known.samples.length > 0)))) return false;
    const state = /** @type {RunState} */ (oneOf(json.state, STATES, "running"));
    const now = { phase: numberOrNull(json.phase), nodeId: typeof json.node_id === "string" ? json.node_id : null, from: at };
    const marks = objects(json.marks).map(markOf);
    const told = objects(json.recoveries).map(incident);
    this.#show({
      ...this.#fresh(id),
      state,
      plan: planOf(json.plan),
      phase: now.phase,
      at,
      marks: marks.length ? marks : known?.marks.length ? known.marks : state === "running" ? [now] : [],
      samples: joined([], samples(json.samples)),
      measured: objects(json.measured).map(measured),
      // both are the same list in the same order: one may have been made before the last recovery
      incidents: known && known.incidents.length > told.length ? known.incidents : told,
    });
    return true;
  }

  /** @param {string} id @returns {Run | null} */
  #known(id) {
    return [this.run, this.#other].find((one) => one?.id === id) ?? null;
  }

  /** @param {string} id @returns {Run} */
  #of(id) {
    return this.#known(id) ?? this.#fresh(id);
  }

  /** @param {Run} run */
  #show(run) {
    if (this.run?.id !== run.id) this.#other = this.run;
    this.run = run;
  }

  /** @param {string} id @returns {Run} */
  #fresh(id) {
    const steps = this.#stepsOf === id ? new Map(this.#steps) : new Map();
    return { id, state: "running", plan: null, phase: null, at: 0, marks: [], samples: [], measured: [], incidents: [], steps };
  }
}

/** @param {unknown} json @returns {Answer | null} */
function planOf(json) {
  try {
    return isObject(json) ? readAnswer(json) : null;
  } catch {
    return null;
  }
}

/** @param {Record<string, unknown>} m @returns {Mark} */
function markOf(m) {
  return { phase: numberOrNull(m.phase), nodeId: typeof m.node_id === "string" ? m.node_id : null, from: numberOrNull(m.at) ?? 0 };
}

/** @param {Mark[]} marks @param {Mark} mark @returns {Mark[]} */
function withMark(marks, mark) {
  const last = marks.at(-1);
  if (mark.nodeId === null) return marks;
  return last && last.phase === mark.phase && last.nodeId === mark.nodeId ? marks : [...marks, mark];
}

/** @param {Sample[]} before @param {Sample[]} more @returns {Sample[]} every other one left out when there are too many */
function joined(before, more) {
  const last = before.at(-1)?.[0] ?? -Infinity;
  const all = more.length ? [...before, ...more.filter(([at]) => at > last)] : before;
  return all.length <= MOST_SAMPLES ? all : all.filter((_, i) => i % 2 === 0 || i === all.length - 1);
}

/** @param {unknown} json @returns {Sample[]} */
function samples(json) {
  if (!Array.isArray(json)) return [];
  return json.filter((s) => Array.isArray(s) && numberOrNull(s[0]) !== null && numberOrNull(s[1]) !== null).map(([at, bytes]) => [at, bytes]);
}

/** @param {Record<string, unknown>} m @returns {Measured} */
function measured(m) {
  return {
    phase: numberOrNull(m.phase),
    nodeId: text(m.node_id, ""),
    bytes: numberOrNull(m.peak_bytes) ?? 0,
    atLeast: m.lower_bound === true,
  };
}

/** @param {Record<string, unknown>} r @returns {Incident} */
function incident(r) {
  return {
    kind: text(r.kind, ""),
    nodeId: text(r.node_id, ""),
    at: numberOrNull(r.at) ?? 0,
    samePicture: r.same_picture !== false,
    file: text(r.file, ""),
    message: text(r.message, ""),
  };
}
