// Keys of prompts: two that need the same memory share one, whatever their seeds, titles and order of inputs.

const SEED = /(^|_)seed(_|$)/i;
const FREE_TEXT = /(^|_)(text|prompt|filename_prefix)(_|$)/i;

/**
 * A short key of a prompt's content and of the outputs that were asked for.
 * @param {unknown} output the API-format prompt
 * @param {unknown} [targets] ids of the output nodes, when only some were asked for
 */
export function contentKey(output, targets) {
  return fingerprint(canonical([output, targets ?? null], (name, value) => typeof value === "number" && SEED.test(name)));
}

/**
 * A key of a graph that also stays the same while its texts are reworded.
 * @param {unknown} output the API-format prompt
 */
export function graphKey(output) {
  return fingerprint(canonical(output, (name, value) => isFree(name, value)));
}

/** Seeds change from run to run, texts as people write; neither needs memory. A link is an array and stays. @param {string} name @param {unknown} value */
function isFree(name, value) {
  return (typeof value === "number" && SEED.test(name)) || (typeof value === "string" && FREE_TEXT.test(name));
}

/**
 * JSON with sorted names, without titles and whatever `without` takes out.
 * @param {unknown} value
 * @param {(name: string, value: unknown) => boolean} [without]
 */
export function canonical(value, without = () => false) {
  return JSON.stringify(value, (name, part) => {
    if (name === "_meta" || without(name, part)) return undefined;
    if (typeof part !== "object" || part === null || Array.isArray(part)) return part;
    return Object.fromEntries(Object.entries(part).sort(([a], [b]) => (a < b ? -1 : 1)));
  });
}

/** FNV-1a, two runs of 32 bits with different starts. @param {string | undefined} text */
function fingerprint(text = "") {
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
