// One exchange for tests/system/test_js_client.py: options as JSON in argv, what happened as JSON on standard output.

import { readFileSync } from 'node:fs';
import OpenAI from 'openai';
import { createFetch } from '../index.js';

const { proxy, enclave, keys, allowSimulated, requirePq, stream, url } = JSON.parse(process.argv[2]);
const trust = proxy ? { proxy, allowSimulated } : { enclave, keys: readFileSync(keys) };
const sealed = createFetch({ ...trust, requirePq });
const seen = { text: '', chunks: 0, usage: null, error: null };
try {
  if (url) {
    const answer = await sealed(url);
    seen.status = answer.status;
    seen.text = await answer.text();
  } else {
    const client = new OpenAI({ baseURL: 'http://enclave.invalid/v1', apiKey: 'none', fetch: sealed, maxRetries: 0 });
    const body = { model: 'default', max_tokens: 24, temperature: 0, messages: [{ role: 'user', content: 'Who are you?' }] };
    if (stream) {
      for await (const event of await client.chat.completions.create({ ...body, stream: true, stream_options: { include_usage: true } })) {
        seen.chunks += 1;
        seen.text += event.choices[0]?.delta?.content ?? '';
        seen.usage = event.usage ?? seen.usage;
      }
    } else {
      const answer = await client.chat.completions.create(body);
      seen.text = answer.choices[0].message.content;
      seen.usage = answer.usage;
    }
  }
} catch (error) {
  for (let one = error; one; one = one.cause) seen.error = `${one.name}: ${one.message}`;
}
process.stdout.write(JSON.stringify(seen));
