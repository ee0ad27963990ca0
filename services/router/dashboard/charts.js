// Line charts in SVG: a few series over the last minutes, a scale from zero, a cursor for pointer and arrow keys.
import { h, s, set, text } from "./dom.js";

const SPANS_MS = [60000, 120000, 300000]; // the shortest that holds everything, else the longest
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [420, 150, 48, 8, 10, 20];

/** The next of 1, 2, 2.5, 5 x 10^n from `value` up. */
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

export class Chart {
  /** series: [{name, label, className, dash, dots}]; format: value -> text. The first one is filled below. */
  constructor(figure, { title, series, format }) {
    Object.assign(this, { title, series, format, points: [], chosen: null, span: SPANS_MS[0] });
    this.svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", tabindex: 0 });
    this.readout = h("p", { class: "readout" });
    const keys = series.map((one) => h("span", { class: `key ${one.className}`, "data-dash": one.dash ?? null }, one.label));
    figure.append(h("figcaption", {}, h("strong", {}, title), h("span", { class: "keys" }, ...keys)), this.svg, this.readout);
    this.svg.addEventListener("pointermove", (event) => this.#choose(this.#at(event)));
    this.svg.addEventListener("pointerleave", () => this.#choose(null));
    this.svg.addEventListener("blur", () => this.#choose(null));
    this.svg.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  /** New points, oldest first: objects with at_ms and the series' names. */
  update(points) {
    this.points = points;
    const age = points.length ? points.at(-1).at_ms - points[0].at_ms : 0;
    this.span = SPANS_MS.find((span) => age <= span) ?? SPANS_MS.at(-1);
    this.draw();
  }

  #at(event) {
    const box = this.svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * this.width;
    const shown = this.#shown();
    if (!shown.length) return null;
    return shown.reduce((best, point) => (Math.abs(this.#x(point) - at) < Math.abs(this.#x(best) - at) ? point : best)).at_ms;
  }

  #key(event) {
    const shown = this.#shown();
    if (!shown.length || !["ArrowLeft", "ArrowRight", "Escape"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === "Escape") return this.#choose(null);
    const index = shown.findIndex((point) => point.at_ms === this.chosen);
    const next = index < 0 ? shown.length - 1 : index + (event.key === "ArrowLeft" ? -1 : 1);
    this.#choose(shown[Math.max(0, Math.min(shown.length - 1, next))].at_ms);
  }

  #choose(atMs) {
    this.chosen = atMs;
    this.draw();
  }

  #shown() {
    const last = this.points.at(-1)?.at_ms ?? 0;
    return this.points.filter((point) => point.at_ms >= last - this.span);
  }

  #x(point) {
    const last = this.points.at(-1).at_ms;
    return LEFT + (1 - (last - point.at_ms) / this.span) * (this.width - LEFT - RIGHT);
  }

  draw() {
    this.width = this.svg.clientWidth || WIDTH;
    set(this.svg, { viewBox: `0 0 ${this.width} ${HEIGHT}` });
    const shown = this.#shown();
    const values = shown.flatMap((point) => this.series.map((one) => point[one.name])).filter((value) => value !== null && value !== undefined);
    const top = ceiling(Math.max(0, ...values));
    const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - TOP - BOTTOM);
    const parts = [0, 0.5, 1].flatMap((level) => [
      s("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y(level * top), y2: y(level * top) }),
      s("text", { class: "axis", x: LEFT - 6, y: y(level * top) + 4, "text-anchor": "end" }, level ? this.format(level * top) : "0"),
    ]);
    for (const [label, x, anchor] of [[`${this.span / 60000} min ago`, LEFT, "start"], ["now", this.width - RIGHT, "end"]])
      parts.push(s("text", { class: "axis", x, y: HEIGHT - 5, "text-anchor": anchor }, label));
    this.series.forEach((one, index) => parts.push(...this.#line(one, shown, y, index === 0)));
    const chosen = shown.find((point) => point.at_ms === this.chosen);
    if (chosen) parts.push(s("line", { class: "cursor", x1: this.#x(chosen), x2: this.#x(chosen), y1: TOP, y2: HEIGHT - BOTTOM }));
    this.svg.replaceChildren(...parts);
    this.#say(chosen ?? shown.at(-1), chosen !== undefined);
  }

  #line(one, shown, y, filled) {
    const found = shown.filter((point) => point[one.name] !== null && point[one.name] !== undefined);
    if (!found.length) return [];
    const at = found.map((point) => [this.#x(point).toFixed(1), y(point[one.name]).toFixed(1)]);
    const path = at.map(([x, y1], index) => `${index ? "L" : "M"}${x} ${y1}`).join("");
    const parts = [];
    if (filled && !one.dots) parts.push(s("path", { class: `fill ${one.className}`, d: `${path}L${at.at(-1)[0]} ${y(0)}L${at[0][0]} ${y(0)}Z` }));
    parts.push(s("path", { class: `line ${one.className}`, "data-dash": one.dash ?? null, d: path }));
    if (one.dots || found.length === 1) parts.push(...at.map(([x, y1]) => s("circle", { class: `spot ${one.className}`, cx: x, cy: y1, r: 2.2 })));
    return parts;
  }

  #say(point, chosen) {
    const parts = point ? this.series.filter((one) => point[one.name] !== null && point[one.name] !== undefined).map((one) => `${one.label} ${this.format(point[one.name])}`) : [];
    const when = chosen ? `${Math.round((this.points.at(-1).at_ms - point.at_ms) / 1000)} s ago: ` : "";
    text(this.readout, parts.length || chosen ? when + (parts.join(", ") || "nothing") : "nothing in the last second");
    set(this.svg, { "aria-label": `${this.title}. ${parts.join(", ") || "No data in the last second"}. Arrow keys move through time.` });
  }
}
