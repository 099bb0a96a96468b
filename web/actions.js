// What a person asks of models in the panel: sent to the server, followed while it waits, and its end told.

import { isObject, jsonOf, Malformed, numberOrNull, text } from "./fields.js";
import { labelOf } from "./inventory.js";
import { t } from "./strings.js";
import { size } from "./text.js";

/**
 * @import { ActionName, Pending } from "./inventory.js"
 * @import { Status } from "./status.js"
 *
 * @typedef {Pending & { id: string, name: string }} Asked
 * @typedef {object} Ports
 * @property {(action: ActionName, key: number | null) => Promise<Response>} post
 * @property {(id: string) => Promise<Response>} outcome
 * @property {(text: string, failed: boolean) => void} tell
 * @property {() => void} changed something waits, or no longer does
 */

export class Actions {
  /** @type {Asked[]} */
  pending = [];
  #ports;

  /** @param {Ports} ports */
  constructor(ports) {
    this.#ports = ports;
  }

  /** @param {ActionName} action @param {number | null} key @param {string} name of the model */
  async ask(action, key, name) {
    if (this.pending.some((p) => p.action === action && p.key === key)) return;
    /** @type {Asked} */
    const asked = { action, key, name, id: "", state: "asked" };
    this.#set([...this.pending, asked]);
    try {
      const response = await this.#ports.post(action, key);
      if (!response.ok) throw new Malformed(await messageOf(response));
      const body = await jsonOf(response);
      const id = isObject(body) ? text(body.id, "") : "";
      if (response.status === 202 && isObject(body) && id) {
        const state = body.waiting === "node" ? "node" : "queue";
        this.#set(this.pending.map((p) => (p === asked ? { ...p, id, state } : p)));
        return;
      }
      this.#done(asked, isObject(body) ? (numberOrNull(body.freed_bytes) ?? 0) : 0);
    } catch (error) {
      this.#failed(asked, error);
    }
  }

  /** What waited and is no longer listed has ended one way or the other. @param {Status} status */
  follow(status) {
    const listed = new Set(status.waiting.map((w) => w.id));
    for (const asked of this.pending) if (asked.id && !listed.has(asked.id)) void this.#settle(asked);
  }

  /** @param {Asked} asked */
  async #settle(asked) {
    try {
      const body = await jsonOf(await this.#ports.outcome(asked.id));
      if (!isObject(body) || body.state === "waiting" || !this.pending.includes(asked)) return;
      if (body.state === "done") this.#done(asked, numberOrNull(body.freed_bytes) ?? 0);
      else this.#end(asked, t("refused", { action: labelOf(asked.action), name: asked.name, message: text(body.message, "?") }), true);
    } catch (error) {
      this.#failed(asked, error);
    }
  }

  /** @param {Asked} asked @param {number} freed bytes */
  #done(asked, freed) {
    const key = /** @type {const} */ ({ offload: "done_offload", pin: "done_pin", unpin: "done_unpin", free: "done_free" })[asked.action];
    this.#end(asked, t(key, { name: asked.name, freed: size(freed) }), false);
  }

  /** @param {Asked} asked @param {unknown} error */
  #failed(asked, error) {
    if (!this.pending.some((p) => p.action === asked.action && p.key === asked.key)) return;
    const message = error instanceof Error ? error.message : String(error);
    this.#end(asked, t("action_failed", { action: labelOf(asked.action), name: asked.name, message }), true);
  }

  /** @param {Asked} asked @param {string} told @param {boolean} failed */
  #end(asked, told, failed) {
    this.#set(this.pending.filter((p) => p.action !== asked.action || p.key !== asked.key));
    this.#ports.tell(told, failed);
  }

  /** @param {Asked[]} pending */
  #set(pending) {
    this.pending = pending;
    this.#ports.changed();
  }
}

/** The sentence of a refusal. @param {Response} response */
export async function messageOf(response) {
  try {
    const body = await response.json();
    if (isObject(body) && isObject(body.error)) return text(body.error.message, t("server_answered", { status: response.status }));
  } catch {
    // no JSON: the status has to do
  }
  return t("server_answered", { status: response.status });
}
