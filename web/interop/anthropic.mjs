// The npm package `@anthropic-ai/sdk`, unchanged: asks what a program asks, and prints what it saw, as JSON.
//   node anthropic.mjs http://127.0.0.1:8485

import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What does attestation prove?" }];
const asked = { model: "default", messages, max_tokens: 24, temperature: 0 };
const schema = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 }, people: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "people"],
  additionalProperties: false,
};
const seen = {};

seen.models = [];
for await (const model of client.models.list()) seen.models.push([model.id, model.type]);
seen.retrieved = (await client.models.retrieve("default")).id;

const whole = await client.messages.create(asked);
seen.whole = whole.content[0].text;
seen.tokens = whole.usage.output_tokens;
seen.counted = (await client.messages.countTokens({ model: "default", messages })).input_tokens;

const stream = client.messages.stream(asked);
seen.streamed = "";
stream.on("text", (text) => (seen.streamed += text));
seen.stopReason = (await stream.finalMessage()).stop_reason;

const called = await client.messages.create({
  ...asked,
  max_tokens: 200,
  tools: [{ name: "place", description: "A place.", input_schema: schema }],
  tool_choice: { type: "tool", name: "place" },
});
const use = called.content[0];
seen.call = { reason: called.stop_reason, type: use.type, name: use.name, input: use.input };

const endless = client.messages.stream({ ...asked, max_tokens: 2000 });
for await (const event of endless) if (event.type === "content_block_delta") break;
endless.abort();
seen.afterCancelling = (await client.messages.create(asked)).content[0].text;

seen.errors = [];
for (const wrong of [{ max_tokens: 0 }, { model: "claude-nothing" }, { messages: [] }]) {
  try {
    await client.messages.create({ ...asked, ...wrong });
    seen.errors.push(null);
  } catch (error) {
    seen.errors.push({ name: error.constructor.name, status: error.status, type: error.error.error.type });
  }
}
console.log(JSON.stringify(seen));
