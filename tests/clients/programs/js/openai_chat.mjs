// OpenAI's package for JavaScript: chats, tools, answers in a schema, responses, errors.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = "baton-tiny";
const messages = [{ role: "user", content: "Tell me a short story about a runner." }];
const question = [{ role: "user", content: "What is the weather in Paris?" }];
const Weather = z.object({ city: z.enum(["Paris", "Rome"]), warm: z.boolean() });
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", description: "The weather", parameters, strict: true } }];
const client = new OpenAI({ maxRetries: 0 });

// whole and streamed
const asked = { model, messages, temperature: 0, max_tokens: 200 };
const answer = await client.chat.completions.create(asked);
const text = answer.choices[0].message.content;
assert.ok(text.length > 0);
let streamed = "";
let usage;
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
assert.equal(usage.completion_tokens, answer.usage.completion_tokens);
const runner = client.chat.completions.stream(asked);
let snapshot;
runner.on("content", (_, soFar) => (snapshot = soFar));
assert.equal(await runner.finalContent(), text);
assert.equal(snapshot, text);

// tools and schemas
const called = await client.chat.completions.create({
  ...asked, messages: question, tools, tool_choice: "required", parallel_tool_calls: false,
});
assert.equal(called.choices[0].finish_reason, "tool_calls");
const [call] = called.choices[0].message.tool_calls;
assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
const told = [...question, called.choices[0].message, { role: "tool", tool_call_id: call.id, content: "21 degrees" }];
assert.ok(await client.chat.completions.create({ ...asked, messages: told, tools, max_tokens: 20 }));
const parsed = await client.chat.completions.parse({
  model, messages: question, max_tokens: 100, response_format: zodResponseFormat(Weather, "weather"),
});
Weather.parse(parsed.choices[0].message.parsed);

// responses
const input = { model, input: messages[0].content, temperature: 0, max_output_tokens: 200 };
const response = await client.responses.create(input);
assert.equal(response.output_text, text);
let deltas = "";
for await (const event of await client.responses.create({ ...input, stream: true })) {
  if (event.type === "response.output_text.delta") deltas += event.delta;
}
assert.equal(deltas, text);
const inSchema = await client.responses.parse({
  model, input: question, max_output_tokens: 100, text: { format: zodTextFormat(Weather, "weather") },
});
Weather.parse(inSchema.output_parsed);
let background = await client.responses.create({ ...input, background: true });
while (["queued", "in_progress"].includes(background.status)) {
  await new Promise((resolve) => setTimeout(resolve, 50));
  background = await client.responses.retrieve(background.id);
}
assert.equal(background.output_text, text);

// vectors, models, errors
const vectors = await client.embeddings.create({ model, input: ["a fox", "a ship"] });
assert.equal(vectors.data[0].embedding.length, vectors.data[1].embedding.length);
const listed = [];
for await (const one of client.models.list()) listed.push(one.id);
assert.deepEqual(listed, [model]);
await assert.rejects(client.chat.completions.create({ ...asked, model: "none-such" }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ ...asked, temperature: 9 }), (error) => error.param === "temperature");
