// Answers of the server as its routes document them, for the tests beside this file.

export const GB = 2 ** 30;

export function deviceJson(changes = {}) {
  return {
    index: 0,
    name: "Simulated 16 GB",
    kind: "cuda",
    total_bytes: 16 * GB,
    used_bytes: 10 * GB,
    free_bytes: 6 * GB,
    reserved_bytes: 9 * GB,
    active_bytes: 8 * GB,
    ours_bytes: 8 * GB,
    others_bytes: 2 * GB,
    reclaimable_free_bytes: 10 * GB,
    utilization_percent: 62.5,
    pressure_percent: 37.5,
    stale: false,
    age_seconds: 0.1,
    ...changes,
  };
}

export function statusJson(...devices) {
  return {
    version: "0.1.0",
    devices,
    pipelines: [
      {
        name: "wan",
        state: "active",
        components: [
          { name: "high", role: "generator", placement: "partial", bytes: 14 * GB, bytes_on_card: 6 * GB, node_id: "1" },
          { name: "umt5", role: "text_encoder", placement: "cpu", bytes: 6 * GB, bytes_on_card: 0, node_id: null },
          { name: "vae", role: "vae", placement: "gpu", bytes: 50 * 2 ** 20, bytes_on_card: 50 * 2 ** 20, node_id: null },
        ],
      },
    ],
    loaded_models: [
      { name: "WAN21", bytes: 14 * GB, bytes_on_card: 6 * GB, registered: true, in_use: false },
      { name: "SDXL", bytes: 5 * GB, bytes_on_card: GB, registered: false, in_use: false },
    ],
    running: null,
    host: { comfyui_version: "0.33.0", patchers: "legacy", vram_state: "NORMAL_VRAM" },
    seams: [],
  };
}

export function answerJson(verdict, message = `It is ${verdict}.`) {
  return {
    fits: verdict !== "does_not_fit",
    verdict,
    message,
    plan_id: "p",
    models: [{ node_id: "1", role: "generator", file: "high.safetensors", bytes: 14 * GB }],
    peak_phase: 0,
    phases: [
      {
        kind: "sample",
        node_ids: ["3"],
        title: "Sampling",
        models: ["high.safetensors"],
        width: 1280,
        height: 720,
        frames: 81,
        batch: 1,
        steps: 20,
        cfg: 3.5,
        resident_bytes: 14 * GB,
        other_models_bytes: 2 * GB,
        streamed_bytes: 0,
        activation_bytes: { expected: 7 * GB, lower: 6 * GB, upper: 8 * GB },
        peak_allocated_bytes: { expected: 21 * GB, lower: 20 * GB, upper: 22 * GB },
        available_bytes: 15 * GB,
        short_bytes: 6 * GB,
      },
    ],
    fixes: [
      {
        id: "shorter_video",
        title: "Make the video 53 frames long instead of 81",
        changes: [{ node_id: "3", input: "length", value: 53, old: 81 }],
        saves_bytes: GB,
        cost: "",
        picture: "shorter",
        verdict: "fits",
        note: "",
      },
      {
        id: "tiled_decode",
        title: "Decode in tiles",
        changes: [{ node_id: "8", class_type: "VAEDecodeTiled", inputs: { samples: ["3", 0] }, old_class_type: "VAEDecode", old_inputs: {} }],
        saves_bytes: 0,
        cost: "2 tiles",
        picture: "tiled",
        verdict: "fits",
        note: "",
      },
      { id: "flag_lowvram", title: "Start ComfyUI with --lowvram", changes: [], saves_bytes: GB, cost: "", picture: "slower", verdict: "fits", note: "" },
    ],
    ram: null,
    assumptions: ["Node Foo is not known."],
  };
}

/** @param {unknown} body */
export function response(body, status = 200) {
  return new Response(typeof body === "string" ? body : JSON.stringify(body), { status });
}
