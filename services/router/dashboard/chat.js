// The chat box: streamed answers, reasoning, tool calls and their results.
import { $, count, duration, h, text } from "./dom.js";
import { errorOf, headers, readEvents } from "./feed.js";
import { TOOLS, run } from "./tools.js";

const ROUNDS_MAX = 12; // of tool calls in one turn: a model that only calls tools must come to an end
const BUNDLED = "tokenrelay-tiny"; // made to call tools: they are offered unasked

/** Adds the partial tool calls of one chunk to those gathered so far, in place. */
export function joinCalls(calls, parts) {
  for (const part of parts ?? []) {
    const index = Number.isInteger(part.index) && part.index >= 0 && part.index < 128 ? part.index : 0;
    while (calls.length <= index) calls.push({ id: "", type: "function", function: { name: "", arguments: "" } });
    calls[index].id = part.id || calls[index].id;
    calls[index].function.name += part.function?.name ?? "";
    calls[index].function.arguments += part.function?.arguments ?? "";
  }
  return calls;
}

export class Chat {
  /** askKey(why): resolves once there is another key. showRequest(id): opens its timeline. */
  constructor({ askKey, showRequest }) {
    Object.assign(this, { askKey, showRequest, messages: [], model: null, touched: false });
    this.log = $("chat-log");
    $("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("chat-input").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    $("chat-stop").addEventListener("click", () => this.abort?.abort());
    $("chat-reset").addEventListener("click", () => this.reset());
    $("chat-tools").addEventListener("change", () => { this.touched = true; });
  }

  serves(model) {
    if (model && model !== this.model && !this.touched) $("chat-tools").checked = model === BUNDLED;
    this.model = model;
  }

  reset() {
    this.abort?.abort();
    this.messages = [];
    this.log.replaceChildren($("chat-hint") ?? h("p", { id: "chat-hint", class: "empty" }, "A new conversation."));
    $("chat-input").focus();
  }

  async send() {
    const input = $("chat-input");
    const said = input.value.trim();
    if (!said || this.abort) return;
    input.value = "";
    $("chat-hint")?.remove();
    this.#add(h("div", { class: "turn user" }, said));
    const before = this.messages.length;
    this.messages.push({ role: "user", content: said });
    this.abort = new AbortController();
    this.#busy(true);
    try {
      for (let round = 0; round < ROUNDS_MAX && (await this.#answer()); round++);
    } catch (error) {
      if (!this.abort.signal.aborted) {
        this.messages.length = before; // the failed turn leaves no trace
        input.value = input.value || said;
        this.#add(h("div", { class: "turn error", role: "alert" }, error.message));
      }
    } finally {
      this.abort = null;
      this.#busy(false);
    }
  }

  #busy(busy) {
    $("chat-stop").hidden = !busy;
    $("chat-send").disabled = busy;
  }

  #add(node) {
    const low = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
    this.log.append(node);
    if (low) this.log.scrollTop = this.log.scrollHeight;
    return node;
  }

  async #post() {
    const body = { model: this.model ?? undefined, messages: this.messages, stream: true, stream_options: { include_usage: true } };
    if ($("chat-tools").checked) body.tools = TOOLS;
    if (this.model === BUNDLED) body.temperature = 0; // it is small: its likeliest answer is its best
    for (;;) {
      const response = await fetch("/v1/chat/completions", {
        method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal: this.abort.signal,
      });
      if (response.status === 401) {
        await this.askKey(await errorOf(response));
        continue;
      }
      if (!response.ok) throw new Error(await errorOf(response));
      return response;
    }
  }

  /** One answer; true: it called tools, whose results are in the conversation now. */
  async #answer() {
    const answer = { content: "", reasoning: "", calls: [], finish: null, usage: null };
    const said = document.createTextNode("");
    const thought = h("p");
    const details = h("details", {}, h("summary", {}, "Reasoning"), thought);
    const bubble = this.#add(h("div", { class: "turn assistant", "aria-busy": "true" }, said));
    const began = performance.now();
    let first = null;
    let response = null;
    try {
      response = await this.#post();
      await readEvents(response, ({ data }) => {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message ?? "the server failed");
        this.#take(chunk, answer);
        if (first === null && (answer.content || answer.reasoning || answer.calls.length)) first = performance.now();
        const low = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
        said.data = answer.content;
        if (answer.reasoning && !details.isConnected) bubble.prepend(details);
        text(thought, answer.reasoning);
        if (low) this.log.scrollTop = this.log.scrollHeight;
      });
    } finally {
      bubble.removeAttribute("aria-busy");
      if (!answer.content && !answer.reasoning) bubble.remove();
      if (this.abort.signal.aborted && answer.content) this.messages.push({ role: "assistant", content: answer.content });
    }
    this.#figures(answer, response.headers.get("X-Request-Id"), first === null ? null : first - began, performance.now() - (first ?? began));
    return this.#keep(answer);
  }

  #take(chunk, answer) {
    answer.usage = chunk.usage ?? answer.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    answer.content += choice.delta?.content ?? "";
    answer.reasoning += choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? "";
    joinCalls(answer.calls, choice.delta?.tool_calls);
    answer.finish = choice.finish_reason ?? answer.finish;
  }

  #keep(answer) {
    const message = { role: "assistant", content: answer.content };
    if (!answer.calls.length) {
      this.messages.push(message);
      if (!answer.content) this.#add(h("p", { class: "turn-facts" }, "(an empty answer)"));
      return false;
    }
    this.messages.push({ ...message, tool_calls: answer.calls });
    for (const call of answer.calls) {
      const result = run(call.function.name, call.function.arguments);
      this.messages.push({ role: "tool", tool_call_id: call.id, content: result });
      this.#add(h("div", { class: "call" },
        h("div", {}, "Calls ", h("span", { class: "name" }, call.function.name)), h("pre", {}, call.function.arguments),
        h("div", { class: "result" }, "Result", h("pre", {}, result))));
    }
    return true;
  }

  #figures(answer, id, firstMs, decodeMs) {
    const tokens = answer.usage?.completion_tokens ?? 0;
    if (!tokens) return;
    const cached = answer.usage.prompt_tokens_details?.cached_tokens ?? 0;
    const speed = tokens > 1 && decodeMs > 0 ? `, ${count((1000 * (tokens - 1)) / decodeMs)}/s` : "";
    const facts = h("p", { class: "turn-facts" }, `first token ${duration(firstMs)}, ${tokens} tokens${speed}, ${cached} of ${answer.usage.prompt_tokens} prompt tokens cached${answer.finish === "length" ? ", cut" : ""}`);
    if (id) {
      const button = h("button", { type: "button", class: "quiet" }, "Timeline");
      button.addEventListener("click", () => { if (!this.showRequest(id)) button.disabled = true; });
      facts.append(button);
    }
    this.#add(facts);
  }
}
