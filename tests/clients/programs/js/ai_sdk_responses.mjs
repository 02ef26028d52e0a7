// Vercel's AI SDK with its provider for OpenAI, which speaks responses unless told otherwise, and knows their events by heart.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const openai = createOpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY });
const prompt = "Tell me a short story about a runner.";
const Weather = z.object({ city: z.enum(["Paris", "Rome"]), warm: z.boolean() }).strict();

for (const model of [openai("baton-tiny"), openai.chat("baton-tiny")]) {
  const asked = { model, prompt, temperature: 0, maxOutputTokens: 200, maxRetries: 0 };
  const whole = await generateText(asked);
  assert.ok(whole.text.length > 0);

  const stream = streamText({ ...asked, onError: ({ error }) => { throw error; } });
  let text = "";
  for await (const part of stream.textStream) text += part;
  assert.equal(text, whole.text);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);

  Weather.parse((await generateText({ ...asked, prompt: "The weather?", output: Output.object({ schema: Weather }) })).output);

  const places = [];
  const inputSchema = z.object({ city: z.enum(["Paris", "Rome"]) }).strict();
  const execute = async ({ city }) => { places.push(city); return "21 degrees"; };
  const called = streamText({
    ...asked,
    prompt: "What is the weather in Paris?",
    tools: { get_weather: tool({ description: "The weather of a city", inputSchema, execute }) },
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: "tool", toolName: "get_weather" } : "none" }),
    stopWhen: stepCountIs(2),
    onError: ({ error }) => { throw error; },
  });
  assert.equal((await called.steps).length, 2);
  assert.equal(places.length, 1);
  await assert.rejects(generateText({ ...asked, temperature: 9 }), /temperature/);
}
