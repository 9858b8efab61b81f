// The page: what a user does, and what is shown in answer.

import * as api from "./api.js";
import { Gallery } from "./gallery.js";
import { Paintings } from "./paintings.js";
import { Queue } from "./queue.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { Start } from "./start.js";
import { doing, progress, samplerTitles } from "./words.js";

const RETRY = 2000;
const $ = (id) => document.getElementById(id);

const start = new Start();
const settings = new Settings(start);
const paintings = new Paintings();
const stage = new Stage();
const gallery = new Gallery();
const queue = new Queue(cancel);

function notice(text) {
  if ($("notice-text").textContent === (text ?? "")) return; // an alert is read out whenever it is set
  $("notice").hidden = text === null;
  $("notice-text").textContent = text ?? "";
}

/** Tell those who listen to the page; the same text twice is told twice. */
function say(text) {
  $("live").replaceChildren(Object.assign(document.createElement("p"), { textContent: text }));
}

function show(painting, index = 0) {
  stage.show(painting, index);
  gallery.choose(painting, index);
}

async function paint() {
  if ($("paint").disabled) return;
  if (!settings.ready) return connect();
  notice(null);
  let order;
  try {
    order = settings.order();
  } catch (error) {
    notice(error.message);
    error.field?.focus();
    return;
  }
  settings.save();
  $("paint").disabled = true;
  try {
    await paintings.submit(order, order.image ? start.chosen : null);
    if (narrow()) $("stage").scrollIntoView({ block: "start" });
    queue.look();
  } catch (error) {
    notice(error.message);
  } finally {
    $("paint").disabled = false;
  }
}

/** Stop a job, of this tab or not. */
async function cancel(id) {
  const painting = paintings.list.find((each) => each.id === id);
  if (painting) painting.cancelling = true;
  stage.draw();
  try {
    await api.cancel(id);
  } catch (error) {
    if (painting) painting.cancelling = false;
    notice(error.message);
    stage.draw();
  }
  queue.look();
}

const narrow = () => matchMedia("(max-width: 55rem)").matches;

paintings.addEventListener("change", ({ detail: { painting, kind } }) => {
  if (kind === "added") {
    gallery.add(painting);
    show(painting);
  } else if (kind === "removed") {
    gallery.remove(painting);
    if (stage.painting === painting) show(paintings.list[0] ?? null);
  } else {
    gallery.draw(painting);
    if (stage.painting === painting) kind === "preview" ? stage.drawPreview() : stage.draw();
    announce(painting, kind);
    if (kind === "ended") queue.look();
  }
  title();
});

/** Every change of the state and every quarter is worth a word. */
function announce(painting, kind) {
  if (kind === "preview") return;
  const told = painting.over || painting.state === "queued"
    ? doing(painting)
    : `${Math.floor(progress(painting) * 4) * 25} percent`;
  if (painting.told === told) return;
  painting.told = told;
  say(painting.state === "done" ? `The picture is done: ${painting.order.prompt}` : told);
  if (painting.state === "done") {
    $("seed-last").disabled = false;
    $("seed-last").dataset.seed = painting.parameters[0]?.seed ?? "";
  }
}

function title() {
  const painted = paintings.list.filter((each) => each.state === "running").at(-1);
  document.title = painted ? `${Math.floor(progress(painted) * 100)} % · Allaprima` : "Allaprima";
}

/** The settings of what is shown, and the picture that it began with. */
function use() {
  const { painting, index } = stage;
  start.choose(painting.start ?? null);
  const parameters = painting.parameters[index] ?? painting.order;
  settings.use(parameters, painting.status.model ?? painting.order.model);
  notice(parameters.strength && !painting.start
    ? "The picture that it began with is no longer here: choose it again."
    : null);
  say("These settings are in the form now.");
  $("prompt").focus();
}

stage.addEventListener("cancel", () => cancel(stage.painting.id));
stage.addEventListener("use", use);
stage.addEventListener("seed", () => {
  const { seed } = stage.painting.parameters[stage.index];
  settings.useSeed(seed);
  say(`The next picture has the seed ${seed}.`);
});
stage.addEventListener("over", async () => {
  await start.take(stage.picture.blob, $("download").download);
  $("settings").open = true;
  $("strength").focus();
});
stage.addEventListener("remove", () => {
  paintings.remove(stage.painting);
  ($("thumbs").querySelector("button") ?? $("prompt")).focus();
});
gallery.addEventListener("choose", ({ detail: { painting, index } }) => {
  show(painting, index);
  if (narrow()) $("stage").scrollIntoView({ block: "start" });
});
start.addEventListener("problem", ({ detail }) => notice(detail));
start.addEventListener("change", () => {
  if (start.chosen) {
    notice(null);
    $("settings").open = true;
    say("This picture is the one to begin with.");
  }
});

$("order").addEventListener("submit", (event) => {
  event.preventDefault();
  paint();
});
$("notice-close").addEventListener("click", () => notice(null));
$("seed-last").addEventListener("click", () => settings.useSeed($("seed-last").dataset.seed));
addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  paint();
});

/** The key, or null if the user has none. Escape is Cancel. */
function askForKey(wasWrong) {
  const dialog = $("key-dialog");
  $("key-text").textContent = wasWrong ? "That key is not known here." : "This server wants a key.";
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue === "given" ? $("key").value.trim() : null), {
      once: true,
    });
  });
}
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-dialog").close("given");
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close(""));
api.onUnauthorized(askForKey);

/** Until the server is there and ready; one that wants a key and does not get it is asked again by "Paint". */
async function connect() {
  $("paint").disabled = true;
  while (!settings.ready) {
    try {
      const [models, samplers] = await Promise.all([api.models(), api.samplers()]);
      for (const { name, title } of samplers) samplerTitles.set(name, title);
      settings.offer(models, samplers);
    } catch (error) {
      notice(error.message);
      $("server").textContent = error.status === 401 ? "Locked" : "Waiting for the server…";
      if (error.status === 401) break;
      await new Promise((resume) => setTimeout(resume, RETRY));
    }
  }
  $("paint").disabled = false;
  if (!settings.ready) return;
  notice(null);
  $("server").textContent = settings.single ?? "";
  paintings.restore();
  queue.look();
}

$("settings").open = !narrow();
connect();
