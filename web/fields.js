// What a JSON answer must look like, field by field. What is indispensable and missing raises Malformed; the rest has a fallback.

import { t } from "./strings.js";

/** The server said something, but not what was agreed. */
export class Malformed extends Error {}

/** @param {Response} response @returns {Promise<unknown>} */
export async function jsonOf(response) {
  if (!response.ok) throw new Malformed(t("server_answered", { status: response.status }));
  try {
    return await response.json();
  } catch (error) {
    throw error instanceof SyntaxError ? new Malformed("the answer is no JSON") : error;
  }
}

/** @param {unknown} value @returns {value is Record<string, unknown>} */
export function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** @param {unknown} value @param {string} what @returns {Record<string, unknown>} */
export function object(value, what) {
  if (!isObject(value)) throw new Malformed(`${what} is no object`);
  return value;
}

/** @param {unknown} value @param {string} what @returns {unknown[]} */
export function list(value, what) {
  if (!Array.isArray(value)) throw new Malformed(`${what} is no list`);
  return value;
}

/** @param {unknown} value @param {string} what @returns {number} */
export function number(value, what) {
  const n = numberOrNull(value);
  if (n === null) throw new Malformed(`${what} is no number`);
  return n;
}

/** @param {unknown} value @returns {number | null} */
export function numberOrNull(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

/** @param {unknown} value @param {string} otherwise @returns {string} */
export function text(value, otherwise) {
  return typeof value === "string" && value !== "" ? value : otherwise;
}

/** @param {unknown} value @param {string[]} allowed @param {string} otherwise @returns {string} */
export function oneOf(value, allowed, otherwise) {
  return typeof value === "string" && allowed.includes(value) ? value : otherwise;
}

/** The objects of a list; what else is in it is left out. @param {unknown} value @returns {Record<string, unknown>[]} */
export function objects(value) {
  return Array.isArray(value) ? value.filter(isObject) : [];
}

/** The texts of a list. @param {unknown} value @returns {string[]} */
export function strings(value) {
  return Array.isArray(value) ? value.filter((entry) => typeof entry === "string") : [];
}
