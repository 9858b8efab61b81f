// How a painting is told of in words.

const TITLES = {
  prompt: "Prompt",
  negative_prompt: "Negative prompt",
  bundle: "Model",
  size: "Size",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  sampler: "Sampler",
  seed: "Seed",
  strength: "Strength",
  seconds: "Took",
};

const ordinal = (n) => {
  const ending = n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] ?? "th";
  return `${n}${ending}`;
};

/** From 0 to 1. */
export const progress = ({ over, status }) => over ? 1 : status.progress ?? 0;

/** One line on how far it is. */
export function doing({ state, status, error, trouble }) {
  if (trouble) return `${trouble} Trying again…`;
  if (state === "queued") {
    if (!status.position) return "Waiting…";
    return status.position === 1 ? "Next in the queue" : `Waiting, ${ordinal(status.position)} in the queue`;
  }
  if (state === "running") return status.steps ? `Step ${status.step} of ${status.steps}` : "Getting ready…";
  if (state === "cancelled") return "Cancelled";
  return state === "done" ? "Done" : error ?? "This painting failed.";
}

/** How users know a sampler, by its name. */
export const samplerTitles = new Map();

/** Title and text of everything that there is to know about a picture. */
export function describe(parameters, status) {
  const seconds = status.ended && status.started ? status.ended - status.started : null;
  const values = {
    ...parameters,
    sampler: samplerTitles.get(parameters.sampler) ?? parameters.sampler,
    size: parameters.width ? `${parameters.width} × ${parameters.height}` : null,
    seconds: seconds === null ? null : `${seconds.toFixed(1)} s`,
  };
  return Object.entries(TITLES)
    .filter(([name]) => values[name] !== null && values[name] !== undefined && values[name] !== "")
    .map(([name, title]) => [title, String(values[name])]);
}
