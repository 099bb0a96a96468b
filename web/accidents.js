// Prompts of this page that ran out of memory: what happened is told with what would help.

import { isObject, text } from "./fields.js";

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
  #lastBatch = 0;

  /** @param {Posted} posted */
  note(posted) {
    this.#posted.set(posted.id, posted);
    for (const id of [...this.#posted.keys()].slice(0, -MOST)) this.#posted.delete(id);
  }

  /**
   * @param {unknown} detail of ComfyUI's event execution_error
   * @returns {Accident | null} null for another error, for a prompt that this page did not post, and for more of one press of Run
   */
  from(detail) {
    if (!isObject(detail)) return null;
    const posted = this.#posted.get(text(detail.prompt_id, ""));
    const message = text(detail.exception_message, "").trim();
    if (!posted || !OUT_OF_MEMORY.test(`${text(detail.exception_type, "")} ${message}`)) return null;
    this.#posted.delete(posted.id);
    if (posted.batch === this.#lastBatch) return null;
    this.#lastBatch = posted.batch;
    return { posted, node: `${text(detail.node_type, "A node")} (node ${text(detail.node_id, "?")})`, message };
  }
}

/**
 * @param {Accident} accident
 * @param {Answer} now what the check says of the same prompt after it
 * @returns {string[]} sentences
 */
export function toldOf({ message, posted }, now) {
  const expected = posted.answer?.verdict;
  const before =
    expected === "does_not_fit"
      ? "The check had said so. "
      : expected === "fits" || expected === "fits_with_offload"
        ? "The check had expected it to run: its estimate was too low, or less was free than it saw. "
        : "";
  const first = message.split("\n", 1)[0] ?? "";
  return [`ComfyUI reports: ${first.length > 300 ? `${first.slice(0, 300)}…` : first}`, `${before}${now.message}`];
}
