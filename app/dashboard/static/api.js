// Client of the service's API for this page: sends requests with the reader's API key, turns problem documents into errors
// and reads the event stream of a job.

const STORED = "secateur-key";
const RECONNECT_MS = 1000;

/** The key stays in this tab: a fragment `#key=…` sets it, and goes from the address at once. */
export const key = {
  get: () => sessionStorage.getItem(STORED),
  set: (value) => sessionStorage.setItem(STORED, value),
  forget: () => sessionStorage.removeItem(STORED),
};

/** An RFC 9457 problem: `code`, `detail`, and `errors` [{field, message, allowed}]. */
export class Problem extends Error {
  constructor(status, body) {
    super(body.detail ?? body.title ?? `The service answered ${status}.`);
    Object.assign(this, { status, code: body.code, errors: body.errors ?? [] });
  }
}

async function call(path, options = {}) {
  const headers = { Authorization: `Bearer ${key.get()}`, ...options.headers };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.status === 401) window.dispatchEvent(new Event("unauthorized"));
  if (!response.ok) throw new Problem(response.status, await response.json().catch(() => ({})));
  return response;
}

async function json(path, options) {
  const response = await call(path, options);
  return response.status === 204 ? null : response.json();
}

export const get = (path, signal) => json(path, { signal });
export const remove = (path) => json(path, { method: "DELETE" });

export function post(path, body = undefined, { signal, headers } = {}) {
  const content = body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers } };
  return json(path, { method: "POST", signal, ...content });
}

/** A file, saved under its name. It needs the key, so no plain link would do. */
export async function download(path, name) {
  const url = URL.createObjectURL(await (await call(path)).blob());
  const link = document.createElement("a");
  Object.assign(link, { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Follow a job: `onFrame(event, data)` for every frame until `end`, connecting again from the last event when the line breaks. */
export async function follow(jobId, onFrame, signal) {
  let last = 0;
  while (!signal.aborted) {
    try {
      const response = await call(`/v1/jobs/${jobId}/events/stream`, { signal, headers: { "Last-Event-ID": String(last) } });
      for await (const frame of frames(response.body)) {
        if (frame.id) last = Number(frame.id);
        onFrame(frame.event, JSON.parse(frame.data));
        if (frame.event === "end") return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status < 500 && error.status !== 429) throw error;
    }
    await new Promise((done) => setTimeout(done, RECONNECT_MS));
  }
}

/** Server-Sent Events (HTML standard, section 9.2), read from a fetch: EventSource sends no Authorization. */
async function* frames(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).replaceAll("\r\n", "\n").split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const frame = { event: "message", data: "" };
      for (const line of block.split("\n")) {
        const [, field, content] = /^(\w+): ?(.*)$/.exec(line) ?? [];
        if (field) frame[field] = field === "data" ? frame.data + content : content;
      }
      if (frame.data) yield frame;
    }
  }
}
