// A report a person can paste into an issue: what the pack saw, without the texts of their prompts. English in every language, as the
// people who read issues need it.

/**
 * @typedef {object} Facts
 * @property {unknown} status what the server says of its cards, or why it says nothing
 * @property {unknown} [check] what it says of the graph
 * @property {string} [error] of the run
 * @property {Record<string, unknown>} settings
 * @property {string | undefined} frontend its version
 */

/** @param {Facts} facts */
export function report(facts) {
  const { frontend = "not known", settings, status, check, error } = facts;
  const body = { frontend, browser: navigator.userAgent, settings, ...(error ? { error } : {}), status, ...(check ? { check } : {}) };
  return `VRAM Headroom diagnostics\n\`\`\`json\n${JSON.stringify(body, null, 1)}\n\`\`\`\n`;
}

/** @param {string} words @returns {Promise<boolean>} whether the browser allowed it */
export async function copy(words) {
  try {
    await navigator.clipboard.writeText(words);
    return true;
  } catch {
    // plain http from another machine has no clipboard of its own
    return copyThroughSelection(words);
  }
}

/** @param {string} words */
function copyThroughSelection(words) {
  const field = document.createElement("textarea");
  field.value = words;
  field.style.position = "fixed";
  field.style.opacity = "0";
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}
