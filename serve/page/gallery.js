// What this tab has painted and paints: a thumbnail for each picture, the newest first.

import { doing, progress } from "./words.js";

const $ = (id) => document.getElementById(id);

/** Tells of "choose", with the painting and the index of its picture. */
export class Gallery extends EventTarget {
  #items = new Map();
  #chosen = "";

  constructor() {
    super();
    $("thumbs").addEventListener("keydown", (event) => this.#move(event));
  }

  add(painting) {
    const items = painting.previews.map((_, index) => this.#item(painting, index));
    this.#items.set(painting.id, items);
    $("thumbs").prepend(...items);
    $("gallery-empty").hidden = true;
    this.draw(painting);
  }

  remove(painting) {
    for (const item of this.#items.get(painting.id) ?? []) item.remove();
    this.#items.delete(painting.id);
    $("gallery-empty").hidden = this.#items.size > 0;
  }

  /** Mark the one that is shown large. */
  choose(painting, index) {
    this.#chosen = painting ? `${painting.id}/${index}` : "";
    for (const button of $("thumbs").querySelectorAll("button")) {
      button.setAttribute("aria-current", String(button.dataset.of === this.#chosen));
    }
  }

  draw(painting) {
    this.#items.get(painting.id)?.forEach((item, index) => {
      const [button] = item.children;
      const [image, bar, badge] = button.children;
      const source = painting.pictures[index]?.url ?? painting.previews[index]?.src;
      if (source && image.src !== source) image.src = source;
      image.hidden = !source;
      button.style.setProperty("--ratio", painting.size[0] / painting.size[1]);
      button.classList.toggle("rough", painting.state !== "done");
      // What is not painted yet, or never will be, is one thing, however many pictures it is of.
      const apart = painting.state === "running" || painting.state === "done";
      item.hidden = index > 0 && !apart;
      bar.hidden = painting.state !== "running";
      bar.value = progress(painting);
      badge.hidden = apart;
      const word = { queued: "Waiting", failed: "Failed", cancelled: "Cancelled" }[painting.state] ?? "";
      badge.textContent = painting.count > 1 ? `${word} × ${painting.count}` : word;
      const which = painting.count > 1 ? `, picture ${index + 1} of ${painting.count}` : "";
      button.setAttribute("aria-label", `${painting.order.prompt}${which}: ${doing(painting)}`);
    });
  }

  #item(painting, index) {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "thumb" });
    button.dataset.of = `${painting.id}/${index}`;
    button.append(
      Object.assign(document.createElement("img"), { alt: "", hidden: true }),
      Object.assign(document.createElement("progress"), { max: 1, value: 0 }),
      Object.assign(document.createElement("span"), { className: "badge" }),
    );
    button.children[1].setAttribute("aria-hidden", "true");
    button.addEventListener("click", () => {
      this.dispatchEvent(new CustomEvent("choose", { detail: { painting, index } }));
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  }

  /** Arrow keys go from one to the next. */
  #move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const buttons = [...$("thumbs").querySelectorAll("li:not([hidden]) button")];
    const next = buttons[buttons.indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  }
}
