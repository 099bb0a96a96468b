// Every sentence of the panel and the badges, and the words they share with the bar, in English. ComfyUI's locales folder may have others: main.json, below "vramHeadroom".

export const STRINGS = Object.freeze({
  panel_title: "VRAM",
  panel_tooltip: "VRAM Headroom: where the memory is, what will happen, what is happening",
  panel_name: "VRAM Headroom",
  waiting_for_reading: "Waiting for the first reading.",
  no_reading: "No reading: {reason}. Trying again every {seconds} s.",
  old_figures: "The figures below are the last ones that came.",
  no_gpu: "No GPU: ComfyUI runs on the CPU, so there is no VRAM to watch.",

  card_title: "{name}",
  card_title_of_several: "GPU {index}: {name}",
  pressure_and_used: "pressure {pressure} %{level} · used {used} %",
  old_reading: "An old reading: {seconds} s.",
  part_activations: "activations and caches",
  part_cached: "cached blocks",
  part_others: "other programs",
  part_reserve: "kept free by ComfyUI",
  part_free: "free",
  part_unknown: "ComfyUI",
  legend_back: "{label}, can be given back",
  stack_name: "What {card} holds",

  level_high: "high",
  level_very_high: "very high",
  level_critical: "critical",
  role_generator: "generator",
  role_text_encoder: "text encoder",
  role_vae: "VAE",
  role_clip_vision: "CLIP vision",
  role_other: "model",

  ram_title: "System memory",
  ram_ours: "ComfyUI",
  ram_others: "everything else",
  ram_free: "available",
  ram_limit: "of {total} (the limit of this container; the machine has {machine})",
  ram_of: "of {total}",

  models_title: "Models",
  models_none: "No model is loaded.",
  models_other: "Loaded by ComfyUI",
  pipeline_active: "in use",
  pipeline_idle: "idle",
  pipeline_offloaded: "off the card",
  on_the_card: "on the card",
  in_ram: "in RAM",
  share_on_the_card: "{percent} % on the card",
  as_of: "{placement}, {age} ago",
  pinned: "pinned",
  in_use: "in use",
  used_just_now: "used just now",
  used_ago: "used {age} ago",
  seconds: "{n} s",
  minutes: "{n} min",
  hours: "{n} h",

  offload: "Offload",
  pin: "Pin",
  unpin: "Unpin",
  free_all: "Free all",
  action_on: "{action} {name}",
  action_refused_because: "{action}: {reason}",
  because_in_use: "it is in use",
  because_pinned: "it is pinned; unpin it first",
  because_in_ram: "it is off the card already",
  because_unknown: "ComfyUI has no handle of it",
  because_nothing: "no model is on the card",
  because_all_in_use: "every model on the card is in use or pinned",
  because_waiting: "it waits already",
  because_asked: "the server was asked just now",
  waits_node: "{action} waits until the node has ended",
  waits_queue: "{action} waits until the queue is idle",
  waits: "{action} waits ({seconds} s)",
  done_offload: "{name} is off the card: {freed} freed.",
  done_pin: "{name} is pinned to the card.",
  done_unpin: "{name} is no longer pinned.",
  done_free: "All idle models are off the card: {freed} freed.",
  refused: "{action} {name}: {message}",
  action_failed: "{action} {name} did not work: {message}",
  everything: "all models",

  run_title: "This run",
  run_last: "Last run",
  run_none: "Nothing has run yet. Queue a prompt: its phases stand here, with what was predicted and what is measured.",
  run_unplanned: "This run could not be planned; what is measured is drawn alone.",
  run_running: "running",
  run_done: "finished",
  run_failed: "failed",
  run_interrupted: "interrupted",
  run_sentence: "Predicted {predicted}, measured {measured}.",
  run_sentence_last: "Last run: predicted {predicted}, measured {measured}.",
  run_predicted: "Predicted peak: {predicted}.",
  run_measured: "Measured peak: {measured}.",
  measured_at_least: "at least {size}",
  key_predicted: "predicted, upper bound as a thin line",
  key_measured: "measured, the highest dotted",
  key_limit: "the card",
  key_others: "other programs",
  phases_name: "Phases of the run",
  phase_times: "{title} ×{n}",
  phase_steps: "step {done} of {total}",
  phase_waiting: "to come",
  phase_running: "running",
  phase_done: "done",
  phase_failed: "failed",
  phase_interrupted: "interrupted",
  phase_predicted: "predicted {size}",
  phase_unknown: "not predicted",
  phase_measured: "measured {size}",
  phase_streams: "streams {size} per step",
  phase_peak: "peak of the run",
  phase_short: "short by {size}",
  terms_hint: "Point at a phase, or go through them with the arrow keys, to see what its figure is made of.",
  term_weights: "weights of this phase",
  term_other_models: "weights of other models",
  term_sum: "together",
  term_band: "between {lower} and {upper}",
  term_available: "there is room for {size} beside the weights",
  incident_retry: "Tried again",
  incident_tiles: "In tiles",
  incident_smaller: "In smaller parts",
  incident_kept: "Steps kept",
  incident_gave_up: "Gave up",
  incident_refused: "Refused",
  incident_line: "{kind} at {seconds} s, node {node}: {message}",
  incident_other_picture: "Not quite the same picture.",
  incident_file: "Kept in {file}.",

  about_title: "About this machine",
  about_comfyui: "ComfyUI {version}, {patchers} patchers, {state}",
  about_pack: "VRAM Headroom {version}",
  about_seams: "Where the pack holds on to ComfyUI",
  seam_live: "live",
  seam_absent: "absent",
  seam_off: "off",
  seam_without: "{name}: {without}",
  about_check: "Self-check of the estimates",
  check_none: "Not made yet.",
  check_row: "{name}: expected {expected}, traced {traced}",

  badge_takes: "takes {size}",
  badge_here: "{size}, {placement}",
  badge_peak: "peak {size}",
  badge_short: "peak {size}, short by {short}",
  badge_measured: "peak {measured}, {predicted} predicted",
  badge_measured_alone: "peak {measured}",
  badge_unknown: "peak not known",
});

/** @typedef {keyof typeof STRINGS} Key */

/** @type {Map<string, string>} what another language says instead */
const translated = new Map();

/**
 * @param {Key} key
 * @param {Record<string, string | number>} [values] take the places of {name} in it
 */
export function t(key, values = {}) {
  const sentence = translated.get(key) ?? STRINGS[key];
  return sentence.replace(/\{(\w+)\}/g, (place, name) => (Object.hasOwn(values, name) ? String(values[name]) : place));
}

/** @param {unknown} table from key to sentence; what it lacks stays English */
export function translate(table) {
  translated.clear();
  if (typeof table !== "object" || table === null) return;
  for (const [key, sentence] of Object.entries(table)) {
    if (Object.hasOwn(STRINGS, key) && typeof sentence === "string") translated.set(key, sentence);
  }
}
