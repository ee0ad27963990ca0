// The router's snapshots, by server-sent events over fetch: unlike EventSource it can send a key, and sees a 401.

const KEY = "tokenrelay.key";
const RETRY_MS = [500, 1000, 2000, 4000, 8000];
const SILENCE_MS = 15000;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Headers of every request of this page. */
export function headers(more = {}) {
  const found = key.get();
  return found ? { ...more, Authorization: `Bearer ${found}` } : more;
}

/** Splits a stream of text into events {event, data}, wherever the pieces break (WHATWG HTML, 9.2). */
export class EventParser {
  constructor(onEvent) {
    this.onEvent = onEvent;
    this.rest = "";
    this.event = "";
    this.data = [];
  }

  push(piece) {
    const lines = (this.rest + piece).split(/\r\n|\n|\r(?!$)/);
    this.rest = lines.pop();
    for (const line of lines) this.#line(line);
  }

  #line(line) {
    if (line === "") {
      if (this.data.length) this.onEvent({ event: this.event || "message", data: this.data.join("\n") });
      this.event = "";
      this.data = [];
    } else if (line.startsWith("data:")) this.data.push(line.slice(line[5] === " " ? 6 : 5));
    else if (line.startsWith("event:")) this.event = line.slice(6).trim();
  }
}

/** Reads a response's events to its end. */
export async function readEvents(response, onEvent) {
  const parser = new EventParser(onEvent);
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    parser.push(decoder.decode(value, { stream: true }));
  }
}

/** What an error reply says, in OpenAI's shape or not. */
export async function errorOf(response) {
  try {
    const message = (await response.json()).error?.message;
    if (typeof message === "string") return message;
  } catch {
    // no JSON: the status has to do
  }
  return `the server answered ${response.status}`;
}

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Follows the mesh for ever. on.snapshot(object), on.history(points), on.state(live|lost|key, text), on.key(why): resolves once there is another; null: do not ask for it. */
export async function follow(on) {
  let failures = 0;
  for (;;) {
    const abort = new AbortController();
    let silence = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      const response = await fetch("/mesh/events", { headers: headers(), signal: abort.signal, cache: "no-store" });
      if (response.status === 401 || response.status === 403) {
        clearTimeout(silence);
        const asked = response.status === 401; // 403: it has a key, which is good for the chat alone
        on.state("key", asked ? "needs a key" : "this key may chat, not see the mesh");
        await on.key(asked ? await errorOf(response) : null);
        continue;
      }
      if (!response.ok) throw new Error(await errorOf(response));
      await readEvents(response, ({ event, data }) => {
        clearTimeout(silence);
        silence = setTimeout(() => abort.abort(), SILENCE_MS);
        failures = 0;
        if (event === "history") on.history(JSON.parse(data).points);
        else if (event === "snapshot") {
          on.state("live", "live");
          on.snapshot(JSON.parse(data));
        }
      });
      on.state("lost", "reconnecting");
    } catch (error) {
      on.state("lost", abort.signal.aborted ? "no news" : error instanceof TypeError ? "not reachable" : error.message);
    } finally {
      clearTimeout(silence);
    }
    const ms = RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)];
    await wait(ms * (0.75 + Math.random() / 2));
    while (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}
