// The graphs a person does not want to be asked about again, kept in this browser.

const KEY = "VRAMHeadroom.DoNotAsk";
/** The oldest are forgotten; a key has 16 characters. */
const MOST = 200;

export class Remembered {
  #store;

  /** @param {Pick<Storage, "getItem" | "setItem">} store */
  constructor(store) {
    this.#store = store;
  }

  /** @param {string} graph its key */
  has(graph) {
    return this.#read().includes(graph);
  }

  /** @param {string} graph @param {boolean} wanted */
  set(graph, wanted) {
    const others = this.#read().filter((known) => known !== graph);
    try {
      this.#store.setItem(KEY, JSON.stringify((wanted ? [...others, graph] : others).slice(-MOST)));
    } catch {
      // a browser that stores nothing asks again, and that is all
    }
  }

  /** @returns {string[]} */
  #read() {
    try {
      const found = JSON.parse(this.#store.getItem(KEY) ?? "[]");
      return Array.isArray(found) ? found.filter((graph) => typeof graph === "string") : [];
    } catch {
      return [];
    }
  }
}
