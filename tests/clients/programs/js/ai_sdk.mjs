// Vercel's AI SDK, which checks every event against a schema: texts, objects, tools and what a reader leaves.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "baton",
  baseURL: process.env.OPENAI_BASE_URL,
  apiKey: process.env.OPENAI_API_KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("baton-tiny");
const prompt = "Tell me a short story about a runner.";
const Weather = z.object({ city: z.enum(["Paris", "Rome"]), warm: z.boolean() }).strict();
const failing = { onError: ({ error }) => { throw error; } };

// texts
const asked = { model, prompt, temperature: 0, maxOutputTokens: 200, maxRetries: 0 };
const whole = await generateText(asked);
assert.ok(whole.text.length > 0);
const stream = streamText({ ...asked, ...failing });
let text = "";
for await (const part of stream.textStream) text += part;
assert.equal(text, whole.text);
assert.equal(await stream.finishReason, whole.finishReason);
assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);

// objects
const output = Output.object({ schema: Weather });
Weather.parse((await generateText({ ...asked, prompt: "The weather?", output })).output);
const partial = streamText({ ...asked, ...failing, prompt: "The weather?", output });
let last;
for await (const part of partial.partialOutputStream) last = part;
Weather.parse(last);

// tools, and the answer to their results
const places = [];
const tools = {
  get_weather: tool({
    description: "The weather of a city",
    inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }).strict(),
    execute: async ({ city }) => { places.push(city); return `21 degrees in ${city}`; },
  }),
};
const calling = {
  ...asked, prompt: "What is the weather in Paris?", tools, maxOutputTokens: 400,
  providerOptions: { baton: { parallel_tool_calls: false } },
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: "tool", toolName: "get_weather" } : "none" }),
  stopWhen: stepCountIs(2),
};
const called = await generateText(calling);
assert.equal(called.steps.length, 2);
assert.equal(called.steps[0].finishReason, "tool-calls");
const streamed = streamText({ ...calling, ...failing });
const kinds = new Set();
for await (const part of streamed.fullStream) kinds.add(part.type);
assert.ok(kinds.has("tool-input-delta") && kinds.has("tool-call") && kinds.has("tool-result"));
assert.equal(await streamed.text, called.text);
assert.ok(places.length === 2 && places.every((city) => ["Paris", "Rome"].includes(city)));

// vectors, completions, errors
const { embeddings } = await embedMany({ model: provider.embeddingModel("baton-tiny"), values: ["a fox", "a ship"], maxRetries: 0 });
assert.equal(embeddings.length, 2);
assert.ok((await generateText({ ...asked, model: provider.completionModel("baton-tiny") })).text.length > 0);
await assert.rejects(generateText({ ...asked, model: provider("none-such") }), /none-such/);
