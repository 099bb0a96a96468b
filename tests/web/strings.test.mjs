// What a person reads stands in strings.js: nothing is said past it, nothing is said before a translation can arrive.

import assert from "node:assert/strict";
import { readdir, readFile } from "node:fs/promises";
import { afterEach, test } from "node:test";

import ts from "typescript";

import { toldOf } from "../../web/accidents.js";
import { readAnswer } from "../../web/answers.js";
import { levelOf } from "../../web/levels.js";
import { headingOf } from "../../web/question.js";
import { detailsOf, readingOf } from "../../web/reading.js";
import { readStatus } from "../../web/status.js";
import { STRINGS, translate } from "../../web/strings.js";
import { costWords, placementWords, shapeWords, sizeOrUnknown } from "../../web/text.js";
import { deviceJson, statusJson } from "./samples.mjs";

const WEB = new URL("../../web/", import.meta.url);

/** Files whose sentences are made elsewhere: ComfyUI translates names of settings and commands, and a report for an issue is English. */
const OTHERWISE = ["strings.js", "settings.js", "commands.js", "diagnostics.js"];

/** Texts that look like words and are none, by file. */
const ALLOWED = Object.freeze({
  "inventory.js": ["pipeline {}", "m{} {}"], // ids
  "text.js": ["{} MB", "{} GB"], // units
  "bar.js": ["width: {}%"], // a style, passed on by a helper
});

/** Attributes whose values are for the page and no person. */
const UNREAD = ["class", "className", "icon", "style"];

/** Readers of fields.js: their second argument names a field in a Malformed. */
const READERS = ["object", "list", "number"];

/** @returns {Promise<ts.SourceFile[]>} */
async function sources() {
  const names = (await readdir(WEB)).filter((name) => name.endsWith(".js") && !OTHERWISE.includes(name));
  return Promise.all(names.map(async (name) => ts.createSourceFile(name, await readFile(new URL(name, WEB), "utf8"), ts.ScriptTarget.ES2022, true)));
}

/** @param {ts.Node} node @param {(node: ts.Node) => void} visit */
function walk(node, visit) {
  visit(node);
  ts.forEachChild(node, (child) => walk(child, visit));
}

/** The text of a literal, {} for what is put into it. @param {ts.Node} node */
function textOf(node) {
  if (ts.isStringLiteral(node) || ts.isNoSubstitutionTemplateLiteral(node)) return node.text;
  return ts.isTemplateExpression(node) ? node.head.text + node.templateSpans.map((span) => `{}${span.literal.text}`).join("") : null;
}

/** @param {ts.Node} node */
function isUnread(node) {
  const { parent } = node;
  if (ts.isImportDeclaration(parent)) return true;
  if (ts.isPropertyAssignment(parent)) return UNREAD.includes(parent.name.getText().replaceAll('"', ""));
  if (ts.isNewExpression(parent)) {
    const thrown = parent.expression.getText();
    return thrown === "Malformed" || (thrown === "Error" && ts.isThrowStatement(parent.parent));
  }
  return ts.isCallExpression(parent) && READERS.includes(parent.expression.getText()) && parent.arguments[1] === node;
}

