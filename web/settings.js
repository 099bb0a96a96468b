// The settings of the pack, as ComfyUI's settings dialog shows them.

import { CRITICAL_AT } from "./levels.js";
import { POLL_SECONDS } from "./status_client.js";

/** Also read by the server (nodes/preflight.py). */
export const ASK = "VRAMHeadroom.AskBeforeQueueing";
/** Read by the server alone (nodes/pack.py). */
export const MARGIN = "VRAMHeadroom.SafetyMarginGB";
export const SHOW_BAR = "VRAMHeadroom.ShowBar";
export const BAR_SHOWS = "VRAMHeadroom.BarShows";
export const CARD = "VRAMHeadroom.BarCard";
export const WARN_AT = "VRAMHeadroom.WarnAtPercent";
export const POLL = "VRAMHeadroom.PollSeconds";
export const NODE_BADGES = "VRAMHeadroom.NodeBadges";

const CATEGORY = "VRAM Headroom";

/** What the server keeps free where nothing is chosen (vram/monitor.py, DEFAULT_SAFETY_MARGIN), in GB. */
const DEFAULT_MARGIN = 0.25;

/**
 * @typedef {object} Choices
 * @property {"warn" | "enforce" | "off"} ask
 * @property {boolean} showBar
 * @property {"pressure" | "used"} barShows
 * @property {number | "fullest"} card
 * @property {number} warnAt percent
 * @property {number} pollSeconds
 * @property {boolean} nodeBadges
 */

/**
 * The new value is handed on because front ends before 1.58 store it only after this call.
 * @param {(id: string, value: unknown) => void} changed called at registration too, and more than once with the same value
 * @returns {ComfySetting[]}
 */
export function settings(changed) {
  /** @param {ComfySetting} setting @returns {ComfySetting} */
  const watched = (setting) => ({ ...setting, onChange: (value) => changed(setting.id, value) });
  return [
    watched({
      id: SHOW_BAR,
      name: "Show the VRAM bar in the menu",
      type: "boolean",
      defaultValue: true,
      category: [CATEGORY, "Bar", "Show"],
      sortOrder: 40,
    }),
    watched({
      id: BAR_SHOWS,
      name: "The bar's figure",
      tooltip: "Pressure leaves out what ComfyUI gives back by itself when somebody needs it, such as idle models. Colours and warnings always follow it.",
      type: "combo",
      defaultValue: "pressure",
      options: [
        { text: "Pressure: what cannot be given back", value: "pressure" },
        { text: "Used %: everything that is on the card", value: "used" },
      ],
      category: [CATEGORY, "Bar", "Figure"],
      sortOrder: 30,
    }),
    watched({
      id: WARN_AT,
      name: "Warn when pressure reaches (%)",
      tooltip: "One note per crossing. The next comes after pressure has been 5 % lower.",
      type: "slider",
      defaultValue: CRITICAL_AT,
      attrs: { min: 50, max: 100, step: 1 },
      category: [CATEGORY, "Bar", "Warn"],
      sortOrder: 20,
    }),
    watched({
      id: POLL,
      name: "Read the card every (seconds)",
      tooltip: "It is also read when a prompt or node starts or ends, at most once in 1.5 seconds, and never while the tab is hidden.",
      type: "slider",
      defaultValue: POLL_SECONDS,
      attrs: { min: 1, max: 60, step: 1 },
      category: [CATEGORY, "Bar", "Poll"],
      sortOrder: 10,
    }),
    watched({
      id: NODE_BADGES,
      name: "Badges on nodes: what they take and took",
      tooltip: "Loaders say how much of the card they will take, samplers and VAE nodes their peak. The graph is planned a moment after it changes.",
      type: "boolean",
      defaultValue: true,
      category: [CATEGORY, "Nodes", "Badges"],
    }),
    watched({ id: CARD, name: "The card in the bar", type: "hidden", defaultValue: "fullest", category: [CATEGORY, "Bar", "Card"] }),
    watched({
      id: ASK,
      name: "When a graph does not fit the card",
      tooltip: "The check runs before a prompt is queued. If it fails or takes longer than 1.5 s, the prompt is queued as always.",
      type: "combo",
      defaultValue: "warn",
      options: [
        { text: "Ask before queueing", value: "warn" },
        { text: "Refuse it, from API clients too", value: "enforce" },
        { text: "Queue without checking", value: "off" },
      ],
      category: [CATEGORY, "Check", "Ask"],
      sortOrder: 20,
    }),
    watched({
      id: MARGIN,
      name: "Leave free on the card (GB)",
      tooltip: "The check never plans with this much of the card.",
      type: "number",
      defaultValue: DEFAULT_MARGIN,
      attrs: { min: 0, max: 64, step: 0.05, maxFractionDigits: 2 },
      category: [CATEGORY, "Check", "Margin"],
      sortOrder: 10,
    }),
  ];
}

/** What was chosen, whatever else was stored under the same name. @param {(id: string) => unknown} stored @returns {Choices} */
export function choices(stored) {
  const ask = stored(ASK);
  const card = stored(CARD);
  return {
    ask: ask === "off" || ask === "enforce" ? ask : "warn",
    showBar: stored(SHOW_BAR) !== false,
    barShows: stored(BAR_SHOWS) === "used" ? "used" : "pressure",
    card: typeof card === "number" ? card : "fullest",
    warnAt: between(stored(WARN_AT), 50, 100, CRITICAL_AT),
    pollSeconds: between(stored(POLL), 1, 60, POLL_SECONDS),
    nodeBadges: stored(NODE_BADGES) !== false,
  };
}

/** @param {unknown} value @param {number} least @param {number} most @param {number} otherwise */
function between(value, least, most, otherwise) {
  return typeof value === "number" && value >= least && value <= most ? value : otherwise;
}
