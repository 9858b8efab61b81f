// What waits and runs on the server: one's own jobs, and how many there are of others.

import * as api from "./api.js";
import { doing } from "./words.js";

const SLOW = 6000;
const FAST = 1000;
const $ = (id) => document.getElementById(id);

export class Queue {
  #timer = 0;
  #cancel;

  /** `cancel(id)` stops a job. */
  constructor(cancel) {
    this.#cancel = cancel;
    $("queue-open").addEventListener("click", () => {
      $("queue").showModal();
      this.look();
    });
    $("queue-close").addEventListener("click", () => $("queue").close());
    $("queue").addEventListener("click", (event) => {
      if (event.target === $("queue")) $("queue").close(); // outside of it
    });
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** Ask now, and from time to time from now on. Nobody is asked while nobody looks. */
  async look() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    try {
      this.#draw(await api.jobs());
    } catch (cause) {
      if ($("queue").open) $("queue-note").textContent = cause.message;
      if (cause.status === 401) return; // look() is called again when there is a key
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.look(), $("queue").open ? FAST : SLOW);
  }

  #draw({ jobs, queued, running }) {
    const all = Math.max(queued + running, jobs.length);
    $("queue-count").hidden = all === 0;
    $("queue-count").textContent = all;
    $("queue-open").setAttribute("aria-label", `Queue: ${all} ${all === 1 ? "painting" : "paintings"}`);
    if (!$("queue").open) return;
    const others = all - jobs.length;
    $("queue-note").textContent = all === 0
      ? "Nobody waits: a new painting begins at once."
      : others ? `And ${others} of other people.` : "";
    const focused = document.activeElement?.dataset?.job;
    $("queue-list").replaceChildren(...jobs.map((job) => this.#row(job)));
    if (focused) {
      const button = $("queue-list").querySelector(`[data-job="${CSS.escape(focused)}"]`);
      (button ?? $("queue-close")).focus();
    }
  }

  #row(job) {
    const row = document.createElement("li");
    const pictures = job.images > 1 ? `, ${job.images} pictures` : "";
    const text = make("div", {});
    text.append(
      make("p", { className: "title", textContent: job.prompt }),
      make("p", {
        className: "soft",
        textContent: `${doing({ state: job.state, status: job })} · ${job.model}${pictures}`,
      }),
    );
    const button = make("button", { type: "button", textContent: "Cancel" });
    button.dataset.job = job.id;
    button.setAttribute("aria-label", `Cancel ${job.prompt}`);
    button.addEventListener("click", () => this.#cancel(job.id));
    row.append(text, button);
    if (job.state === "running") row.append(make("progress", { max: 1, value: job.progress }));
    return row;
  }
}

function make(kind, properties) {
  return Object.assign(document.createElement(kind), properties);
}
