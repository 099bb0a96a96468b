// Asks the server before a prompt is queued, and the person only when it does not fit. Whatever goes wrong here, the prompt is queued.

import { jsonOf, readAnswer } from "./answers.js";
import { contentKey } from "./content.js";
import { untilAborted } from "./status_client.js";

/**
 * @import { Answer } from "./answers.js"
 *
 * @typedef {"run" | "cancel"} Decision
 * @typedef {Decision | "insist"} Outcome `insist`: run although it does not fit, because a person said so
 * @typedef {{ severity: "info" | "warn", summary: string, detail: string }} Toast
 * @typedef {(...args: any[]) => any} Queue
 * @typedef {{ queuePrompt: Queue }} Queueing
 *
 * @typedef {object} Parts what the pre-flight check needs from the page
 * @property {Queueing} api
 * @property {Queueing} app
 * @property {(body: string, signal: AbortSignal) => Promise<Response>} check
 * @property {(answer: Answer) => Promise<Decision>} question
 * @property {(toast: Toast) => void} toast
 * @property {() => boolean} enforces whether the server refuses what does not fit
 * @property {(body: string, signal: AbortSignal) => Promise<unknown>} allow tells the server to let this prompt through once
 * @property {() => boolean} autoQueueIsOn asked only where the front end does not say who pressed Run
 * @property {() => unknown} cancelled what api.queuePrompt does for a cancelled prompt: returns or throws silently
 * @property {(note: string) => void} onChecked
 */

/** The check may delay a prompt by this much and no more. */
export const PATIENCE_MS = 1500;

/** One press of Run with everything that is queued before it is through: its answers are shared. */
class Batch {
  open = 0;
  auto = false;
  /** @type {Map<string, Promise<Outcome>>} by content */
  decisions = new Map();
  /** @type {Map<string, Promise<Decision>>} by sentence: the same question is not asked again for another text prompt */
  questions = new Map();
}

export class Preflight {
  #parts;
  /** @type {Batch | null} */
  #batch = null;
  /** @type {{ target: Queueing, raw: Queue, mine: Queue, own: boolean }[]} */
  #wrapped = [];
  #on = false;
  #lastToast = "";

  /** @param {Parts} parts */
  constructor(parts) {
    this.#parts = parts;
  }

  install() {
    if (this.#on) return;
    this.#on = true;
    if (this.#wrapped.length) return; // left below another pack's wrapper by an earlier remove()
    this.#wrap(this.#parts.api, (raw) => async (number, data, ...rest) => {
      const outcome = this.#on ? await this.#decide(data, rest[0]) : "run";
      if (outcome === "cancel") return this.#cancelled();
      if (outcome === "insist" && this.#parts.enforces()) await this.#allow(data.output);
      try {
        return await raw(number, data, ...rest);
      } catch (error) {
        throw withoutOurFrames(error);
      }
    });
    this.#wrap(this.#parts.app, (raw) => (...args) => (this.#on ? this.#inBatch(raw, args) : raw(...args)));
  }

  /** Puts the host's own functions back, or, below another pack's wrapper, only passes through. */
  remove() {
    this.#on = false;
    const buried = this.#wrapped.some(({ target, mine }) => target.queuePrompt !== mine);
    if (buried) return;
    for (const { target, raw, own } of this.#wrapped) {
      if (own) target.queuePrompt = raw;
      else Reflect.deleteProperty(target, "queuePrompt");
    }
    this.#wrapped = [];
  }

  /**
   * @param {Queueing} target
   * @param {(raw: Queue) => Queue} wrapper
   */
  #wrap(target, wrapper) {
    const raw = target.queuePrompt;
    const own = Object.hasOwn(target, "queuePrompt");
    // Always with its own object as `this`: packs above may call us with another.
    const mine = wrapper((...args) => raw.call(target, ...args));
    this.#wrapped.push({ target, raw, mine, own });
    target.queuePrompt = mine;
  }

  /** Only notes which prompts belong together and who asked for them. @param {Queue} raw @param {any[]} args */
  #inBatch(raw, args) {
    const batch = (this.#batch ??= new Batch());
    batch.open += 1;
    batch.auto ||= this.#isAuto(args[2]);
    const leave = () => {
      batch.open -= 1;
      if (batch.open === 0 && this.#batch === batch) this.#batch = null;
    };
    let result;
    try {
      result = raw(...args);
    } catch (error) {
      leave();
      throw withoutOurFrames(error);
    }
    Promise.resolve(result).then(leave, leave);
    return result;
  }

  /** @param {any} options 1.58: an object with the intent; 1.27 and 1.35: nothing or a list of node ids */
  #isAuto(options) {
    const source = options?.intent?.trigger_source;
    return source ? source === "auto_queue" : this.#parts.autoQueueIsOn();
  }

