// Asks the server how full the card is: every few seconds, sooner when something happens, never when nobody looks.

import { jsonOf } from "./fields.js";
import { readStatus } from "./status.js";
import { t } from "./strings.js";

/**
 * @import { Status } from "./status.js"
 *
 * @typedef {"loading" | "ok" | "no_gpu" | "error" | "disconnected"} ClientState
 *
 * @typedef {object} Snapshot
 * @property {ClientState} state
 * @property {Status | null} status the last good answer, also while the state is error or disconnected
 * @property {string} reason why the state is error or disconnected, else ""
 */

export const POLL_SECONDS = 3;
/** Between two updates, however many events arrive: twice as many cost twice the main thread (docs/idle-cost.md). */
export const SPACING_MS = 1500;
export const TIMEOUT_MS = 5000;

export class StatusClient {
  /** @type {Snapshot} */
  snapshot = { state: "loading", status: null, reason: "" };
  pollSeconds = POLL_SECONDS;

  #running = false;
  #hidden = false;
  #lastAsked = -Infinity;
  #againAfterwards = false;
  /** @type {AbortController | null} */
  #inFlight = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  #fetch;
  #onChange;

  /**
   * @param {(signal: AbortSignal) => Promise<Response>} fetchStatus
   * @param {(snapshot: Snapshot) => void} onChange called with every answer and every change of state
   */
  constructor(fetchStatus, onChange) {
    this.#fetch = fetchStatus;
    this.#onChange = onChange;
  }

  /** @param {boolean} hidden whether the page is out of sight */
  start(hidden) {
    if (this.#running) return;
    this.#running = true;
    this.#hidden = hidden;
    this.refresh();
  }

  stop() {
    this.#running = false;
    clearTimeout(this.#timer);
    this.#inFlight?.abort();
    this.#inFlight = null;
    this.#againAfterwards = false;
  }

  /** @param {boolean} hidden */
  setHidden(hidden) {
    this.#hidden = hidden;
    if (hidden) clearTimeout(this.#timer);
    else this.refresh();
  }

  /** Something happened that may have moved memory. */
  refresh() {
    if (!this.#running || this.#hidden) return;
    if (this.#inFlight) this.#againAfterwards = true;
    else this.#schedule(0);
  }

  /** The server has sent a reading by itself: the next question can wait. @param {unknown} json */
  receive(json) {
    if (!this.#running || this.#hidden) return;
    try {
      this.#publish(read(json));
    } catch {
      return; // what was pushed and can't be read is asked for
    }
    if (!this.#inFlight) this.#schedule(1000 * this.pollSeconds);
  }

  /** The host's own connection dropped: said at once, without waiting for a request to fail. */
  connectionLost() {
    if (this.#running) this.#publish({ ...this.snapshot, state: "disconnected", reason: t("no_answer") });
  }

  /** @param {number} delay */
  #schedule(delay) {
    clearTimeout(this.#timer);
    if (!this.#running || this.#hidden) return;
    // Clamped from above too: a clock set back must not silence the bar.
    const spacing = Math.min(SPACING_MS, 1000 * this.pollSeconds);
    const rest = Math.min(spacing, this.#lastAsked + spacing - Date.now());
    this.#timer = setTimeout(() => void this.#ask(), Math.max(0, delay, rest));
  }

  async #ask() {
    const controller = new AbortController();
    this.#inFlight = controller;
    this.#lastAsked = Date.now();
    this.#againAfterwards = false;
    let timedOut = false;
    const timeout = setTimeout(() => {
      timedOut = true;
      controller.abort();
    }, TIMEOUT_MS);
    /** @type {Snapshot} */
    let next;
    try {
      next = await untilAborted(controller.signal, this.#read(controller.signal));
    } catch (error) {
      next = { ...this.snapshot, ...failure(error, timedOut) };
    } finally {
      clearTimeout(timeout);
    }
    if (this.#inFlight !== controller) return; // stopped, and perhaps started again, meanwhile
    this.#inFlight = null;
    this.#publish(next);
    this.#schedule(this.#againAfterwards ? 0 : 1000 * this.pollSeconds);
  }

  /** @param {AbortSignal} signal */
  async #read(signal) {
    return read(await jsonOf(await this.#fetch(signal)));
  }

  /** @param {Snapshot} snapshot */
  #publish(snapshot) {
    if (isOlder(snapshot.status, this.snapshot.status)) snapshot = { ...snapshot, status: this.snapshot.status };
    this.snapshot = snapshot;
    this.#onChange(snapshot);
  }
}

/** An answer may be overtaken by an event. Far older is the clock of a server that was started anew. @param {Status | null} one @param {Status | null} other */
function isOlder(one, other) {
  const by = (other?.takenAt ?? 0) - (one?.takenAt ?? 0);
  return typeof one?.takenAt === "number" && by > 0 && by < TIMEOUT_MS / 1000;
}

/** @param {unknown} json @returns {Snapshot} */
function read(json) {
  const status = readStatus(json);
  return { state: status.devices.length ? "ok" : "no_gpu", status, reason: "" };
}

/**
 * @param {unknown} error
 * @param {boolean} timedOut
 * @returns {{ state: "error" | "disconnected", reason: string }}
 */
function failure(error, timedOut) {
  if (timedOut) return { state: "error", reason: t("no_answer_within", { seconds: TIMEOUT_MS / 1000 }) };
  // fetch reports every kind of lost connection as a TypeError.
  if (error instanceof TypeError) return { state: "disconnected", reason: t("no_answer") };
  return { state: "error", reason: error instanceof Error ? error.message : String(error) };
}

/**
 * The promise, or a rejection as soon as the signal fires: a fetch in between may not pass the signal on.
 * @template T
 * @param {AbortSignal} signal
 * @param {Promise<T>} promise
 * @returns {Promise<T>}
 */
export function untilAborted(signal, promise) {
  return new Promise((resolve, reject) => {
    const abort = () => reject(signal.reason);
    if (signal.aborted) abort();
    signal.addEventListener("abort", abort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
  });
}
