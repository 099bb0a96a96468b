// Text encoders off the card, in one stroke: what the command does and what it tells.

import { messageOf } from "./actions.js";
import { isObject, jsonOf, numberOrNull } from "./fields.js";
import { readStatus } from "./status.js";
import { t } from "./strings.js";
import { size } from "./text.js";

/**
 * @typedef {{ severity: "success" | "info" | "warn", summary: string, detail: string }} Told
 * @typedef {object} Ports
 * @property {() => Promise<Response>} status
 * @property {(action: "offload", key: number) => Promise<Response>} post
 */

/** Every one that is there, ComfyUI's own loaders' too. Rejects where the server can't be asked. @param {Ports} ports @returns {Promise<Told>} */
export async function offloadEncoders({ status, post }) {
  const { models } = readStatus(await jsonOf(await status()));
  const there = models.filter((model) => model.role === "text_encoder" && model.bytesOnCard > 0);
  if (!there.length) return { severity: "info", summary: t("encoders_none"), detail: t("encoders_none_detail") };
  let freed = 0;
  let waiting = 0;
  /** @type {string[]} */
  const refused = [];
  for (const { key } of there) {
    if (key === null) continue;
    const response = await post("offload", key);
    if (!response.ok) refused.push(await messageOf(response));
    else if (response.status === 202) waiting += 1;
    else {
      const body = await jsonOf(response);
      freed += isObject(body) ? (numberOrNull(body.freed_bytes) ?? 0) : 0;
    }
  }
  if (refused.length) return { severity: "warn", summary: t("encoders_stay"), detail: refused.join(" ") };
  if (waiting) return { severity: "info", summary: t("encoders_wait"), detail: t("encoders_wait_detail") };
  return { severity: "success", summary: t("encoders_off"), detail: t("encoders_off_detail", { freed: size(freed) }) };
}
