// What is known of the graph on the canvas, brought together for its badges: its plan, its own run if it has one, and what is loaded.

import { graphKey } from "./content.js";
import { GraphPlans } from "./graph_plans.js";
import { isQuiet, NodeBadges } from "./node_badges.js";
import { Pace } from "./pace.js";

/**
 * @import { Answer } from "./answers.js"
 * @import { GraphPlan } from "./graph_plans.js"
 * @import { Run } from "./run.js"
 * @import { Status } from "./status.js"
 *
 * @typedef {object} Outside
 * @property {ComfyApp} app
 * @property {() => NodeBadgeClass | undefined} badgeClass
 * @property {(state: { rev: number }) => { rev: number }} follow
 * @property {(body: string, signal: AbortSignal) => Promise<Response>} check
 * @property {(wanted: boolean) => void} watch events of a run of this page
 */

/** Prompts of this page whose graphs are remembered; a longer queue's oldest get no measured badges. */
const MOST = 32;

/** How long the last news of a run may take after ComfyUI has said that it has ended. */
const LAST_NEWS_MS = 3000;

export class CanvasBadges {
  #outside;
  #nodes;
  #plans;
  #pace = new Pace(() => this.#draw());
  #on = false;
  /** @type {GraphPlan | null} */
  #plan = null;
  /** @type {Run | null} */
  #run = null;
  /** @type {Status | null} */
  #status = null;
  /** @type {Map<string, string>} key of the graph by id of the prompt */
  #keys = new Map();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #ending;

  /** @param {Outside} outside */
  constructor(outside) {
    this.#outside = outside;
    this.#nodes = new NodeBadges(outside.app, outside.badgeClass, outside.follow);
    this.#plans = new GraphPlans({
      prompt: () => outside.app.graphToPrompt(),
      isQuiet: () => isQuiet(outside.app),
      check: outside.check,
      found: (plan) => this.#found(plan),
    });
  }

  /** @param {boolean} on */
  switch(on) {
    this.#on = on;
    this.#nodes.switch(on);
    this.#plans.switch(on);
    if (on) return;
    this.#pace.stop();
    this.#plan = null;
    this.ended();
  }

  /** @param {boolean} hidden */
  setHidden(hidden) {
    this.#plans.setHidden(hidden);
    this.#pace.setHidden(hidden);
  }

  /** @param {GraphNode} node */
  created(node) {
    this.#nodes.created(node);
  }

  changed() {
    this.#plans.changed();
  }

  /** The nodes of the canvas were made anew, perhaps from the same graph: an undone move does that, and asks for no other plan. */
  madeAnew() {
    this.changed();
    if (this.#on && this.#plan) this.#pace.request();
  }

  /** @param {Status | null} status */
  showStatus(status) {
    const moved = placesIn(status) !== placesIn(this.#status);
    this.#status = status;
    if (moved && this.#on && this.#plan) this.#pace.request();
  }

  /** @param {Run | null} run */
  showRun(run) {
    const ends = run !== null && run.state !== "running" && this.#run?.state === "running" && this.#run.id === run.id;
    this.#run = run;
    if (!this.#on) return;
    this.#pace.request();
    if (!ends) return;
    this.ended();
    this.#plans.worldChanged();
  }

  /** @param {{ id: string, output: unknown, answer: Answer | null }} posted */
  posted({ id, output, answer }) {
    if (!this.#on) return;
    const key = graphKey(output);
    this.#keys.set(id, key);
    for (const old of [...this.#keys.keys()].slice(0, -MOST)) this.#keys.delete(old);
    if (answer) this.#found({ key, answer });
  }

  /** A prompt of this page runs. @param {string} id */
  started(id) {
    if (!this.#on) return;
    clearTimeout(this.#ending);
    // posted while the check was off: then it was the canvas as it is, unless a person was quicker
    if (this.#plan && !this.#keys.has(id)) this.#keys.set(id, this.#plan.key);
    this.#outside.watch(true);
  }

  /** @param {boolean} [soon] the last news of it may still come */
  ended(soon = false) {
    clearTimeout(this.#ending);
    if (soon) this.#ending = setTimeout(() => this.#outside.watch(false), LAST_NEWS_MS);
    else this.#outside.watch(false);
  }

  /** @param {GraphPlan} plan */
  #found(plan) {
    this.#plan = plan;
    this.#pace.request();
  }

  #draw() {
    if (!this.#on) return;
    const own = this.#run !== null && this.#plan !== null && this.#keys.get(this.#run.id) === this.#plan.key;
    this.#nodes.show({ plan: this.#plan?.answer ?? null, run: own ? this.#run : null, status: this.#status });
  }
}

/** Where models are: a status that differs in nothing else changes no badge. @param {Status | null} status */
function placesIn(status) {
  const ours = status?.pipelines.flatMap((pipeline) => pipeline.components) ?? [];
  const places = [...ours.map((one) => [one.nodeId, one.bytes, one.bytesOnCard]), ...(status?.models ?? []).map((one) => [one.file, one.bytes, one.bytesOnCard])];
  return places.join();
}
