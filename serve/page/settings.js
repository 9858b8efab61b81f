// The form: what the models take, and what the user wants.

const KEPT = "allaprima.settings";
const SHAPES = [
  ["Square", 1, 1],
  ["Portrait", 3, 4],
  ["Tall portrait", 2, 3],
  ["Landscape", 4, 3],
  ["Wide landscape", 3, 2],
  ["Cinema", 16, 9],
];
const $ = (id) => document.getElementById(id);

/** A whole seed, null for a random one, or an Error that says what is wrong. */
function readSeed(text) {
  const seed = text.trim();
  if (seed === "" || seed === "-1") return null;
  if (!/^\d{1,15}$/.test(seed)) throw new Error("The seed should be a whole number, or empty for a random one.");
  return Number(seed);
}

export class Settings {
  #models = [];
  #samplers = [];
  #start;

  constructor(start) {
    this.#start = start;
    $("model").addEventListener("change", () => this.#takeModel());
    $("size").addEventListener("change", () => this.#showSize());
    $("swap").addEventListener("click", () => this.#swap());
    $("sampler").addEventListener("change", () => this.#describeSampler());
    $("seed-random").addEventListener("click", () => { $("seed").value = ""; this.save(); });
    $("reset").addEventListener("click", () => { this.#takeModel(); $("negative").value = ""; this.save(); });
    for (const side of ["width", "height"]) $(side).addEventListener("change", () => this.#fit(side));
    for (const slide of document.querySelectorAll(".slide")) this.#couple(slide, $(slide.dataset.for));
    $("order").addEventListener("change", () => this.save());
    start.addEventListener("change", () => this.#takeShape());
  }

  /** The models that there are, the default first, and the samplers. */
  offer(models, samplers) {
    this.#models = models;
    this.#samplers = samplers;
    $("model").replaceChildren(...models.map(({ name }) => new Option(name, name)));
    $("model-field").hidden = models.length < 2;
    $("sampler").replaceChildren(
      new Option("The model's own", ""),
      ...samplers.map(({ name, title }) => new Option(title ?? name, name)),
    );
    this.#takeModel();
    this.#restore();
  }

  /** The name of the model if there is but one. */
  get single() {
    return this.#models.length === 1 ? this.#models[0].name : null;
  }

  /** Whether there is a model to paint with. */
  get ready() {
    return this.#models.length > 0;
  }

  get model() {
    return this.#models.find(({ name }) => name === $("model").value) ?? this.#models[0];
  }

  /** What to send. Throws Error that says what is wrong, with the `field` it is about. */
  order() {
    const prompt = $("prompt").value.trim();
    if (!prompt) throw Object.assign(new Error("Write a prompt first."), { field: $("prompt") });
    const order = {
      prompt,
      negative_prompt: $("negative").value.trim() || undefined,
      model: this.model.name,
      num_inference_steps: this.#number("steps", "Steps"),
      guidance_scale: this.#number("guidance", "Guidance"),
      sampler: $("sampler").value || undefined,
      width: this.#number("width", "Width"),
      height: this.#number("height", "Height"),
      num_images: this.#number("count", "Pictures"),
    };
    try {
      order.seed = readSeed($("seed").value) ?? undefined;
    } catch (error) {
      throw Object.assign(error, { field: $("seed") });
    }
    if (this.#start.chosen && !$("start").hidden) {
      order.image = this.#start.chosen.image;
      order.strength = this.#number("strength", "Strength");
    }
    if (this.model.previews) order.preview_every = Math.max(1, Math.round(order.num_inference_steps / 20));
    return order;
  }

  /** Fill the form with how a picture was made. */
  use(parameters, model) {
    const chosen = this.#models.find(({ name }) => name === model);
    if (chosen) $("model").value = chosen.name;
    this.#takeModel();
    $("prompt").value = parameters.prompt ?? "";
    $("negative").value = parameters.negative_prompt ?? "";
    this.#set("steps", parameters.num_inference_steps);
    this.#set("guidance", parameters.guidance_scale);
    this.#set("strength", parameters.strength);
    $("sampler").value = this.#samplers.some(({ name }) => name === parameters.sampler) ? parameters.sampler : "";
    $("seed").value = parameters.seed ?? "";
    this.#setSize(parameters.width, parameters.height);
    this.#describeSampler();
    $("size-note").textContent = "";
    this.save();
  }

  useSeed(seed) {
    $("seed").value = seed;
    this.save();
  }

  save() {
    const values = {};
    for (const id of ["prompt", "negative", "model", "steps", "guidance", "sampler", "seed", "count", "strength",
      "width", "height"]) values[id] = $(id).value;
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(values));
    } catch { /* then a reload forgets them */ }
  }

  #restore() {
    let values = {};
    try {
      values = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");
    } catch { /* nothing usable */ }
    if (this.#models.some(({ name }) => name === values.model)) {
      $("model").value = values.model;
      this.#takeModel();
    }
    for (const id of ["prompt", "negative", "sampler", "seed"]) {
      if (values[id] && !$(id).value) $(id).value = values[id];
    }
    for (const id of ["steps", "guidance", "count", "strength"]) if (values[id]) this.#set(id, values[id]);
    if (values.width && values.height) this.#setSize(Number(values.width), Number(values.height));
    this.#describeSampler();
  }

  #number(id, label) {
    const input = $(id);
    const value = Number(input.value);
    if (input.value.trim() === "" || !Number.isFinite(value)) {
      throw Object.assign(new Error(`${label} should be a number.`), { field: input });
    }
    if (value < Number(input.min) || (input.max && value > Number(input.max))) {
      const range = input.max ? `between ${input.min} and ${input.max}` : `at least ${input.min}`;
      throw Object.assign(new Error(`${label} should be ${range}.`), { field: input });
    }
    return value;
  }

  /** A number and its slider show the same. */
  #couple(slide, input) {
    slide.value = input.value;
    slide.addEventListener("input", () => { input.value = slide.value; });
    input.addEventListener("input", () => { slide.value = input.value; });
  }

  #set(id, value) {
    if (value === undefined || value === null) return;
    $(id).value = value;
    $(id).dispatchEvent(new Event("input"));
  }

  /** The settings that a model is best with, and the sizes that it can. */
  #takeModel() {
    const { height, width, multiple, takes, num_inference_steps, guidance_scale, most } = this.model;
    $("steps").max = most.num_inference_steps;
    $("count").max = most.num_images;
    for (const slide of document.querySelectorAll('.slide[data-for="steps"]')) {
      slide.max = Math.min(60, most.num_inference_steps);
    }
    for (const side of ["width", "height"]) Object.assign($(side), { min: multiple, step: multiple });
    this.#set("steps", num_inference_steps);
    this.#set("guidance", guidance_scale);
    $("sampler").value = "";
    this.#describeSampler();
    const sizes = this.#sizes();
    $("size").replaceChildren(
      ...sizes.map(([label, width, height]) => new Option(`${label}, ${width} × ${height}`, `${width}x${height}`)),
      new Option("Another size", "custom"),
    );
    this.#setSize(width, height);
    $("size-note").textContent = "";
    $("start").hidden = !takes.includes("image");
    if (this.#start.chosen) this.#takeShape();
  }

  /** Sides of a shape whose area is the model's usual one. */
  #sides(width, height) {
    const { multiple } = this.model;
    const scale = Math.sqrt((this.model.width * this.model.height) / (width * height));
    return [width, height].map((side) => Math.max(multiple, Math.round((side * scale) / multiple) * multiple));
  }

  #sizes() {
    const { model } = this;
    const found = new Map([[`${model.width}x${model.height}`, ["The model's own", model.width, model.height]]]);
    for (const [label, across, down] of SHAPES) {
      const [width, height] = this.#sides(across, down);
      const name = `${width}x${height}`;
      if (!found.has(name)) found.set(name, [label, width, height]);
    }
    return [...found.values()];
  }

