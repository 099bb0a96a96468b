// Prompts of this page that ran out of memory: what happened is told with what would help.

import { isObject, text } from "./fields.js";
import { t } from "./strings.js";

/**
 * @import { Answer } from "./answers.js"
 * @import { Posted } from "./preflight.js"
 *
 * @typedef {object} Accident
 * @property {Posted} posted
 * @property {string} node its type and id
 * @property {string} message of the error
 */

/** Prompts remembered; a longer queue's oldest are not asked about. */
const MOST = 32;

/** CUDA's and ROCm's class, XPU's and MPS's words, and the sentence ComfyUI puts in their place. */
const OUT_OF_MEMORY = /OutOfMemoryError|out of memory|Allocation on device/i;

export class Accidents {
  /** @type {Map<string, Posted>} */
  #posted = new Map();
  /** @type {Map<string, { node: string, message: string }>} errors of prompts that are not known yet */
  #early = new Map();
  #lastBatch = 0;

  /**
   * @param {Posted} posted
   * @returns {Accident | null} what has become of it already: its error may come before the answer to its post
   */
  note(posted) {
    keep(this.#posted, posted.id, posted);
    return this.#match(posted.id);
  }

  /**
   * @param {unknown} detail of ComfyUI's event execution_error
   * @returns {Accident | null} null for another error, for a prompt that this page did not post, and for more of one press of Run
   */
  from(detail) {
    if (!isObject(detail)) return null;
    const id = text(detail.prompt_id, "");
    const message = text(detail.exception_message, "").trim();
    if (!OUT_OF_MEMORY.test(`${text(detail.exception_type, "")} ${message}`)) return null;
    const node = t("accident_node", { type: text(detail.node_type, t("accident_some_node")), id: text(detail.node_id, "?") });
    keep(this.#early, id, { node, message });
    return this.#match(id);
  }

  /** @param {string} id @returns {Accident | null} */
  #match(id) {
    const posted = this.#posted.get(id);
    const error = this.#early.get(id);
    if (!posted || !error) return null;
    this.#posted.delete(id);
    this.#early.delete(id);
    if (posted.batch === this.#lastBatch) return null;
    this.#lastBatch = posted.batch;
    return { posted, ...error };
  }
}

/**
 * @template T
 * @param {Map<string, T>} map
 * @param {string} id
 * @param {T} value
 */
function keep(map, id, value) {
  map.set(id, value);
  for (const old of [...map.keys()].slice(0, -MOST)) map.delete(old);
}

/**
 * @param {Accident} accident
 * @param {Answer} now what the check says of the same prompt after it
 * @returns {string[]} sentences
 */
export function toldOf({ message, posted }, now) {
  const expected = posted.answer?.verdict;
  const wasWrong = expected === "fits" || expected === "fits_with_offload";
  const key = expected === "does_not_fit" ? "accident_foreseen" : wasWrong ? "accident_unforeseen" : null;
  const first = message.split("\n", 1)[0] ?? "";
  const reports = t("accident_reports", { message: first.length > 300 ? `${first.slice(0, 300)}…` : first });
  return [reports, key ? t(key, { now: now.message }) : now.message];
}