/** @param {string} text two words, or one beside something put in */
const isSentence = (text) => /\p{L}/u.test(text) && /[\p{L}\p{N}}][,.:;!?)]* +[({]?[\p{L}}]/u.test(text);

/** @param {ts.SourceFile} source @returns {string[]} */
function sentencesIn(source) {
  /** @type {string[]} */
  const found = [];
  walk(source, (node) => {
    const text = textOf(node);
    if (text === null || !isSentence(text) || isUnread(node)) return;
    if (ALLOWED[source.fileName]?.includes(text)) return;
    const { line } = source.getLineAndCharacterOfPosition(node.getStart());
    found.push(`${source.fileName}:${line + 1} ${JSON.stringify(text)}`);
  });
  return found;
}

const parsed = (code) => ts.createSourceFile("new.js", code, ts.ScriptTarget.ES2022, true);

afterEach(() => translate(null));

test("no sentence is made past strings.js", async () => {
  assert.deepEqual((await sources()).flatMap(sentencesIn), []);
});

test("the law finds sentences in literals and templates, and lets be what nobody reads", () => {
  const sentences = [
    'toast("It did not work.");',
    "say(`${size(freed)} freed.`);",
    "say(`short by ${n}`);",
    'const WORDS = { a: "the fullest" };',
    'throw new CannotChange("no widget");',
  ];
  assert.deepEqual(sentences.map((code) => sentencesIn(parsed(code)).length), [1, 1, 1, 1, 1]);
  const others = [
    'import "./a b.js";',
    "// it did not work",
    'h("i", { class: "one two", style: `left: ${a}px` });',
    'throw new Error("no such thing");',
    'throw new Malformed("no such thing");',
    'object(body, "the answer");',
    'icon("M8 6v4M8 11.4v1");',
    't("no_gpu");',
  ];
  assert.deepEqual(others.flatMap((code) => sentencesIn(parsed(code))), []);
});

test("what is allowed is still there, and would be found", async () => {
  /** @type {Map<string, (string | null)[]>} */
  const texts = new Map();
  for (const source of await sources()) {
    const own = [];
    walk(source, (node) => own.push(textOf(node)));
    texts.set(source.fileName, own);
  }
  for (const [name, allowed] of Object.entries(ALLOWED)) for (const text of allowed) assert.ok(isSentence(text) && texts.get(name)?.includes(text), `${name}: ${text}`);
});

test("every place in a sentence is given its value where it is said", async () => {
  /** @type {string[]} */
  const missing = [];
  let calls = 0;
  for (const source of await sources()) {
    walk(source, (node) => {
      if (!ts.isCallExpression(node) || node.expression.getText() !== "t") return;
      const [key, values] = node.arguments;
      if (values && !ts.isObjectLiteralExpression(values)) return; // put together elsewhere
      const given = (values?.properties ?? []).map((property) => property.name.getText());
      walk(key, (inner) => {
        const text = textOf(inner);
        if (text === null || !Object.hasOwn(STRINGS, text) || (ts.isBinaryExpression(inner.parent) && inner.parent !== node)) return;
        calls += 1;
        for (const [, place] of STRINGS[text].matchAll(/\{(\w+)\}/g)) if (!given.includes(place)) missing.push(`${source.fileName} ${text}: ${place}`);
      });
    });
  }
  assert.deepEqual(missing, []);
  assert.ok(calls > 150, `${calls} calls were looked at`);
});

test("a translation that arrives after loading is what the bar, its details and the question say", () => {
  const snapshot = { state: /** @type {const} */ ("ok"), status: readStatus(statusJson(deviceJson())), reason: "" };
  const view = { shows: /** @type {const} */ ("pressure"), card: /** @type {const} */ ("fullest"), pollSeconds: 3, level: ({ pressure }) => levelOf(pressure) };
  const answer = readAnswer({ verdict: "fits", message: "Es passt." });
  translate(Object.fromEntries(Object.keys(STRINGS).map((key) => [key, `¤${STRINGS[key].match(/\{\w+\}/g)?.join("|") ?? ""}`])));
  const reading = readingOf(snapshot, view);
  assert.deepEqual([reading.label, reading.amount, reading.spoken], ["¤", "¤10|16 GB", "¤37|¤|¤10|16 GB"]);
  assert.equal(readingOf({ state: "loading", status: null, reason: "" }, view).headline, "¤");
  const [section] = detailsOf(snapshot, view);
  assert.deepEqual([...new Set(section?.rows.map((row) => row.label))], ["¤"]);
  assert.equal(headingOf(answer), "¤");
  const posted = { id: "1", output: {}, answer, auto: false, batch: 1 };
  assert.deepEqual(toldOf({ posted, node: "n", message: "m" }, answer), ["¤m", "¤Es passt."]);
  assert.equal(costWords(/** @type {any} */ ({ picture: "shorter", cost: "" })), "¤");
  assert.equal(placementWords({ placement: "gpu", bytes: 1, bytesOnCard: 1 }), "¤");
  assert.equal(shapeWords(/** @type {any} */ ({ width: null, height: null, frames: 81, batch: null })), "¤81");
  assert.equal(sizeOrUnknown(null), "¤");
});
