// The settings of the pack, as ComfyUI's settings dialog shows them.

export const ASK = "VRAMHeadroom.AskBeforeQueueing";
export const SHOW_BAR = "VRAMHeadroom.ShowBar";

const CATEGORY = "VRAM Headroom";

/** @typedef {{ [ASK]: "warn" | "enforce" | "off", [SHOW_BAR]: boolean }} Choices */

/** @type {Readonly<Choices>} */
export const DEFAULTS = Object.freeze({ [ASK]: "warn", [SHOW_BAR]: true });

/**
 * The new value is handed on because front ends before 1.58 store it only after this call.
 * @param {(id: keyof Choices, value: unknown) => void} changed called at registration too, and more than once with the same value
 * @returns {ComfySetting[]}
 */
export function settings(changed) {
  return [
    {
      id: SHOW_BAR,
      name: "Show the VRAM bar in the menu",
      type: "boolean",
      defaultValue: DEFAULTS[SHOW_BAR],
      category: [CATEGORY, "Bar", "Show"],
      onChange: (value) => changed(SHOW_BAR, value),
    },
    {
      id: ASK,
      name: "When a graph does not fit the card",
      tooltip: "The check runs before a prompt is queued. If it fails or takes longer than 1.5 s, the prompt is queued as always.",
      type: "combo",
      defaultValue: DEFAULTS[ASK],
      options: [
        { text: "Ask before queueing", value: "warn" },
        { text: "Refuse it, from API clients too", value: "enforce" },
        { text: "Queue without checking", value: "off" },
      ],
      category: [CATEGORY, "Check", "Ask"],
      onChange: (value) => changed(ASK, value),
    },
  ];
}

/** What was chosen, whatever else was stored under the same name. @param {(id: string) => unknown} stored @returns {Choices} */
export function choices(stored) {
  const ask = stored(ASK);
  return { [ASK]: ask === "off" || ask === "enforce" ? ask : "warn", [SHOW_BAR]: stored(SHOW_BAR) !== false };
}
