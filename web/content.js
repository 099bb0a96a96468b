// Two prompts that need the same memory share one key: the graph without its seeds and titles.

const SEED = /(^|_)seed(_|$)/i;

/**
 * A short key of a prompt's content and of the outputs that were asked for.
 * @param {unknown} output the API-format prompt
 * @param {unknown} [targets] ids of the output nodes, when only some were asked for
 */
export function contentKey(output, targets) {
  return fingerprint(JSON.stringify([output, targets ?? null], withoutSeeds));
}

/**
 * A seed is a number; a link into a seed input is an array and stays.
 * @this {unknown}
 * @param {string} key
 * @param {unknown} value
 */
function withoutSeeds(key, value) {
  if (key === "_meta") return undefined;
  if (typeof value === "number" && SEED.test(key)) return undefined;
  return value;
}

/** FNV-1a, two runs of 32 bits with different starts. @param {string} text */
function fingerprint(text) {
  let a = 0x811c9dc5;
  let b = 0x01000193;
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i);
    a = Math.imul(a ^ code, 0x01000193);
    b = Math.imul(b ^ code, 0x85ebca6b);
  }
  return hex(a) + hex(b);
}

/** @param {number} word */
function hex(word) {
  return (word >>> 0).toString(16).padStart(8, "0");
}
