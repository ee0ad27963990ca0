// What a snapshot looks like: tiles, workers, handovers, requests, one request's timeline.
import { $, compact, count, duration, h, keyed, set, share, text, worker } from "./dom.js";
import { PHASES, phases, stateOf, summary, words } from "./phases.js";

const STATES = { ready: "ready", away: "away", refused: "not used" };
const BLOCKS = {
  cached: "cached", sealed: "sealed, in use", writable: "writable", in_flight: "in flight", quarantined: "quarantined",
  active: "in use", free: "free",
};
const STAGES = { computing: "computing the prompt", pulling: "pulling KV", decoding: "decoding", done: "done", failed: "failed" };

export class View {
  constructor() {
    this.chosen = null; // number of the request whose timeline is shown
    this.kept = null; // it, as it was when the server last knew it
    this.workersSeen = new Map(); // target -> state, to announce changes
    $("timeline-close").addEventListener("click", () => this.choose(null));
    $("timeline").addEventListener("keydown", (event) => event.key === "Escape" && this.choose(null));
  }

  show(snapshot) {
    this.snapshot = snapshot;
    text($("model"), snapshot.model ?? "no model yet");
    text($("version"), `${snapshot.version}${snapshot.draining ? ", draining" : ""}`);
    this.#tiles(snapshot);
    this.#workers(snapshot.workers);
    this.#handovers(snapshot.handovers, snapshot.workers);
    this.#requests(snapshot);
    this.#chooseWanted();
    const totals = snapshot.totals;
    text($("totals"), ` · up ${duration(1000 * snapshot.uptime_s)}, ${count(totals.requests)} requests, ${count(totals.output_tokens)} tokens, ${count(totals.moves)} moves, ${count(totals.errors)} errors`);
  }

