// Draws at most twice a second, however much happens, and not at all while nobody can see it.

/** Between two updates. */
export const SPACING_MS = 500;

export class Pace {
  #draw;
  #now;
  #last = -Infinity;
  #hidden = false;
  #wanted = false;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;

  /** @param {() => void} draw @param {() => number} [now] milliseconds */
  constructor(draw, now = () => Date.now()) {
    this.#draw = draw;
    this.#now = now;
  }

  /** Something has changed. */
  request() {
    this.#wanted = true;
    if (this.#hidden || this.#timer !== undefined) return;
    // clamped from above too: a clock set back must not stop the drawing
    const rest = Math.min(SPACING_MS, this.#last + SPACING_MS - this.#now());
    if (rest <= 0) this.#run();
    else this.#timer = setTimeout(() => this.#run(), rest);
  }

  /** @param {boolean} hidden */
  setHidden(hidden) {
    this.#hidden = hidden;
    if (hidden) this.stop();
    else if (this.#wanted) this.request();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  #run() {
    this.stop();
    this.#wanted = false;
    this.#last = this.#now();
    this.#draw();
  }
}
