// Asks the server before a prompt is queued, and the person only when it does not fit. Whatever goes wrong here, the prompt is queued.

import { readAnswer } from "./answers.js";
import { contentKey, graphKey } from "./content.js";
import { isObject, jsonOf } from "./fields.js";
import { untilAborted } from "./status_client.js";
import { t } from "./strings.js";

/**
 * @import { Answer } from "./answers.js"
 * @import { Applied } from "./canvas.js"
 *
 * @typedef {{ choice: "run" | "cancel" | "apply", remember: boolean, applied?: Applied }} Decision
 * @typedef {object} Ruling
 * @property {"run" | "insist" | "cancel" | "apply"} outcome `insist`: run although it does not fit, because a person said so
 * @property {Applied} [applied] what is queued instead
 * @property {Answer} [answer]
 *
 * @typedef {{ severity: "info" | "warn", summary: string, detail: string }} Toast
 * @typedef {(...args: any[]) => any} Queue
 * @typedef {{ queuePrompt: Queue }} Queueing
 * @typedef {{ id: string, output: any, answer: Answer | null, auto: boolean, batch: number }} Posted `batch`: the same for all that one press of Run queued
 *
 * @typedef {object} Parts what the pre-flight check needs from the page
 * @property {Queueing} api
 * @property {Queueing} app
 * @property {(body: string, signal: AbortSignal) => Promise<Response>} check
 * @property {(answer: Answer, prompt: any, refused: boolean) => Promise<Decision>} question
 * @property {(toast: Toast) => void} toast
 * @property {() => boolean} enforces whether the server refuses what does not fit
 * @property {(body: string, signal: AbortSignal) => Promise<unknown>} allow tells the server to let this prompt through once
 * @property {() => boolean} autoQueueIsOn asked only where the front end does not say who pressed Run
 * @property {() => unknown} cancelled what api.queuePrompt does for a cancelled prompt: returns or throws silently
 * @property {{ has: (graph: string) => boolean, set: (graph: string, wanted: boolean) => void }} remembered graphs not to be asked about
 * @property {(posted: Posted) => void} onPosted
 * @property {(note: string) => void} onChecked
 */

/** The check may delay a prompt by this much and no more. */
export const PATIENCE_MS = 1500;

/** A prompt that does not fit waits for its person anyway, so fixes may take longer to find. */
export const FIXES_PATIENCE_MS = 6000;

/** The server gives up on a search for fixes sooner, goes on with it, and has the answer when it is asked again. */
const BUSY = 503;