  #cancelled() {
    try {
      return this.#parts.cancelled();
    } catch (error) {
      throw withoutOurFrames(error);
    }
  }

  /** If this fails the server refuses the prompt and ComfyUI shows why. @param {unknown} output */
  async #allow(output) {
    try {
      await withPatience((signal) => this.#parts.allow(JSON.stringify({ prompt: output }), signal));
    } catch (error) {
      this.#note(`not allowed: ${reasonOf(error)}`);
    }
  }

  /** @param {any} data @param {any} options @returns {Promise<Outcome>} */
  async #decide(data, options) {
    try {
      const targets = options?.partialExecutionTargets;
      const key = contentKey(data.output, targets);
      const batch = this.#batch ?? new Batch(); // another pack calls api.queuePrompt itself: a batch of one
      let decision = batch.decisions.get(key);
      if (!decision) {
        decision = this.#consider(batch, key, data.output, targets);
        batch.decisions.set(key, decision);
      }
      return await decision;
    } catch (error) {
      this.#note(`not checked: ${reasonOf(error)}`);
      return "run";
    }
  }

  /**
   * @param {Batch} batch
   * @param {string} key
   * @param {unknown} output
   * @param {unknown} targets
   * @returns {Promise<Outcome>}
   */
  async #consider(batch, key, output, targets) {
    const answer = await this.#ask(output, targets);
    this.#note(answer.verdict);
    const asks = answer.verdict === "does_not_fit" && !batch.auto;
    this.#toastOnce(asks ? null : toastFor(answer), key);
    if (!asks) return "run";
    return (await this.#question(batch, answer)) === "run" ? "insist" : "cancel";
  }

  /** @param {unknown} output @param {unknown} targets @returns {Promise<Answer>} */
  #ask(output, targets) {
    const body = JSON.stringify({ prompt: output, ...(targets ? { partial_execution_targets: targets } : {}) });
    return withPatience((signal) => this.#read(body, signal));
  }

  /** @param {string} body @param {AbortSignal} signal */
  async #read(body, signal) {
    return readAnswer(await jsonOf(await this.#parts.check(body, signal)));
  }

  /** @param {Batch} batch @param {Answer} answer @returns {Promise<Decision>} */
  #question(batch, answer) {
    let asked = batch.questions.get(answer.message);
    if (!asked) {
      asked = this.#parts.question(answer);
      batch.questions.set(answer.message, asked);
    }
    return asked;
  }

  /** Told later, so that whatever listens cannot hold up a prompt. @param {string} note */
  #note(note) {
    queueMicrotask(() => this.#parts.onChecked(note));
  }

  /** Once per content in a row: pressing Run again on the same graph says nothing new. @param {Toast | null} toast @param {string} key */
  #toastOnce(toast, key) {
    const said = toast ? `${toast.severity} ${key}` : "";
    if (toast && said !== this.#lastToast) this.#parts.toast(toast);
    this.#lastToast = said;
  }
}

/**
 * @template T
 * @param {(signal: AbortSignal) => Promise<T>} work
 * @returns {Promise<T>}
 */
async function withPatience(work) {
  const controller = new AbortController();
  const timeout = setTimeout(() => controller.abort(new Error(`no answer within ${PATIENCE_MS / 1000} s`)), PATIENCE_MS);
  try {
    return await untilAborted(controller.signal, work(controller.signal));
  } finally {
    clearTimeout(timeout);
  }
}

/** @param {Answer} answer @returns {Toast | null} */
function toastFor({ verdict, message }) {
  if (verdict === "fits_with_offload") return { severity: "info", summary: "Fits with offloading", detail: message };
  if (verdict === "does_not_fit") return { severity: "warn", summary: "Does not fit this card", detail: message };
  return null;
}

const OUR_FOLDER = new URL(".", import.meta.url).href;

/**
 * ComfyUI's error dialog blames every extension it finds in a stack; for what happens below us that would be wrong.
 * @param {unknown} error
 */
export function withoutOurFrames(error) {
  if (error instanceof Error && error.stack?.includes(OUR_FOLDER)) {
    const kept = error.stack.split("\n").filter((line) => !line.includes(OUR_FOLDER));
    error.stack = kept.join("\n");
  }
  return error;
}

/** @param {unknown} error */
function reasonOf(error) {
  return error instanceof Error ? error.message : String(error);
}
