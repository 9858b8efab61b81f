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
    this.#list(jobs);
  }

  /** A job keeps its row, so that a button that is being pressed is still there when it is let go of. */
  #list(jobs) {
    const list = $("queue-list");
    const focused = list.contains(document.activeElement) ? document.activeElement : null;
    const rows = new Map([...list.children].map((row) => [row.dataset.job, row]));
    const there = new Set(jobs.map((job) => job.id));
    for (const [id, row] of rows) if (!there.has(id)) row.remove();
    jobs.forEach((job, place) => {
      const row = rows.get(job.id) ?? this.#row(job);
      fill(row, job);
      if (list.children[place] !== row) list.insertBefore(row, list.children[place] ?? null);
    });
    if (focused) (focused.isConnected ? focused : $("queue-close")).focus();
  }

  #row(job) {
    const row = document.createElement("li");
    row.dataset.job = job.id;
    const text = make("div", {});
    text.append(make("p", { className: "title", textContent: job.prompt }), make("p", { className: "soft" }));
    const button = make("button", { type: "button", textContent: "Cancel" });
    button.setAttribute("aria-label", `Cancel ${job.prompt}`);
    button.addEventListener("click", () => this.#cancel(job.id));
    row.append(text, button);
    return row;
  }
}

/** What of a row changes while its job waits and runs. */
function fill(row, job) {
  const pictures = job.images > 1 ? `, ${job.images} pictures` : "";
  row.querySelector(".soft").textContent = `${doing({ state: job.state, status: job })} · ${job.model}${pictures}`;
  if (job.state !== "running") return;
  if (!row.querySelector("progress")) row.append(make("progress", { max: 1 }));
  row.querySelector("progress").value = job.progress;
}

function make(kind, properties) {
  return Object.assign(document.createElement(kind), properties);
}