  #tiles({ point, totals, workers }) {
    const blocks = workers.flatMap((one) => Object.entries(one.blocks));
    const all = blocks.reduce((sum, [, value]) => sum + value, 0);
    const free = blocks.reduce((sum, [state, value]) => sum + (state === "free" || state === "cached" ? value : 0), 0);
    const below = workers.reduce((sum, one) => sum + one.floor.users_below, 0);
    const late = workers.reduce((sum, one) => sum + one.floor.late, 0);
    const due = workers.reduce((sum, one) => sum + one.floor.due, 0);
    const floor = point.floor === null ? "no floor known yet" : `floor ${count(point.floor)}${due ? `, ${share(late, due)} late` : ""}`;
    const tiles = [
      { name: "Tokens per second of a user", value: count(point.tps_p50), more: below ? `${count(below)} below ${floor}` : floor, mood: below ? "bad" : point.tps_p50 !== null && point.floor !== null && point.tps_p50 >= point.floor ? "good" : null },
      { name: "Output tokens per second", value: compact(point.output_per_s ?? 0), more: `prompts ${compact(point.prompt_per_s ?? 0)}` },
      { name: "Time to first token", value: duration(point.ttft_p50_ms), more: point.ttft_p95_ms === null ? "nobody asked just now" : `95 %: ${duration(point.ttft_p95_ms)}` },
      { name: "Requests in work", value: count(point.open), more: `${count(point.waiting)} wait at workers` },
      { name: "Prompts from cache", value: share(totals.cached_tokens, totals.prompt_tokens), more: `${compact(totals.cached_tokens)} of ${compact(totals.prompt_tokens)} tokens` },
      { name: "KV in use", value: share(all - free, all), more: `${compact(all - free)} of ${compact(all)} blocks` },
    ];
    keyed($("tiles"), tiles, (tile) => tile.name,
      (tile) => h("div", { class: "tile" }, h("dt", {}, tile.name), h("dd"), h("dd", { class: "more" })),
      (node, tile) => {
        set(node, { "data-mood": tile.mood ?? null });
        text(node.children[1], tile.value);
        text(node.children[2], tile.more);
      });
  }

  #workers(found) {
    const workers = [...found].sort((a, b) => a.role.localeCompare(b.role) || a.target.localeCompare(b.target, "en", { numeric: true }));
    const ready = workers.filter((one) => one.state === "ready").length;
    text($("workers-count"), workers.length ? `${ready} of ${workers.length} ready` : "");
    $("workers-empty").hidden = workers.length > 0;
    keyed($("workers"), workers, (one) => one.target, makeWorker, fillWorker);
    const news = [];
    for (const one of workers) {
      const before = this.workersSeen.get(one.target);
      if (before !== undefined && before !== one.state) news.push(`worker ${worker(one.target)} is ${STATES[one.state]}`);
      this.workersSeen.set(one.target, one.state);
    }
    if (news.length) text($("announce"), news.join("; "));
  }

  #handovers(handovers, workers) {
    const apart = workers.some((one) => one.role === "prefill") || handovers.length > 0;
    $("handovers-section").hidden = !apart;
    const going = handovers.filter((one) => one.stage === "computing" || one.stage === "pulling").length;
    text($("handovers-count"), going ? `${going} on their way` : "");
    keyed($("handovers"), handovers, (one) => `${one.number}.${one.choice}.${one.began_ms}`,
      () => h("li", { class: "handover" }, h("div", { class: "route" }, h("b"), h("span", { class: "wire", "aria-hidden": "true" }, h("i")), h("b")), h("span", { class: "said" }), h("span", { class: "num muted" })),
      (node, one) => {
        set(node, { "data-stage": one.stage });
        const [route, said, tokens] = node.children;
        text(route.children[0], worker(one.from));
        text(route.children[2], worker(one.to));
        const pulled = one.handed_over_ms !== null && one.first_ms !== null ? `, ${duration(one.handed_over_ms - one.first_ms)} after the first token` : "";
        text(said, STAGES[one.stage] + pulled);
        text(tokens, `${count(one.tokens)} tokens`);
      });
  }

  #requests(snapshot) {
    const hidden = $("requests-hidden");
    hidden.hidden = !snapshot.detail;
    text(hidden, snapshot.detail);
    $("requests-box").hidden = Boolean(snapshot.detail);
    $("requests-empty").hidden = snapshot.requests.length > 0;
    keyed($("requests"), snapshot.requests, (one) => one.number, (one) => this.#makeRequest(one), (node, one) => this.#fillRequest(node, one));
    const chosen = snapshot.requests.find((one) => one.number === this.chosen);
    if (chosen) this.kept = chosen;
    if (this.kept && this.kept.number === this.chosen) this.#timeline(this.kept);
  }

  #makeRequest(request) {
    const button = h("button", { type: "button", "aria-controls": "timeline" });
    button.addEventListener("click", () => this.choose(request.number, button));
    return h("tr", {}, h("td", {}, button), h("td"), h("td", { class: "num" }), h("td", { class: "num" }), h("td", { class: "num" }), h("td", { class: "num" }), h("td", {}, h("span", { class: "strip", "aria-hidden": "true" }), h("span", { class: "sr" })));
  }

  #fillRequest(row, request) {
    const [name, state, prompt, cached, output, first, way] = row.children;
    const label = request.id.length > 14 ? `${request.id.slice(0, 13)}…` : request.id;
    text(name.firstChild, label);
    set(name.firstChild, { title: request.id, "aria-label": `Timeline of ${request.id}`, "aria-expanded": String(request.number === this.chosen) });
    set(row, { "data-chosen": request.number === this.chosen });
    const [said, bad] = stateOf(request);
    text(state, said);
    set(state, { class: bad ? "bad" : null });
    text(prompt, count(request.prompt_tokens));
    text(cached, request.ttft_ms === null ? "–" : share(request.cached_tokens, request.prompt_tokens));
    text(output, count(request.output_tokens));
    text(first, duration(request.ttft_ms));
    drawStrip(way.firstChild, request);
    text(way.lastChild, summary(request));
  }

  /** Shows one request's timeline, or none. */
  choose(number, from = null) {
    this.wanted = null;
    if (number === null && this.opener?.isConnected) this.opener.focus();
    this.opener = from;
    this.chosen = number === this.chosen ? null : number;
    $("timeline").hidden = this.chosen === null;
    if (this.snapshot) this.#requests(this.snapshot);
    if (this.chosen !== null) {
      $("timeline").scrollIntoView({ block: "nearest" });
      $("timeline-title").focus({ preventScroll: true });
    }
  }

  /** The same by a request's id, for the chat: at once, or when the next snapshot has it. False: they are not shown here. */
  chooseById(id) {
    this.wanted = id;
    this.#chooseWanted();
    return !this.snapshot?.detail;
  }

  #chooseWanted() {
    const found = this.wanted && this.snapshot?.requests.find((one) => one.id === this.wanted);
    if (!found) return;
    this.wanted = null;
    if (found.number !== this.chosen) this.choose(found.number);
  }

  #timeline(request) {
    const end = request.ended_ms ?? request.age_ms;
    text($("timeline-title"), `Timeline of ${request.id}`);
    const decode = phases(request).filter((bar) => bar.phase === "decode").reduce((sum, bar) => sum + bar.to_ms - bar.from_ms, 0);
    const speed = request.output_tokens > 1 && decode > 0 ? `, ${count((1000 * (request.output_tokens / request.choices - 1)) / decode)} tokens per second` : "";
    const placed = request.placement ? ` ${request.placement}.` : "";
    text($("timeline-facts"), `${count(request.prompt_tokens)} prompt tokens, ${share(request.cached_tokens, request.prompt_tokens)} from cache, ${count(request.output_tokens)} output tokens in ${duration(end)}${speed}.${placed}`);
    const lanes = [];
    for (let choice = 0; choice < Math.min(request.choices, 8); choice++)
      lanes.push(...phases(request, choice).map((bar, index) => ({ ...bar, choice, key: `${choice}.${index}.${bar.phase}` })));
    keyed($("timeline-lanes"), lanes, (bar) => bar.key,
      (bar) => h("div", { class: "lane" }, h("span", { class: "label" }), h("span", { class: "track" }, h("i", { class: `ph-${bar.phase}` })), h("span", { class: "num" })),
      (node, bar) => {
        const [label, track, figure] = node.children;
        const where = bar.worker ? ` · ${worker(bar.worker)}` : "";
        text(label, `${request.choices > 1 ? `${bar.choice + 1}: ` : ""}${PHASES[bar.phase]}${where}`);
        set(label, { title: label.textContent });
        const [from, to] = [bar.from_ms / end, bar.to_ms / end].map((part) => Math.min(1, part || 0));
        track.firstChild.style.left = `${100 * from}%`;
        track.firstChild.style.width = `${100 * (to - from)}%`;
        text(figure, duration(bar.to_ms - bar.from_ms));
      });
    keyed($("timeline-notes"), [{ at_ms: 0, kind: "arrived" }, ...request.notes].map((note, index) => ({ ...note, index })), (note) => note.index,
      () => h("li", {}, h("span", { class: "at" }), h("span", { class: "what" })),
      (node, note) => {
        text(node.children[0], duration(note.at_ms));
        const choice = request.choices > 1 && note.kind !== "arrived" && note.kind !== "ended" ? `choice ${note.choice + 1}: ` : "";
        text(node.children[1], choice + (note.kind === "arrived" ? "arrived" : words(note)));
      });
  }
}

