// Tells the server that somebody looks, so that it sends events: a heartbeat while the panel is on screen or badges follow a run.

import { jsonOf, object } from "./fields.js";

/** The server forgets who has not been heard of for three times as long (nodes/events.py). */
export const BEAT_MS = 10_000;

/** @typedef {"panel" | "badges"} Looker */

export class Watch {
  #post;
  #onAnswer;
  /** @type {Set<Looker>} */
  #lookers = new Set();
  #hidden = false;
  #told = false;
  /** @type {ReturnType<typeof setInterval> | undefined} */
  #timer;

  /**
   * @param {(watching: boolean) => Promise<Response>} post
   * @param {(status: unknown, run: unknown) => void} onAnswer what has happened so far
   */
  constructor(post, onAnswer) {
    this.#post = post;
    this.#onAnswer = onAnswer;
  }

  get isOn() {
    return this.#timer !== undefined;
  }

  /** @param {Looker} looker @param {boolean} looks */
  want(looker, looks) {
    if (looks === this.#lookers.has(looker)) return;
    if (looks) this.#lookers.add(looker);
    else this.#lookers.delete(looker);
    // one more looker sees what the others have seen only if it asks
    if (looks && this.isOn) void this.#beat();
    this.#follow();
  }

  /** @param {boolean} hidden */
  setHidden(hidden) {
    this.#hidden = hidden;
    this.#follow();
  }

  /** The server has forgotten everybody when it comes back. */
  reconnected() {
    if (this.isOn) void this.#beat();
  }

  #follow() {
    const on = this.#lookers.size > 0 && !this.#hidden;
    if (on === this.isOn) return;
    clearInterval(this.#timer);
    this.#timer = on ? setInterval(() => void this.#beat(), BEAT_MS) : undefined;
    if (on) void this.#beat();
    else if (this.#told) void this.#end();
  }

  async #beat() {
    try {
      const body = object(await jsonOf(await this.#post(true)), "the answer");
      this.#told = true;
      if (this.isOn) this.#onAnswer(body.status, body.run);
      else void this.#end();
    } catch {
      // without events the panel polls
    }
  }

  async #end() {
    this.#told = false;
    try {
      await this.#post(false);
    } catch {
      // it will be forgotten
    }
  }
}
