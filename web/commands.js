// What the pack can be told to do, from ComfyUI's menu, its command palette and keys a person chooses: none are taken by default.

/** @typedef {{ checkGraph: () => Promise<void>, freeAll: () => Promise<void>, offloadEncoders: () => Promise<void> }} Actions */

/** @param {Actions} actions @returns {ComfyCommand[]} */
export function commands(actions) {
  return [
    command("CheckGraph", "VRAM: check whether this graph fits", "pi pi-search", actions.checkGraph),
    command("OffloadTextEncoder", "VRAM: offload text encoder", "pi pi-upload", actions.offloadEncoders),
    command("FreeAll", "VRAM: unload all models", "pi pi-eraser", actions.freeAll),
  ];
}

/** @param {ComfyCommand[]} list @returns {ComfyMenu[]} */
export function menu(list) {
  return [{ path: ["VRAM Headroom"], commands: list.map(({ id }) => id) }];
}

/** @param {string} name @param {string} label @param {string} icon @param {() => Promise<void>} run @returns {ComfyCommand} */
function command(name, label, icon, run) {
  return { id: `VRAMHeadroom.${name}`, label, menubarLabel: label.replace(/^VRAM: (.)/, (_, first) => first.toUpperCase()), icon, function: () => void run() };
}
