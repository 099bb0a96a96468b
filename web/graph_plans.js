// The plan of the graph on the canvas, asked for a moment after it has changed: never while the tab is hidden, never twice for the same.

import { readAnswer } from "./answers.js";
import { contentKey, graphKey } from "./content.js";
import { jsonOf } from "./fields.js";

/** @import { Answer } from "./answers.js" */

/** A person who types or drags is waited for. */
export const REST_MS = 800;
const PATIENCE_MS = 5000;

/** @typedef {{ key: string, answer: Answer | null }} GraphPlan `key` names the graph whatever its seeds and texts; no answer where it can't be planned */

/**
 * @typedef {object} Parts
 * @property {() => Promise<{ output: unknown }>} prompt of the canvas
 * @property {() => boolean} isQuiet whether reading it has no effect: some widgets upload what they show when they are read
 * @property {(body: string, signal: AbortSignal) => Promise<Response>} check
 * @property {(plan: GraphPlan) => void} found
 */

export class GraphPlans {
  #parts;
  #on = false;
  #hidden = false;
  #wanted = false;
  #content = "";
  /** @type {AbortController | null} */
  #inFlight = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;

  /** @param {Parts} parts */
  constructor(parts) {
    this.#parts = parts;
  }

  /** @param {boolean} on */
  switch(on) {
    if (on === this.#on) return;
    this.#on = on;
    this.#content = "";
    if (on) this.changed();
    else this.#stop();
  }

  /** The graph has changed, or may have. */
  changed() {
    if (!this.#on) return;
    this.#wanted = true;
    if (this.#hidden) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.#ask(), REST_MS);
  }

  /** What is loaded or cached has changed, and with it the plan of the same graph. */
  worldChanged() {
    this.#content = "";
    this.changed();
  }

  /** @param {boolean} hidden */
  setHidden(hidden) {
    this.#hidden = hidden;
    if (hidden) this.#stop();
    else if (this.#wanted) this.changed();
  }

  #stop() {
    clearTimeout(this.#timer);
    this.#inFlight?.abort();
  }

  async #ask() {
    if (!this.#parts.isQuiet()) return;
    this.#inFlight?.abort();
    const controller = new AbortController();
    this.#inFlight = controller;
    const timeout = setTimeout(() => controller.abort(), PATIENCE_MS);
    try {
      const { output } = await this.#parts.prompt();
      const content = contentKey(output);
      if (content === this.#content || controller.signal.aborted) return;
      const key = graphKey(output);
      const answer = await this.#read(JSON.stringify({ prompt: output, fixes: false, asked_for: "badges" }), controller.signal);
      if (controller.signal.aborted) return;
      this.#content = content;
      this.#parts.found({ key, answer });
    } catch {
      // nothing is known of this graph: its badges say nothing, and the next change asks again
    } finally {
      clearTimeout(timeout);
      if (this.#inFlight === controller) {
        this.#inFlight = null;
        this.#wanted = controller.signal.aborted && this.#hidden;
      }
    }
  }

  /** @param {string} body @param {AbortSignal} signal @returns {Promise<Answer | null>} */
  async #read(body, signal) {
    const response = await this.#parts.check(body, signal);
    // 400: a graph that is not finished yet, which is no error of anybody
    return response.status === 400 ? null : readAnswer(await jsonOf(response));
  }
}
