// What this tab has asked for: each painting is one job of the server, with one picture or several.

import * as api from "./api.js";

const KEPT = "allaprima.jobs";
const ENDED = ["done", "failed", "cancelled"];
/** Browsers keep six connections to a server, for all tabs together: a stream holds one. */
const MOST_STREAMS = 2;
const POLL = 1000;
const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));

class Painting {
  constructor(id, order) {
    this.id = id;
    this.order = order;
    this.state = "queued";
    this.status = {};
    this.count = order.num_images ?? 1;
    this.previews = Array(this.count).fill(null);
    this.pictures = Array(this.count).fill(null);
    this.parameters = [];
    this.error = null;
    this.trouble = null;
    this.start = null;
  }

  get over() {
    return ENDED.includes(this.state);
  }

  /** Width by height. */
  get size() {
    const { width, height } = this.parameters[0] ?? this.order;
    return [width || 1, height || 1];
  }
}

/** Newest first. Tells of every "change", with the painting and what kind of change it was. */
export class Paintings extends EventTarget {
  list = [];
  #streams = 0;

  #tell(painting, kind) {
    this.dispatchEvent(new CustomEvent("change", { detail: { painting, kind } }));
  }

  #remember() {
    const kept = this.list.map(({ id, order }) => ({ id, order: { ...order, image: undefined } }));
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(kept));
    } catch { /* full or forbidden: then a reload forgets them */ }
  }

  #add(painting) {
    this.list.unshift(painting);
    this.#tell(painting, "added");
    this.#follow(painting);
    return painting;
  }

  /** Ask the server to paint; `start` is the picture that it begins with. Throws ApiError. */
  async submit(order, start = null) {
    const status = await api.submit(order);
    const painting = new Painting(status.id, order);
    Object.assign(painting, { status, start });
    this.#add(painting);
    this.#remember();
    return painting;
  }

  /** Those of before a reload, as far as the server still has them. */
  restore() {
    let kept = [];
    try {
      kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
    } catch { /* nothing usable */ }
    for (const { id, order } of kept.reverse()) this.#add(new Painting(id, order));
  }

  remove(painting) {
    this.list = this.list.filter((each) => each !== painting);
    for (const picture of painting.pictures) if (picture) URL.revokeObjectURL(picture.url);
    this.#remember();
    this.#tell(painting, "removed");
  }

  async #follow(painting) {
    for (let failures = 0; !painting.over;) {
      try {
        if (this.#streams < MOST_STREAMS) await this.#listen(painting, () => { failures = 0; });
        else await pause(POLL);
        if (!painting.over) await this.#update(painting, await api.job(painting.id));
        failures = 0;
      } catch (cause) {
        if (cause.status === 404) return this.#fail(painting, "The server no longer has this painting.");
        if (cause.status === 401) return this.#fail(painting, cause.message);
        failures += 1;
        painting.trouble = cause.message;
        this.#tell(painting, "status");
        await pause(Math.min(500 * 2 ** failures, 8000));
      }
    }
  }

  /** Until it has ended; `heard` is called at every event. */
  async #listen(painting, heard) {
    this.#streams += 1;
    try {
      await api.events(painting.id, (name, data) => {
        heard();
        this.#take(painting, name, data);
      });
    } finally {
      this.#streams -= 1;
    }
  }

  #fail(painting, error) {
    Object.assign(painting, { state: "failed", error, trouble: null });
    this.#tell(painting, "ended");
  }

  #take(painting, name, data) {
    if (name === "preview") this.#preview(painting, data);
    else if (name === "status" && !ENDED.includes(data.state)) this.#update(painting, data);
    // After "ended" the stream ends, and #follow asks for the outcome.
  }

  async #preview(painting, { index, image }) {
    const preview = new Image();
    preview.src = image;
    try {
      await preview.decode();
    } catch {
      return;
    }
    painting.previews[index] = preview;
    this.#tell(painting, "preview");
  }

  async #update(painting, status) {
    if (painting.over) return;
    painting.trouble = null;
    painting.status = status;
    if (status.state === "done") return this.#collect(painting);
    painting.state = status.state;
    painting.error = status.error ?? null;
    this.#tell(painting, painting.over ? "ended" : "status");
  }

  /** A painting is done for the page when its pictures are here. Throws ApiError where they are not. */
  async #collect(painting) {
    const { id, count, status } = painting;
    const blobs = await Promise.all(Array.from({ length: count }, (_, index) => api.picture(id, index)));
    painting.pictures = blobs.map((blob) => ({ blob, url: URL.createObjectURL(blob) }));
    painting.parameters = status.parameters ?? [];
    painting.state = "done";
    this.#tell(painting, "ended");
  }
}
