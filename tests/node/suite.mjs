// Conversations by both vendors' clients for Node: `node suite.mjs URL MODEL`. A line of JSON for each case.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const QUESTION = "What is 17 * 23?";
const BOTH = "How is the weather in Paris and Berlin?";
const ENDLESS = { temperature: 1, ignore_eos: true, max_tokens: 4000 };
const object = (name) => ({ type: "object", properties: { [name]: { type: "string" } }, required: [name] });
const CALCULATOR = { name: "calculator", description: "Evaluate an arithmetic expression.", parameters: object("expression") };
const WEATHER = { name: "get_weather", description: "Get the current weather for a city.", parameters: object("city") };
const FORM = {
  name: "point",
  strict: true,
  schema: {
    type: "object", additionalProperties: false, required: ["x", "y"],
    properties: { x: { type: "integer", minimum: 0, maximum: 99 }, y: { type: "integer", minimum: 0, maximum: 99 } },
  },
};

async function openRequests() {
  const text = await (await fetch(`${url}/metrics`)).text();
  return Number(/^tokenrelay_requests_open (\d+)/m.exec(text)[1]);
}

async function settled() {
  for (const end = Date.now() + 20_000; Date.now() < end; await new Promise((wake) => setTimeout(wake, 50)))
    if ((await openRequests()) === 0) return;
  assert.fail("a request that was aborted is still open");
}

const chatTools = (...functions) => functions.map((one) => ({ type: "function", function: one }));
const say = (messages, more = {}) => openai.chat.completions.create({ model, messages, temperature: 0, max_tokens: 128, ...more });
const user = (content) => ({ role: "user", content });

