// The npm package `openai`, unchanged: asks what a program asks, and prints what it saw, as JSON.
//   node openai.mjs http://127.0.0.1:8485/v1

import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
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
for await (const model of await client.models.list()) seen.models.push(model.id);

const whole = await client.chat.completions.create(asked);
seen.whole = whole.choices[0].message.content;
seen.tokens = whole.usage.completion_tokens;

seen.streamed = "";
const stream = await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true, include_obfuscation: true },
});
for await (const chunk of stream) {
  seen.streamed += chunk.choices[0]?.delta.content ?? "";
  if (chunk.usage) seen.streamedTokens = chunk.usage.completion_tokens;
}

const typed = await client.chat.completions.create({
  ...asked,
  max_tokens: 200,
  response_format: { type: "json_schema", json_schema: { name: "place", schema, strict: true } },
});
seen.typed = JSON.parse(typed.choices[0].message.content);

const runner = client.chat.completions.stream({
  ...asked,
  max_tokens: 200,
  tools: [{ type: "function", function: { name: "place", parameters: schema } }],
  tool_choice: { type: "function", function: { name: "place" } },
});
const called = (await runner.finalChatCompletion()).choices[0];
seen.call = { reason: called.finish_reason, ...called.message.tool_calls[0].function };

const response = await client.responses.create({
  model: "default",
  input: messages[0].content,
  max_output_tokens: 24,
  temperature: 0,
});
seen.response = response.output_text;
seen.events = [];
for await (const event of await client.responses.create({
  model: "default",
  input: messages[0].content,
  max_output_tokens: 24,
  temperature: 0,
  stream: true,
})) {
  if (seen.events.at(-1) !== event.type) seen.events.push(event.type);
}

const endless = await client.chat.completions.create({ ...asked, max_tokens: 2000, stream: true });
for await (const _ of endless) break; // leaving the loop aborts the request
seen.afterCancelling = (await client.chat.completions.create(asked)).choices[0].message.content;

seen.errors = [];
for (const wrong of [{ temperature: 9 }, { model: "gpt-nothing" }, { messages: "hello" }]) {
  try {
    await client.chat.completions.create({ ...asked, ...wrong });
    seen.errors.push(null);
  } catch (error) {
    seen.errors.push({ name: error.constructor.name, status: error.status, code: error.code, param: error.param });
  }
}
console.log(JSON.stringify(seen));
