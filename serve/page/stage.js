// The one picture that is looked at: while it is painted, and when it is done.

import { describe, doing, progress } from "./words.js";

const $ = (id) => document.getElementById(id);

/** Tells of "cancel", "use", "seed", "over" and "remove", wanted of the painting that is shown. */
export class Stage extends EventTarget {
  painting = null;
  index = 0;

  constructor() {
    super();
    const wishes = { cancel: "cancel", use: "use", "reuse-seed": "seed", "paint-over": "over", remove: "remove" };
    for (const [id, wish] of Object.entries(wishes)) {
      $(id).addEventListener("click", () => this.dispatchEvent(new Event(wish)));
    }
  }

  /** Show a picture of a painting; null shows the empty easel. */
  show(painting, index = 0) {
    this.painting = painting;
    this.index = index;
    this.draw();
  }

  get picture() {
    return this.painting?.pictures[this.index] ?? null;
  }

  draw() {
    const { painting } = this;
    $("easel").classList.toggle("empty", painting === null);
    $("empty").hidden = painting !== null;
    const [width, height] = painting?.size ?? [1, 1];
    $("easel").style.setProperty("--ratio", width / height);
    $("easel").style.setProperty("--natural", `${width}px`);
    this.drawPreview();
    this.#drawPicture();
    this.#drawProgress();
    this.#drawFacts();
  }

  /** A preview has a pixel for each latent: drawn large, and the blurrier the earlier it is. */
  drawPreview() {
    const image = this.painting?.previews[this.index];
    const canvas = $("preview");
    canvas.hidden = !image || this.picture !== null || this.painting.state !== "running";
    if (canvas.hidden) return;
    const scale = Math.ceil(640 / image.naturalWidth);
    const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, width, height);
    canvas.style.setProperty("--early", 1 - progress(this.painting));
    canvas.dataset.drawn = Number(canvas.dataset.drawn ?? 0) + 1;
  }

  #drawPicture() {
    const { picture } = this;
    $("picture").hidden = picture === null;
    if (picture === null) {
      $("picture").removeAttribute("src");
      return;
    }
    if ($("picture").src !== picture.url) $("picture").src = picture.url;
    $("picture").alt = this.painting.order.prompt;
  }

  #drawProgress() {
    const { painting } = this;
    const painted = painting !== null && !painting.over;
    $("progress-box").hidden = !painted;
    $("easel").classList.toggle("painted", painted);
    if (painted) {
      $("progress").value = progress(painting);
      $("progress-text").textContent = doing(painting);
      $("cancel").disabled = painting.cancelling ?? false;
    }
    const failed = painting?.over && painting.state !== "done";
    $("failure").hidden = !failed;
    $("failure").className = painting?.state === "cancelled" ? "soft calm" : "notice";
    $("failure").textContent = failed ? doing(painting) : "";
  }

  #drawFacts() {
    const { painting, picture } = this;
    $("actions").hidden = !painting?.over;
    for (const id of ["download", "reuse-seed", "paint-over"]) $(id).hidden = picture === null;
    const parameters = painting?.parameters[this.index];
    if (picture !== null) {
      $("download").href = picture.url;
      $("download").download = `allaprima-${parameters?.seed ?? painting.id}.png`;
    }
    const warnings = picture === null ? [] : [...painting.status.warnings ?? []];
    if (painting?.status.flagged?.[this.index]) warnings.push("The model's safety checker blurred this picture.");
    $("warnings").hidden = warnings.length === 0;
    $("warnings").textContent = warnings.join(" ");
    $("parameters").hidden = !parameters;
    const lines = parameters ? describe(parameters, painting.status) : [];
    $("parameters").replaceChildren(...lines.flatMap(([title, text]) => [make("dt", title), make("dd", text)]));
  }
}

function make(kind, text) {
  return Object.assign(document.createElement(kind), { textContent: text });
}