function makeWorker(one) {
  const fact = (name) => h("div", {}, h("dt", {}, name), h("dd"));
  return h("li", { class: "card worker" },
    h("div", { class: "worker-head" }, h("h3", { title: one.target }), h("span", { class: "badge" }), h("span", { class: "state" }, h("span", { class: "dot", "aria-hidden": "true" }), h("span"))),
    h("p", { class: "why" }),
    h("div", { class: "bar", "aria-hidden": "true" }),
    h("p", { class: "legend" }),
    h("dl", { class: "facts" }, fact("Running"), fact("Waiting"), fact("Tokens/s"), fact("Busy"), fact("From cache"), fact("Floor")),
  );
}

function fillWorker(node, one) {
  const [head, why, bar, legend, facts] = node.children;
  set(node, { "data-state": one.state });
  text(head.children[0], worker(one.target));
  text(head.children[1], [one.role, one.device, one.dtype].filter(Boolean).join(" · ") || "unknown");
  text(head.children[2].lastChild, STATES[one.state]);
  why.hidden = !one.reason;
  text(why, one.reason);
  const blocks = Object.keys(BLOCKS).filter((state) => state in one.blocks).map((state) => [state, one.blocks[state]]);
  const all = blocks.reduce((sum, [, value]) => sum + value, 0);
  const shown = blocks.filter(([state, value]) => value > 0 || state === "free" || state === "cached");
  keyed(bar, shown, ([state]) => state, ([state]) => h("i", { class: `kv-${state}` }), (part, [, value]) => { part.style.width = `${all ? (100 * value) / all : 0}%`; });
  keyed(legend, shown, ([state]) => state, ([state]) => h("span", { class: `kv-${state}` }), (part, [state, value]) => text(part, `${BLOCKS[state]} ${count(value)}`));
  const floor = one.floor.in_force === 0 ? "–" : `${count(one.floor.in_force)} of ${count(one.floor.batch_1)}`;
  const values = [`${one.running}${one.slots ? ` of ${one.slots}` : ""}`, count(one.waiting), compact(one.output_per_s), one.busy === null ? "–" : `${Math.round(100 * one.busy)} %`, share(one.cached_tokens, one.prompt_tokens), floor + (one.floor.users_below ? `, ${one.floor.users_below} below` : "")];
  values.forEach((value, index) => text(facts.children[index].lastChild, value));
}

function drawStrip(strip, request) {
  const bars = phases(request);
  const all = bars.reduce((sum, bar) => sum + bar.to_ms - bar.from_ms, 0);
  keyed(strip, bars.map((bar, index) => ({ ...bar, index })), (bar) => `${bar.index}.${bar.phase}`, (bar) => h("i", { class: `ph-${bar.phase}` }),
    (part, bar) => { part.style.width = `${all ? (100 * (bar.to_ms - bar.from_ms)) / all : 0}%`; });
}
