// One exchange, for tests/system/test_js_client.py: what happened, as plain data. Runs in Node and in a page.

import OpenAI from 'openai';
import { createFetch } from '../index.js';

export async function exchange({ stream, url, again, ...trust }) {
  const seen = { text: '', chunks: 0, usage: null, error: null };
  try {
    const sealed = createFetch(trust);
    if (url) {
      const answer = await sealed(url);
      seen.status = answer.status;
      seen.text = await answer.text();
      if (again) {
        await fetch(again); // whereupon something changes
        const second = await sealed(url);
        seen.again = second.status;
      }
      return seen;
    }
    const options = { apiKey: 'none', fetch: sealed, maxRetries: 0, dangerouslyAllowBrowser: true };
    const client = new OpenAI({ ...options, baseURL: 'http://enclave.invalid/v1' });
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
  } catch (error) {
    for (let one = error; one; one = one.cause) seen.error = `${one.name}: ${one.message}`;
  }
  return seen;
}
