// From a request's notes to the bars of its timeline. Pure functions: see tests/router/test_page.py.
import { duration, worker } from "./dom.js";

export const PHASES = {
  queued: "in the router",
  waiting: "waits at the worker",
  prefill: "prompt",
  transfer: "KV transfer",
  decode: "decode",
  moved: "moves",
};

/** The bars of one choice: [{phase, from_ms, to_ms, worker}]. Bars of an open request end at its age. */
export function phases(request, choice = 0) {
  const end = request.ended_ms ?? request.age_ms;
  const notes = request.notes.filter((note) => note.choice === choice || note.kind === "ended");
  const bars = [];
  let open = { phase: "queued", from_ms: 0, worker: "" };
  let [spoke, to] = [false, ""]; // its first token is there; the worker that will go on with it
  const begin = (phase, at, where) => {
    if (at > open.from_ms) bars.push({ ...open, to_ms: at });
    open = { phase, from_ms: at, worker: where };
  };
  for (const note of notes) {
    if (note.kind === "submitted") begin(spoke ? "decode" : "prefill", note.at_ms, note.worker);
    else if (note.kind === "prefill") {
      begin("prefill", note.at_ms, note.worker);
      to = note.to;
    } else if (note.kind === "started" && open.phase === "prefill") {
      open.phase = "waiting";
      begin("prefill", note.at_ms, open.worker);
    } else if (note.kind === "first_token") {
      spoke = true;
      begin(to ? "transfer" : "decode", note.at_ms, to || open.worker);
    } else if (note.kind === "handed_over") {
      begin("decode", note.at_ms, note.to);
      to = "";
    } else if (note.kind === "moved") {
      begin("moved", note.at_ms, note.worker);
      to = "";
    } else if (note.kind === "parked") begin("queued", note.at_ms, "");
    else if (note.kind === "ended") break;
  }
  if (end > open.from_ms || !bars.length) bars.push({ ...open, to_ms: Math.max(end, open.from_ms) });
  return bars;
}

/** What a note says, in words. */
export function words(note) {
  const [at, to] = [worker(note.worker), worker(note.to)];
  switch (note.kind) {
    case "submitted": return `submitted to ${at}`;
    case "prefill": return `its prompt goes to ${at} (${note.detail} to compute), ${to} will decode it`;
    case "started": return `${at || "the worker"} begins with the prompt`;
    case "offered": return `${at} offers its KV, ${to} claims it and pulls blocks as they are sealed`;
    case "first_token": return "first token";
    case "handed_over": return `${to} has the KV of ${at} and decodes`;
    case "handover_failed": return `the handover failed at ${at}: ${note.detail}`;
    case "parked": return `no worker is usable, it waits for one: ${note.detail}`;
    case "moved": return `leaves ${at} (${note.detail}) and goes on elsewhere`;
    case "ended": return `ended: ${note.detail}`;
    default: return note.kind;
  }
}

const GOOD = new Set(["stop", "length", "tool_calls"]);

/** [text, whether it is bad] of a request's state. */
export function stateOf(request) {
  if (request.ended_ms !== null) return [request.outcome, !GOOD.has(request.outcome)];
  const bar = phases(request).at(-1);
  return [{ prefill: "prompt", decode: "decoding", transfer: "transfer", moved: "moving", queued: "queued", waiting: "waiting" }[bar.phase], false];
}

/** One line that says where the time of a request went, for those who do not see bars. */
export function summary(request) {
  return phases(request).map((bar) => `${PHASES[bar.phase]} ${duration(bar.to_ms - bar.from_ms)}`).join(", ");
}