const chat = {
  async plain() {
    const reply = await say([user("Who are you?")]);
    assert.ok(reply.choices[0].message.content.length > 5);
    assert.equal(reply.choices[0].finish_reason, "stop");
    assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens);
  },
  async streamed() {
    const whole = (await say([user("Who are you?")])).choices[0].message.content;
    let [text, usage] = ["", null];
    for await (const chunk of await say([user("Who are you?")], { stream: true, stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole);
    assert.ok(usage.completion_tokens > 0);
  },
  async tools() {
    const tools = chatTools(CALCULATOR);
    const messages = [user(QUESTION)];
    const first = (await say(messages, { tools })).choices[0];
    assert.equal(first.finish_reason, "tool_calls");
    const [call] = first.message.tool_calls;
    assert.deepEqual([call.function.name, JSON.parse(call.function.arguments)], ["calculator", { expression: "17 * 23" }]);
    messages.push(first.message, { role: "tool", tool_call_id: call.id, content: "391" });
    assert.match((await say(messages, { tools })).choices[0].message.content, /391/);
  },
  async toolsStreamed() {
    const runner = openai.chat.completions.stream({ model, messages: [user(QUESTION)], temperature: 0, max_tokens: 128, tools: chatTools(CALCULATOR) });
    const final = await runner.finalChatCompletion();
    const [call] = final.choices[0].message.tool_calls;
    assert.deepEqual(JSON.parse(call.function.arguments), { expression: "17 * 23" });
  },
  async parallelTools() {
    const reply = await say([user(BOTH)], { tools: chatTools(WEATHER) });
    const cities = reply.choices[0].message.tool_calls.map((call) => JSON.parse(call.function.arguments).city);
    assert.deepEqual(cities.sort(), ["Berlin", "Paris"]);
  },
  async structured() {
    const reply = await say([user("A point.")], { response_format: { type: "json_schema", json_schema: FORM }, temperature: 1 });
    const point = JSON.parse(reply.choices[0].message.content);
    assert.ok(Number.isInteger(point.x) && Number.isInteger(point.y));
  },
  async aborted() {
    const stream = await say([user("Tell me a story.")], { ...ENDLESS, stream: true });
    for await (const chunk of stream) if (chunk.choices[0]?.delta.content) break;
    stream.controller.abort();
    await settled();
  },
  async errors() {
    await assert.rejects(say([user("Hi")], { temperature: 9 }), (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
    await assert.rejects(openai.chat.completions.create({ model: "nobody", messages: [user("Hi")] }), OpenAI.NotFoundError);
    await assert.rejects(say([]), OpenAI.BadRequestError);
  },
};

const respond = (input, more = {}) => openai.responses.create({ model, input, temperature: 0, max_output_tokens: 128, ...more });
const responseTools = (...functions) => functions.map((one) => ({ type: "function", strict: false, ...one }));

const responses = {
  async plain() {
    const reply = await respond("Who are you?");
    assert.equal(reply.status, "completed");
    assert.ok(reply.output_text.length > 5);
  },
  async streamed() {
    const whole = (await respond("Who are you?")).output_text;
    let [text, last, number] = ["", "", -1];
    for await (const event of await respond("Who are you?", { stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
      assert.equal(event.sequence_number, ++number);
      last = event.type;
    }
    assert.deepEqual([text, last], [whole, "response.completed"]);
  },
  async toolsAndPrevious() {
    const tools = responseTools(CALCULATOR);
    const first = await respond(QUESTION, { tools });
    const call = first.output.find((item) => item.type === "function_call");
    assert.deepEqual(JSON.parse(call.arguments), { expression: "17 * 23" });
    const output = [{ type: "function_call_output", call_id: call.call_id, output: "391" }];
    const second = await respond(output, { tools, previous_response_id: first.id });
    assert.match(second.output_text, /391/);
  },
  async structured() {
    const reply = await respond("A point.", { text: { format: { type: "json_schema", ...FORM } } });
    assert.ok(Number.isInteger(JSON.parse(reply.output_text).x));
  },
  async aborted() {
    const stream = await respond("Tell me a story.", { stream: true, max_output_tokens: 4000, temperature: 2 });
    for await (const event of stream) if (event.type === "response.created") break;
    stream.controller.abort();
    await settled();
  },
  async errors() {
    await assert.rejects(respond("Hi", { temperature: 9 }), OpenAI.BadRequestError);
    await assert.rejects(respond("Hi", { previous_response_id: "resp_none" }), (error) => error.code === "previous_response_not_found");
  },
};

const message = (messages, more = {}) => anthropic.messages.create({ model, messages, max_tokens: 128, temperature: 0, ...more });
const messageTools = (...functions) => functions.map(({ parameters, ...one }) => ({ ...one, input_schema: parameters }));

const messages = {
  async plain() {
    const reply = await message([user("Who are you?")], { system: "You are a bot." });
    assert.equal(reply.stop_reason, "end_turn");
    assert.ok(reply.content.find((block) => block.type === "text").text.length > 5);
  },
  async streamed() {
    const whole = (await message([user("Who are you?")])).content.find((block) => block.type === "text").text;
    const stream = anthropic.messages.stream({ model, messages: [user("Who are you?")], max_tokens: 128, temperature: 0 });
    const types = [];
    stream.on("streamEvent", (event) => types.push(event.type));
    assert.equal(await stream.finalText(), whole);
    assert.deepEqual([types[0], types.at(-1)], ["message_start", "message_stop"]);
  },
  async tools() {
    const tools = messageTools(CALCULATOR);
    const dialogue = [user(QUESTION)];
    const first = await message(dialogue, { tools });
    assert.equal(first.stop_reason, "tool_use");
    const call = first.content.find((block) => block.type === "tool_use");
    assert.deepEqual(call.input, { expression: "17 * 23" });
    dialogue.push({ role: "assistant", content: first.content }, user([{ type: "tool_result", tool_use_id: call.id, content: "391" }]));
    const second = await message(dialogue, { tools });
    assert.match(second.content.find((block) => block.type === "text").text, /391/);
  },
  async parallelTools() {
    const reply = await message([user(BOTH)], { tools: messageTools(WEATHER) });
    const cities = reply.content.filter((block) => block.type === "tool_use").map((block) => block.input.city);
    assert.deepEqual(cities.sort(), ["Berlin", "Paris"]);
  },
  async counted() {
    const counted = await anthropic.messages.countTokens({ model, messages: [user("Who are you?")] });
    const reply = await message([user("Who are you?")]);
    const { input_tokens, cache_read_input_tokens, cache_creation_input_tokens } = reply.usage;
    assert.equal(counted.input_tokens, input_tokens + (cache_read_input_tokens ?? 0) + (cache_creation_input_tokens ?? 0));
  },
  async aborted() {
    const stream = anthropic.messages.stream({ model, messages: [user("Tell me a story.")], max_tokens: 4000, temperature: 1 });
    await new Promise((resolve) => stream.once("streamEvent", resolve));
    stream.abort();
    await assert.rejects(stream.done(), Anthropic.APIUserAbortError);
    await settled();
  },
  async errors() {
    await assert.rejects(message([user("Hi")], { temperature: 9 }), Anthropic.BadRequestError);
    await assert.rejects(message([{ role: "assistant", content: "Hi" }]), Anthropic.BadRequestError);
  },
};

for (const [api, cases] of Object.entries({ chat, responses, messages }))
  for (const [name, run] of Object.entries(cases)) {
    let error = null;
    try {
      await run();
    } catch (caught) {
      error = String(caught?.stack ?? caught).slice(0, 800);
    }
    console.log(JSON.stringify({ case: `${api} ${name}`, error }));
  }
