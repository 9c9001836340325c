// A fetch() that seals what it sends to a verified enclave, and opens what comes back.

import { AUTHORITY, ChannelBroken, NotTrusted, TruncatedResponse, sealRequest } from './channel.js';

export { AUTHORITY, ChannelBroken, NotTrusted, TruncatedResponse };

const SEALED = 'message/ohttp-chunked-res';
const KEY_PROBLEM = 'https://iana.org/assignments/http-problem-types#ohttp-key';
const NOT_OPENED = 'https://cloister.invalid/problems/not-opened';
const DATE_PROBLEM = 'https://iana.org/assignments/http-problem-types#date';
const DIAGNOSTIC = 64 << 10; // bytes of a plaintext answer
const KEY_WANTED = 'The proxy answers only who shows its key: give as `proxyKey` what is in the file that `cloister '
  + 'connect` named when it started.';
// Of the hop between caller and here, or better decided here (a compressed answer tells its content by its size).
const NOT_FORWARDED = new Set(('host connection keep-alive proxy-connection proxy-authorization proxy-authenticate te '
  + 'trailer transfer-encoding upgrade expect accept-encoding content-length date').split(' '));

/**
 * @param {object} options see index.d.ts
 * @returns {typeof fetch} for URLs below http://enclave.invalid/, and no others
 */
export function createFetch({
  proxy, proxyKey = '', upstream, enclave, keys, allowSimulated = false, requirePq = false, fetch: given = globalThis.fetch,
}) {
  if (!proxy === !(enclave && keys)) throw new TypeError('Give `proxy`, or `enclave` and `keys`.');
  if (proxyKey && !proxy) throw new TypeError('`proxyKey` is for a `proxy`, and none is given.');
  const hop = (url, options) => given(url, options); // a browser's own is nobody's method
  const asked = { proxy, proxyKey, upstream, enclave, allowSimulated, hop };
  const trust = proxy ? new ProxyTrust(asked) : new PinnedTrust(enclave, keys);
  let offset = 0; // milliseconds that the enclave's clock is ahead

  async function exchange(request, stale) {
    const trusted = await trust.current(stale);
    const date = [['date', new TextEncoder().encode(new Date(Date.now() + offset).toUTCString())]];
    const inner = { ...request, headers: [...request.headers, ...date] };
    const { body, opener } = await sealRequest(trusted.keys, inner, { requirePq });
    const { origin, pathname } = trusted.enclave;
    const answer = await hop(`${origin}${pathname.replace(/\/+$/, '')}/.well-known/ohttp-gateway`, {
      method: 'POST',
      headers: { 'content-type': 'message/ohttp-chunked-req', incremental: '?1', 'cloister-replica': await replica(trusted.keys) },
      body,
      redirect: 'error',
      credentials: 'omit',
      cache: 'no-store',
      signal: request.signal,
    });
    return { trusted, opener, answer };
  }

  return async function sealedFetch(input, init) {
    const request = await innerRequest(new Request(input, init));
    let { trusted, opener, answer } = await exchange(request);
    if (!isSealed(answer) && await isKeyProblem(answer)) {
      // Plaintext, so a host can forge it: it is believed only as far as asking what is verified now.
      const renewed = await trust.current(trusted);
      if (!same(renewed.keys, trusted.keys)) ({ opener, answer } = await exchange(request));
    }
    let opened = await open(opener, answer);
    if (opened.status === 400 && opened.headers.get('content-type') === 'application/problem+json') {
      const problem = await opened.clone().json();
      const theirs = Date.parse(opened.headers.get('date') ?? '');
      if (problem.type === DATE_PROBLEM && Number.isFinite(theirs)) {
        offset = theirs - Date.now();
        ({ opener, answer } = await exchange(request));
        opened = await open(opener, answer);
      }
    }
    return opened;
  };
}

class PinnedTrust {
  constructor(enclave, keys) {
    this.trusted = { enclave: new URL(enclave), keys: new Uint8Array(keys) };
  }

  async current() {
    return this.trusted;
  }
}

/** What the local proxy verified, asked again when it runs out and when keys are refused. */
class ProxyTrust {
  #verification; #headers; #enclave; #allowSimulated; #hop; #pending = null; #trusted = null;

  constructor({ proxy, proxyKey, upstream, enclave, allowSimulated, hop }) {
    this.#verification = new URL('/verification', proxy);
    this.#headers = proxyKey ? { authorization: `Bearer ${oneWord(proxyKey)}` } : {};
    if (upstream) this.#verification.searchParams.set('upstream', upstream);
    this.#enclave = enclave;
    this.#allowSimulated = allowSimulated;
    this.#hop = hop;
  }

  async current(stale) {
    const known = this.#trusted;
    if (known && known !== stale && Date.now() < known.until) return known;
    // The proxy holds a verification for an hour; keys that the enclave refuses are to be looked at anew.
    this.#pending ??= this.#ask(known !== null && known === stale).finally(() => { this.#pending = null; });
    return this.#pending;
  }

