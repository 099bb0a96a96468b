// The English files of ComfyUI's locales folder, made of what the code says: what a translator starts from.
// usage, in the repository's root: node tests/web/locale.mjs

import { mkdir, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";

import { commands } from "../../web/commands.js";
import { settings } from "../../web/settings.js";
import { STRINGS } from "../../web/strings.js";

export const FOLDER = new URL("../../locales/en/", import.meta.url);

const keyOf = (id) => id.replaceAll(".", "_");

/** @returns {Record<string, object>} by the file's name */
export function files() {
  const shown = settings(() => {}).filter(({ type }) => type !== "hidden");
  const nothing = async () => {};
  return {
    "main.json": { vramHeadroom: STRINGS },
    "settings.json": Object.fromEntries(
      shown.map(({ id, name, tooltip, options }) => [
        keyOf(id),
        { name, ...(tooltip ? { tooltip } : {}), ...(options ? { options: Object.fromEntries(options.map(({ text }) => [text, text])) } : {}) },
      ]),
    ),
    "commands.json": Object.fromEntries(commands({ checkGraph: nothing, freeAll: nothing, offloadEncoders: nothing }).map(({ id, label }) => [keyOf(id), { label }])),
  };
}

export const written = (content) => `${JSON.stringify(content, null, 2)}\n`;

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  await mkdir(FOLDER, { recursive: true });
  for (const [name, content] of Object.entries(files())) await writeFile(new URL(name, FOLDER), written(content));
}
