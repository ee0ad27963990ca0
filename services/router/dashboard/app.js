// The page: follows the mesh, draws it, and holds key and theme.
import { Chart } from "./charts.js";
import { Chat } from "./chat.js";
import { $, compact, count, duration, set, text } from "./dom.js";
import { follow, key } from "./feed.js";
import { View } from "./view.js";

const POINTS_MAX = 600;

// -- theme ------------------------------------------------------------------------------------------------------------
const THEMES = ["auto", "light", "dark"];

function applyTheme(theme) {
  set(document.documentElement, { "data-theme": theme === "auto" ? null : theme });
  text($("theme-name"), theme);
}

function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null; // storage is forbidden here: the page works without
  }
}

applyTheme(THEMES.includes(stored("tokenrelay.theme")) ? stored("tokenrelay.theme") : "auto");
$("theme-button").addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf($("theme-name").textContent) + 1) % THEMES.length];
  applyTheme(theme);
  try {
    localStorage.setItem("tokenrelay.theme", theme);
  } catch {
    // it lasts until the page is closed
  }
});

// -- key --------------------------------------------------------------------------------------------------------------
let waiting = []; // who waits for a key

function openKey(why = "") {
  const dialog = $("key-dialog");
  if (why) text($("key-why"), `${why} It is kept in this tab until it is closed, and sent to this server only.`);
  if (!dialog.open) {
    $("key-input").value = key.get();
    dialog.showModal();
  }
}

/** Resolves once the user gave a key; who cancels is not asked again before. Without `why` nobody is asked. */
function askKey(why) {
  if (why) openKey(/[.!?]$/.test(why) ? why : `${why}.`);
  return new Promise((resolve) => waiting.push(resolve));
}

function useKey(value) {
  key.set(value.trim());
  $("key-dialog").close();
  const woken = waiting;
  waiting = [];
  for (const resolve of woken) resolve();
}

$("key-button").addEventListener("click", () => openKey());
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key-input").value);
});
$("key-forget").addEventListener("click", () => useKey(""));
$("key-cancel").addEventListener("click", () => $("key-dialog").close());

// -- the mesh ---------------------------------------------------------------------------------------------------------
const view = new View();
const chat = new Chat({ askKey, showRequest: (id) => view.chooseById(id) });
const charts = [
  new Chart($("chart-tps"), {
    title: "Tokens per second of a user",
    format: compact,
    series: [
      { name: "tps_p50", label: "median", className: "k-one", dots: true },
      { name: "tps_p5", label: "slowest 5 %", className: "k-two", dots: true },
      { name: "floor", label: "floor", className: "k-three", dash: true },
    ],
  }),
  new Chart($("chart-ttft"), {
    title: "Time to first token",
    format: duration,
    series: [
      { name: "ttft_p50_ms", label: "median", className: "k-one", dots: true },
      { name: "ttft_p95_ms", label: "95 %", className: "k-two", dots: true },
    ],
  }),
  new Chart($("chart-throughput"), {
    title: "Tokens per second, all together",
    format: (value) => compact(value),
    series: [
      { name: "output_per_s", label: "output", className: "k-one" },
      { name: "prompt_per_s", label: "prompts", className: "k-two" },
    ],
  }),
];

let points = [];
let state = "";

function link(now, said) {
  set($("link"), { "data-state": now });
  text($("link-text"), said);
  if (now !== state && state) text($("announce"), now === "live" ? "connected" : `connection: ${said}`);
  state = now;
}

follow({
  history(history) {
    points = history.slice(0, -1); // the snapshot that follows has the last one
  },
  snapshot(snapshot) {
    points = [...points.slice(1 - POINTS_MAX), snapshot.point];
    view.show(snapshot);
    chat.serves(snapshot.model);
    for (const chart of charts) chart.update(points);
    document.title = snapshot.model ? `${count(snapshot.point.open)} open · ${snapshot.model} · TokenRelay` : "TokenRelay";
  },
  state: link,
  key: askKey,
});