  async #ask(fresh) {
    const url = new URL(this.#verification);
    if (fresh) url.search += `${url.search ? '&' : '?'}fresh`;
    const answer = await this.#hop(url, { headers: this.#headers, redirect: 'error', cache: 'no-store' });
    const verdict = await answer.json().catch(() => null) ?? {};
    if (answer.status !== 200) throw new NotTrusted(refusal(answer.status, verdict.error));
    const accepted = verdict.verdict === 'trusted' || (verdict.verdict === 'simulated' && this.#allowSimulated);
    if (!accepted) throw new NotTrusted(`The proxy's verdict is "${verdict.verdict}".`);
    if (typeof verdict.ohttp_keys !== 'string') throw new NotTrusted('The proxy names no keys; is it of this release?');
    this.#trusted = { enclave: new URL(this.#enclave ?? verdict.enclave), keys: base64(verdict.ohttp_keys), until: verdict.expires_at * 1000 };
    return this.#trusted;
  }
}

/** Trimmed: a key is often read from a file of one line. What `fetch` refuses as a header it repeats in its error. */
function oneWord(key) {
  const word = String(key).trim();
  if (!/^[!-~]+$/.test(word)) throw new TypeError('`proxyKey` is one word of ASCII: the line of the file proxy.key.');
  return word;
}

/** What a proxy that verified nothing says, or what is to be done about it. */
function refusal(status, error) {
  if (error?.code === 'proxy_key') return KEY_WANTED;
  const { message = `The proxy could not verify the enclave (status ${status}).`, hint } = error ?? {};
  return hint ? `${message} ${hint}` : message;
}

async function innerRequest(request) {
  const url = new URL(request.url);
  if (url.host !== AUTHORITY) throw new TypeError(`A sealed request goes to http://${AUTHORITY} and nowhere else.`);
  const latin1 = (text) => Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const headers = [...request.headers].filter(([name]) => !NOT_FORWARDED.has(name)).map(([name, value]) => [name, latin1(value)]);
  const content = new Uint8Array(await request.arrayBuffer());
  return { method: request.method, path: url.pathname + url.search, headers, content, signal: request.signal };
}

function isSealed(answer) {
  return answer.status === 200 && (answer.headers.get('content-type') ?? '').split(';')[0].trim() === SEALED;
}

/** A key that is gone, or one that a restarted enclave has another of under the same identifier. */
async function isKeyProblem(answer) {
  const expected = { 422: KEY_PROBLEM, 400: NOT_OPENED }[answer.status];
  if (!expected || !answer.body) return false;
  try {
    return JSON.parse(await diagnostic(answer.body)).type === expected;
  } catch (error) {
    if (error?.name === 'AbortError') throw error;
    return false;
  }
}

/** The first 64 KiB or so of what anybody on the way may have written; the rest is not waited for. */
async function diagnostic(body) {
  const reader = body.getReader();
  const text = new TextDecoder();
  let said = '';
  try {
    for (let length = 0; length < DIAGNOSTIC;) {
      const { done, value } = await reader.read();
      if (done) break;
      length += value.length;
      said += text.decode(value, { stream: true });
    }
    return said;
  } finally {
    await letGo(reader);
    reader.releaseLock();
  }
}

/** Nobody reads on, so the connection is free. */
const letGo = (body, reason) => body.cancel(reason).catch(() => {});

/** Reads until the head has opened; the rest follows as the body is read. */
async function open(opener, answer) {
  if (!isSealed(answer)) {
    if (answer.body) await letGo(answer.body);
    throw new NotTrusted(`An answer came outside the sealed channel (status ${answer.status}); it is not the enclave's word.`);
  }
  const reader = answer.body.getReader();
  const first = [];
  let head = null;
  const step = async (sink) => {
    const { done, value } = await reader.read().catch((error) => {
      if (error?.name === 'AbortError') throw error;
      return { done: true };
    });
    if (done) {
      opener.end();
      return true;
    }
    const opened = await opener.push(value);
    head ??= opened.head;
    opened.parts.forEach(sink);
    return false;
  };
  const more = (sink) => step(sink).catch(async (error) => {
    await letGo(reader, error);
    throw error;
  });
  let ended = false;
  while (!head && !ended) ended = await more((part) => first.push(part));
  if (!head) throw new ChannelBroken('The answer ended well and had no head.');
  const body = new ReadableStream({
    start(controller) {
      first.forEach((part) => controller.enqueue(part));
    },
    async pull(controller) {
      let told = false;
      while (!told) {
        if (ended || await more((part) => { controller.enqueue(part); told = true; })) {
          controller.close();
          return;
        }
      }
    },
    cancel: (reason) => reader.cancel(reason),
  });
  const empty = head.status === 204 || head.status === 205 || head.status === 304;
  return new Response(empty ? null : body, { status: head.status, headers: head.headers });
}

async function replica(keys) {
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', keys));
  return [...digest.subarray(0, 8)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

const base64 = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const same = (one, other) => one.length === other.length && one.every((byte, at) => byte === other[at]);
