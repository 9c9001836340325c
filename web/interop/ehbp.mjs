// The npm package `ehbp`, unchanged: sends what it is told and prints what it got, as JSON.
//   node ehbp.mjs '{"url": …, "path": …, "headers": {…}, "bodies": [text, …], "key": hex?}'
// With `key` it seals to that one; without, to the one that the server publishes. Every body is one request.

import { Identity, Transport } from "ehbp";

const asked = JSON.parse(process.argv[2]);
const transport = asked.key
  ? new Transport(await Identity.fromPublicKeyHex(asked.key), new URL(asked.url).host)
  : await Transport.create(asked.url);
const seen = { key: await transport.getServerPublicKeyHex(), answers: [], error: null };
try {
  for (const body of asked.bodies) {
    const response = await transport.post(new URL(asked.path, asked.url), body, { headers: asked.headers });
    const pieces = [];
    for await (const piece of response.body) pieces.push(Buffer.from(piece).toString());
    seen.answers.push({ status: response.status, type: response.headers.get("content-type"), pieces });
  }
} catch (error) {
  seen.error = `${error.name}: ${error.message}`;
}
console.log(JSON.stringify(seen));