  #setSize(width, height) {
    if (!width || !height) return;
    Object.assign($("width"), { value: width });
    Object.assign($("height"), { value: height });
    const name = `${width}x${height}`;
    $("size").value = [...$("size").options].some(({ value }) => value === name) ? name : "custom";
    $("custom-size").hidden = $("size").value !== "custom";
  }

  #showSize() {
    const chosen = $("size").value;
    if (chosen !== "custom") this.#setSize(...chosen.split("x").map(Number));
    $("custom-size").hidden = chosen !== "custom";
    $("size-note").textContent = "";
  }

  #swap() {
    [$("width").value, $("height").value] = [$("height").value, $("width").value];
    this.save();
  }

  /** A side that the model cannot paint becomes the nearest that it can. */
  #fit(side) {
    const { multiple } = this.model;
    const given = Number($(side).value) || this.model[side];
    const nearest = Math.max(multiple, Math.round(given / multiple) * multiple);
    $("size-note").textContent = nearest === given ? "" : `Sides are multiples of ${multiple}: ${given} became ${nearest}.`;
    $(side).value = nearest;
  }

  /** With a picture to begin with, its shape is the one to paint. */
  #takeShape() {
    if (!this.#start.chosen) return;
    this.#setSize(...this.#sides(this.#start.chosen.width, this.#start.chosen.height));
    $("size-note").textContent = "In the shape of the picture that it begins with.";
    this.save();
  }

  #describeSampler() {
    const info = this.#samplers.find(({ name }) => name === $("sampler").value);
    $("sampler-note").textContent = info?.description ?? "";
  }
}