/** One press of Run with everything that is queued before it is through: its answers are shared. */
class Batch {
  static #count = 0;
  number = (Batch.#count += 1);
  open = 0;
  auto = false;
  /** @type {Map<string, Promise<Ruling>>} by content */
  rulings = new Map();
  /** @type {Map<string, Promise<Decision>>} by sentence: the same question is not asked again for another text prompt */
  questions = new Map();
  /** @type {(() => void)[]} called when all of it is queued */
  endings = [];

  end() {
    for (const ending of this.endings.splice(0)) ending();
  }
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
    this.#wrap(this.#parts.api, (raw) => (number, data, ...rest) => (this.#on ? this.#queue(raw, number, data, rest) : raw(number, data, ...rest)));
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
   * What the server says of a prompt, with what would make it fit.
   * @param {unknown} output
   * @param {unknown} [targets]
   * @returns {Promise<Answer>}
   */
  ask(output, targets) {
    return this.#ask(output, targets, true);
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
      if (batch.open > 0) return;
      if (this.#batch === batch) this.#batch = null;
      batch.end();
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

  /**
   * One prompt from the front end to the server.
   * @param {Queue} raw
   * @param {unknown} number
   * @param {any} data
   * @param {any[]} rest
   */
  async #queue(raw, number, data, rest) {
    const shared = this.#batch;
    const batch = shared ?? new Batch(); // another pack calls api.queuePrompt itself: a batch of one
    try {
      const ruling = await this.#rule(batch, data, rest[0]);
      try {
        return await this.#follow(ruling, batch, raw, number, data, rest);
      } catch (error) {
        const refused = batch.auto || ruling.outcome === "cancel" ? null : await this.#afterRefusal(error, batch, data, rest[0]);
        if (!refused) throw error;
        return await this.#follow(refused, batch, raw, number, data, rest);
      }
    } catch (error) {
      throw withoutOurFrames(error);
    } finally {
      if (!shared) batch.end();
    }
  }

  /** @param {Ruling} ruling @param {Batch} batch @param {Queue} raw @param {unknown} number @param {any} data @param {any[]} rest */
  async #follow(ruling, batch, raw, number, data, rest) {
    if (ruling.outcome === "cancel") return this.#parts.cancelled();
    const queued = ruling.applied ? { ...data, ...ruling.applied.queued } : data;
    if (ruling.outcome === "insist") await this.#allow(queued.output);
    const result = await raw(number, queued, ...rest);
    const id = result?.prompt_id;
    if (typeof id === "string" && queued?.output) {
      const { auto, number: press } = batch;
      // of a prompt with a fix nothing was said yet
      const answer = ruling.applied ? null : (ruling.answer ?? null);
      this.#parts.onPosted({ id, output: queued.output, answer, auto, batch: press });
    }
    return result;
  }

  /** If this fails a server that enforces refuses the prompt and ComfyUI shows why. @param {unknown} output */
  async #allow(output) {
    if (!this.#parts.enforces()) return;
    try {
      await withPatience(PATIENCE_MS, (signal) => this.#parts.allow(JSON.stringify({ prompt: output }), signal));
    } catch (error) {
      this.#note(t("check_not_allowed", { reason: reasonOf(error) }));
    }
  }

  /** @param {Batch} batch @param {any} data @param {any} options @returns {Promise<Ruling>} */
  async #rule(batch, data, options) {
    try {
      const targets = options?.partialExecutionTargets;
      const key = contentKey(data.output, targets);
      let ruling = batch.rulings.get(key);
      if (!ruling) {
        ruling = this.#consider(batch, key, data.output, targets);
        batch.rulings.set(key, ruling);
      }
      return await ruling;
    } catch (error) {
      this.#note(t("check_not_made", { reason: reasonOf(error) }));
      return { outcome: "run" };
    }
  }

  /**
   * @param {Batch} batch
   * @param {string} key
   * @param {unknown} output
   * @param {unknown} targets
   * @returns {Promise<Ruling>}
   */
  async #consider(batch, key, output, targets) {
    const answer = await this.#ask(output, targets, false);
    this.#note(answer.verdict);
    const fails = answer.verdict === "does_not_fit";
    const graph = fails ? graphKey(output) : "";
    const remembered = fails && this.#parts.remembered.has(graph);
    if (!fails || batch.auto || remembered) {
      this.#toastOnce(toastsFor(answer), key);
      return { outcome: remembered && !batch.auto ? "insist" : "run", answer };
    }
    this.#toastOnce([], key);
    return this.#question(batch, await this.#withFixes(answer, output, targets), output, graph, false);
  }

