// The server's own API. With keys switched on, everything wants the header, streams and pictures too, which is
// why neither EventSource nor plain image addresses are used.

const KEY = "allaprima.key";

/** What the server refused, or that it did not answer (`status` 0). */
export class ApiError extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let askForKey = async () => null;
let asking = null;

/** `ask(wasWrong)` gets a key from the user, null if there is none. */
export function onUnauthorized(ask) {
  askForKey = ask;
}

/** One question at a time, whatever number of requests were refused. */
async function newKey(used) {
  const known = sessionStorage.getItem(KEY);
  if (known !== null && known !== used) return known;
  asking ??= askForKey(used !== null).finally(() => { asking = null; });
  const key = await asking;
  if (key !== null) sessionStorage.setItem(KEY, key);
  return key;
}

async function send(path, options, key) {
  const headers = { ...options.headers };
  if (key !== null) headers["x-api-key"] = key;
  try {
    return await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (cause) {
    if (cause.name === "AbortError") throw cause;
    throw new ApiError("The server does not answer. Is it running, and are you connected?", 0);
  }
}

/** The response, if it is a good one; asks for a key as often as it takes. */
async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(path, options, key);
    if (response.ok) return response;
    if (response.status !== 401) throw await failure(response);
    if (await newKey(key) === null) throw new ApiError("This server wants an API key.", 401);
  }
}

async function failure(response) {
  let told = null;
  try {
    told = message(await response.json());
  } catch { /* not JSON: the status has to do */ }
  const wait = Number(response.headers.get("retry-after"));
  return new ApiError(told ?? `The server answered ${response.status}.`, response.status, wait || null);
}

function message(body) {
  const said = body?.error?.message ?? body?.detail ?? body?.error;
  if (typeof said === "string") return said;
  if (Array.isArray(said)) return said.map((each) => `${(each.loc ?? []).at(-1) ?? ""}: ${each.msg}`).join("; ");
  return null;
}

const json = (body) => ({
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify(body),
});
const at = (id) => `api/jobs/${encodeURIComponent(id)}`;

export const models = async () => (await request("api/models")).json();
export const samplers = async () => (await request("api/samplers")).json();
/** { jobs, queued, running }: one's own jobs, and how many there are of all. */
export const jobs = async () => (await request("api/jobs")).json();
export const job = async (id) => (await request(at(id))).json();
export const submit = async (order) => (await request("api/jobs", json(order))).json();
export const cancel = async (id) => { await request(at(id), { method: "DELETE" }); };
export const picture = async (id, index) => (await request(`${at(id)}/images/${index}`)).blob();

/** Calls `take(name, data)` for each event of a job until the stream ends. */
export async function events(id, take) {
  const response = await request(`${at(id)}/events`, { headers: { accept: "text/event-stream" } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) dispatch(block, take);
    }
  } catch (cause) {
    if (cause instanceof TypeError) throw new ApiError("The connection was lost.", 0);
    throw cause;
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dispatch(block, take) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  if (data.length) take(name, JSON.parse(data.join("\n")));
}
