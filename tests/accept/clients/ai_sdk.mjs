// Vercel's AI SDK: ai with @ai-sdk/openai-compatible and @ai-sdk/openai.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.env.BASE_URL;
const prompt = "What is 12 + 7?";
const providers = {
  "openai-compatible": createOpenAICompatible({ name: "dmoa", baseURL, apiKey: "none" })("clients"),
  "openai, responses": createOpenAI({ baseURL, apiKey: "none" })("clients"),
  "openai, chat": createOpenAI({ baseURL, apiKey: "none" }).chat("clients"),
};
const weather = tool({
  description: "Tells the weather.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `Sunny in ${city}.`,
});

async function cell(name, run) {
  let why = "";
  try {
    const done = await run();
    why = done ? "" : `it returned ${JSON.stringify(done)}`;
  } catch (error) {
    why = `${error.name}: ${String(error.message).slice(0, 300)}`;
  }
  console.log(JSON.stringify({ cell: name, why }));
}

for (const [name, model] of Object.entries(providers)) {
  await cell(`${name}: generateText`, async () => (await generateText({ model, prompt })).text.includes("19"));
  await cell(`${name}: streamText`, async () => {
    let text = "";
    for await (const piece of streamText({ model, prompt }).textStream) text += piece;
    return text.includes("19");
  });
  await cell(`${name}: tools`, async () =>
    (await generateText({ model, prompt, tools: { weather }, stopWhen: stepCountIs(3) })).text.includes("19"));
  await cell(`${name}: generateObject`, async () =>
    (await generateObject({ model, prompt, schema: z.object({ answer: z.number() }) })).object.answer === 19);
}