  /** The same answer with its fixes, or without them where they can't be had. @param {Answer} answer @param {unknown} output @param {unknown} targets @returns {Promise<Answer>} */
  async #withFixes(answer, output, targets) {
    try {
      const more = await this.#ask(output, targets, true);
      return more.verdict === answer.verdict ? more : answer;
    } catch (error) {
      this.#note(t("check_no_fixes", { reason: reasonOf(error) }));
      return answer;
    }
  }

  /** What to do about a prompt that the server refused for its memory; null where it was refused for something else. @param {unknown} error @param {Batch} batch @param {any} data @param {any} options @returns {Promise<Ruling | null>} */
  async #afterRefusal(error, batch, data, options) {
    if (!isOurRefusal(error)) return null;
    try {
      const answer = await this.#ask(data.output, options?.partialExecutionTargets, true);
      const ruling = await this.#question(batch, answer, data.output, graphKey(data.output), true);
      // it does refuse, whatever the settings of this browser say
      if (ruling.outcome === "insist" && !this.#parts.enforces()) {
        await withPatience(PATIENCE_MS, (signal) => this.#parts.allow(JSON.stringify({ prompt: data.output }), signal));
      }
      return ruling;
    } catch (problem) {
      this.#note(t("check_not_asked", { reason: reasonOf(problem) }));
      return null;
    }
  }

  /** @param {unknown} output @param {unknown} targets @param {boolean} fixes @returns {Promise<Answer>} */
  #ask(output, targets, fixes) {
    const body = JSON.stringify({ prompt: output, ...(targets ? { partial_execution_targets: targets } : {}), fixes });
    return withPatience(fixes ? FIXES_PATIENCE_MS : PATIENCE_MS, async (signal) => {
      for (;;) {
        const response = await this.#parts.check(body, signal);
        if (!fixes || response.status !== BUSY || signal.aborted) return readAnswer(await jsonOf(response));
        await new Promise((resolve) => setTimeout(resolve, 250));
      }
    });
  }

  /** @param {Batch} batch @param {Answer} answer @param {unknown} output @param {string} graph @param {boolean} refused @returns {Promise<Ruling>} */
  async #question(batch, answer, output, graph, refused) {
    const about = `${refused} ${answer.message}`;
    let asked = batch.questions.get(about);
    if (!asked) {
      asked = this.#parts.question(answer, output, refused);
      batch.questions.set(about, asked);
    }
    const { choice, remember, applied } = await asked;
    if (choice !== "cancel") this.#parts.remembered.set(graph, remember);
    if (choice === "apply" && applied) {
      if (!batch.endings.includes(applied.done)) batch.endings.push(applied.done);
      return { outcome: "apply", applied, answer };
    }
    return { outcome: choice === "run" ? "insist" : "cancel", answer };
  }

  /** Told later, so that whatever listens cannot hold up a prompt. @param {string} note */
  #note(note) {
    queueMicrotask(() => this.#parts.onChecked(note));
  }

  /** Once per content in a row: pressing Run again on the same graph says nothing new. @param {Toast[]} toasts @param {string} key */
  #toastOnce(toasts, key) {
    const said = toasts.length ? `${toasts.map((toast) => toast.summary)} ${key}` : "";
    if (said !== this.#lastToast) for (const toast of toasts) this.#parts.toast(toast);
    this.#lastToast = said;
  }
}

/**
 * @template T
 * @param {number} ms
 * @param {(signal: AbortSignal) => Promise<T>} work
 * @returns {Promise<T>}
 */
async function withPatience(ms, work) {
  const controller = new AbortController();
  const timeout = setTimeout(() => controller.abort(new Error(t("no_answer_within", { seconds: ms / 1000 }))), ms);
  try {
    return await untilAborted(controller.signal, work(controller.signal));
  } finally {
    clearTimeout(timeout);
  }
}

/** System memory has a sentence of its own. @param {Answer} answer @returns {Toast[]} */
function toastsFor({ verdict, message, ram }) {
  /** @type {Toast[]} */
  const toasts = [];
  if (verdict === "fits_with_offload") toasts.push({ severity: "info", summary: t("toast_offload"), detail: message });
  if (verdict === "does_not_fit") toasts.push({ severity: "warn", summary: t("toast_does_not_fit"), detail: message });
  if (ram && (ram.verdict === "does_not_fit" || ram.short > 0)) {
    toasts.push({ severity: "warn", summary: t("toast_ram"), detail: ram.message });
  }
  return toasts;
}

/** The server's 400 for a prompt that does not fit (nodes/preflight.py), as every front end hands it on. @param {any} error */
function isOurRefusal(error) {
  const about = error?.response?.error?.extra_info?.vram_headroom;
  return isObject(about) && about.verdict === "does_not_fit";
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
