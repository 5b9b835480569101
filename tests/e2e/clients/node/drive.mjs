// Everything that OpenAI's Node client does against a running platform; what came of it, as one JSON object on stdout.
// Environment: BASE_URL, API_KEY, TASTE (a logit_bias as JSON).
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const connection = { baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 0, timeout: 60_000 };
const client = new OpenAI(connection);
const messages = [{ role: "user", content: "Is it raining?" }];
const common = { model: "caller", messages, logit_bias: JSON.parse(process.env.TASTE), seed: 7, max_tokens: 400 };
const Weather = z.object({ city: z.string(), days: z.number().int(), unit: z.enum(["celsius", "fahrenheit"]) });
const weather = zodFunction({ name: "get_weather", description: "Of a city", parameters: Weather });

async function text() {
  const options = { ...common, max_tokens: 16 };
  const whole = await client.chat.completions.create(options);
  let streamed = "";
  let usage = null;
  for await (const chunk of await client.chat.completions.create({ ...options, stream: true, stream_options: { include_usage: true } })) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { whole: whole.choices[0].message.content, streamed, usage, wholeUsage: whole.usage };
}

async function form() {
  const options = { ...common, response_format: zodResponseFormat(Weather, "weather") };
  const whole = await client.chat.completions.parse(options);
  const final = await client.chat.completions.stream(options).finalChatCompletion();
  return { whole: whole.choices[0].message.parsed, streamed: final.choices[0].message.parsed };
}

async function tools() {
  const options = { ...common, tools: [weather], tool_choice: "required", n: 2 };
  const whole = await client.chat.completions.parse(options);
  const stream = client.chat.completions.stream(options);
  const done = [];
  stream.on("tool_calls.function.arguments.done", (call) => done.push(call.parsed_arguments));
  const final = await stream.finalChatCompletion();
  const said = ({ choices }) =>
    choices.map(({ finish_reason, message }) => [finish_reason, message.tool_calls.map((call) => call.function.parsed_arguments)]);
  return { whole: said(whole), streamed: said(final), done };
}

// The model is forced to call once; the helper runs the function, sends its result back and takes the next answer for the last.
async function runs() {
  const ran = [];
  const run = (parsed) => {
    ran.push(parsed);
    return "It rains.";
  };
  const tool = zodFunction({ name: "get_weather", function: run, parameters: Weather });
  const answers = {};
  for (const stream of [false, true]) {
    const choice = { type: "function", function: { name: "get_weather" } };
    const runner = client.chat.completions.runTools({ ...common, tools: [tool], tool_choice: choice, stream });
    await runner.done();
    answers[stream ? "streamed" : "whole"] = runner.messages.map((message) => message.role);
  }
  return { ran, ...answers };
}

async function embeddings() {
  const asked = { model: "embedder", input: ["the quick brown fox", "red blue"] };
  const packed = await client.embeddings.create(asked);
  const numbers = await client.embeddings.create({ ...asked, encoding_format: "float" });
  return { packed: packed.data.map((item) => Array.from(item.embedding)), numbers: numbers.data.map((item) => item.embedding) };
}

async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    return { name: error.constructor.name, status: error.status ?? null, code: error.code ?? null, param: error.param ?? null };
  }
  return null;
}

async function errors() {
  const stranger = new OpenAI({ ...connection, apiKey: "mk_wrong" });
  return {
    absent: await failure(client.chat.completions.create({ ...common, model: "absent" })),
    absentStreamed: await failure(client.chat.completions.create({ ...common, model: "absent", stream: true })),
    stranger: await failure(stranger.models.list()),
    wrong: await failure(client.chat.completions.create({ ...common, temperature: 3 })),
    kind: await failure(client.embeddings.create({ model: "caller", input: "x" })),
  };
}

async function abort() {
  const stream = await client.chat.completions.create({ ...common, logit_bias: {}, max_tokens: 3000, stream: true, ignore_eos: true });
  let chunks = 0;
  for await (const _ of stream) {
    chunks += 1;
    if (chunks === 3) stream.controller.abort();
  }
  return { chunks };
}

async function models() {
  const found = [];
  for await (const model of client.models.list()) found.push(model.id);
  return found;
}

const results = {};
for (const part of [text, form, tools, runs, embeddings, errors, abort, models]) {
  try {
    results[part.name] = await part();
  } catch (error) {
    results[part.name] = { failed: String(error?.stack ?? error) };
  }
}
console.log(JSON.stringify(results));
