// Chunked Oblivious HTTP (draft-ietf-ohai-chunked-ohttp) around Binary HTTP (RFC 9292), the client's half.
// Bytes in, bytes out: no I/O in here. The same protocol as cloister.channel.

import {
  AEAD_AES_128_GCM, AEAD_AES_256_GCM, CipherSuite, KDF_HKDF_SHA256, KEM_DHKEM_X25519_HKDF_SHA256,
} from 'hpke';
import { KEM_MLKEM768_X25519 } from '@panva/hpke-noble';

export const AUTHORITY = 'enclave.invalid';

/** Something on the way, or the enclave, is not what was verified. */
export class NotTrusted extends Error { name = 'NotTrusted'; }
/** Bytes that do not follow the protocol, or whose seal is broken. */
export class ChannelBroken extends Error { name = 'ChannelBroken'; }
/** The answer ended before its authenticated end: what came before is genuine, and not all of it. */
export class TruncatedResponse extends Error { name = 'TruncatedResponse'; }

const MAX_CHUNK = 16384;
const TAG = 16;
const MAX_HEAD = 65536;
const X25519 = 0x0020;
const XWING = 0x647a;
const HKDF_SHA256 = 0x0001;
// Strongest first; the order of the offer has no say.
const KEMS = [
  { id: XWING, publicLength: 1216, factory: KEM_MLKEM768_X25519 },
  { id: X25519, publicLength: 32, factory: KEM_DHKEM_X25519_HKDF_SHA256 },
];
const AEADS = [
  { id: 0x0002, key: 32, factory: AEAD_AES_256_GCM },
  { id: 0x0001, key: 16, factory: AEAD_AES_128_GCM },
];

const ascii = new TextEncoder();
const latin1 = new TextDecoder('latin1');
const EMPTY = new Uint8Array();
const FINAL = ascii.encode('final');

export function concat(...parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

function uint16(number) {
  return Uint8Array.of(number >> 8, number & 255);
}

/** RFC 9000, section 16: the shortest form, for numbers below 2^30. */
export function varint(number) {
  if (number < 1 << 6) return Uint8Array.of(number);
  if (number < 1 << 14) return Uint8Array.of((number >> 8) | 0x40, number & 255);
  if (number < 1 << 30) return Uint8Array.of((number >> 24) | 0x80, (number >> 16) & 255, (number >> 8) & 255, number & 255);
  throw new RangeError('The request is too large.');
}

const string = (bytes) => concat(varint(bytes.length), bytes);
const fieldLines = (fields) => concat(...fields.flatMap(([name, value]) => [string(ascii.encode(name)), string(value)]));

/** Known-length framing, padded with zeros to a power of two, 1 KiB at least. `headers`: [lower-case name, bytes]. */
export function encodeRequest({ method, path, headers, content }) {
  const control = [method, 'https', AUTHORITY, path].map((text) => string(ascii.encode(text)));
  const message = concat(varint(0), ...control, string(fieldLines(headers)), string(content), varint(0));
  let length = 1024;
  while (length < message.length) length *= 2;
  return concat(message, new Uint8Array(length - message.length));
}

/** The key configs of `application/ohttp-keys` (RFC 9458, section 3) that this client knows how to use. */
export function parseConfigs(bytes) {
  const found = [];
  for (let at = 0; at < bytes.length;) {
    const length = (bytes[at] << 8) | bytes[at + 1];
    const config = bytes.subarray(at + 2, at + 2 + length);
    if (at + 2 > bytes.length || config.length !== length || length < 3) throw new ChannelBroken('A key config is cut off.');
    at += 2 + length;
    const kem = KEMS.find(({ id }) => id === ((config[1] << 8) | config[2]));
    if (!kem) continue;
    const end = 3 + kem.publicLength;
    const suites = config.subarray(end + 2);
    if (config.length < end + 2 || suites.length !== ((config[end] << 8) | config[end + 1]) || suites.length % 4) {
      throw new ChannelBroken('A key config has the wrong length.');
    }
    for (let i = 0; i < suites.length; i += 4) {
      const [kdf, aeadId] = [(suites[i] << 8) | suites[i + 1], (suites[i + 2] << 8) | suites[i + 3]];
      const aead = AEADS.find(({ id }) => id === aeadId);
      if (kdf === HKDF_SHA256 && aead) found.push({ keyId: config[0], kem, aead, publicKey: config.slice(3, end) });
    }
  }
  return found;
}

/** The strongest of `configs`. Throws NotTrusted when none will do. */
export function choose(configs, { requirePq = false } = {}) {
  for (const kem of requirePq ? KEMS.slice(0, 1) : KEMS) {
    for (const aead of AEADS) {
      const found = configs.find((config) => config.kem === kem && config.aead === aead);
      if (found) return found;
    }
  }
  throw new NotTrusted(`The enclave offers no ${requirePq ? 'post-quantum key' : 'key of a known kind'} to seal to.`);
}

/** Seals `request` (as for encodeRequest) under the strongest key of `keys` (application/ohttp-keys bytes). */
export async function sealRequest(keys, request, options) {
  const { keyId, kem, aead, publicKey } = choose(parseConfigs(keys), options);
  const suite = new CipherSuite(kem.factory, KDF_HKDF_SHA256, aead.factory);
  const header = concat(Uint8Array.of(keyId), uint16(kem.id), uint16(HKDF_SHA256), uint16(aead.id));
  const info = concat(ascii.encode('message/bhttp chunked request'), Uint8Array.of(0), header);
  const receiver = await suite.DeserializePublicKey(publicKey);
  const { encapsulatedSecret: enc, ctx } = await suite.SetupSender(receiver, { info });
  const message = encodeRequest(request);
  const parts = [header, enc];
  let at = 0;
  for (; message.length - at > MAX_CHUNK; at += MAX_CHUNK) {
    const sealed = await ctx.Seal(message.subarray(at, at + MAX_CHUNK), EMPTY);
    parts.push(varint(sealed.length), sealed);
  }
  parts.push(varint(0), await ctx.Seal(message.subarray(at), FINAL));
  const secret = await ctx.Export(ascii.encode('message/bhttp chunked response'), Math.max(12, aead.key));
  return { body: concat(...parts), opener: new ResponseOpener(secret, enc, aead) };
}

async function hkdf(usage, keyBytes, data) {
  const key = await crypto.subtle.importKey('raw', keyBytes, { name: 'HMAC', hash: 'SHA-256' }, false, ['sign']);
  return new Uint8Array(await crypto.subtle.sign('HMAC', key, data));
}

const expand = async (prk, info, length) =>
  (await hkdf('expand', prk, concat(ascii.encode(info), Uint8Array.of(1)))).slice(0, length); // one block holds 32 bytes

/**
 * Opens a sealed answer as it arrives. `push` gives { head, parts } of what is open by now; `end` must be called when
 * the connection ends, and throws TruncatedResponse unless the answer's own end was among it.
 */
export class ResponseOpener {
  #secret; #enc; #aead; #key; #nonce; #counter = 0n; #sealed = EMPTY; #plain = EMPTY; #final = false; #complete = false;
  #state = 'framing'; #left = 0; #head = null; #status = 0; #fields = []; #spent = 0;

  constructor(secret, enc, aead) {
    this.#secret = secret;
    this.#enc = enc;
    this.#aead = aead;
  }

  async push(data) {
    const before = this.#head;
    const parts = [];
    if (this.#complete && data.length) throw new ChannelBroken('There is data after the answer\'s end.');
    this.#sealed = concat(this.#sealed, data);
    if (!this.#key && !(await this.#setUp())) return { head: null, parts };
    for (let sealed; (sealed = this.#takeChunk());) parts.push(...this.#decode(await this.#open(EMPTY, sealed)));
    if (this.#final && !this.#complete) parts.push(...(await this.#tryFinal()));
    return { head: before ? null : this.#head, parts };
  }

  end() {
    if (!this.#complete) throw new TruncatedResponse('The answer ended before its authenticated end. Ask again.');
  }

  async #setUp() {
    const length = Math.max(12, this.#aead.key);
    if (this.#sealed.length < length) return false;
    const salt = concat(this.#enc, this.#sealed.subarray(0, length));
    this.#sealed = this.#sealed.subarray(length);
    const prk = await hkdf('extract', salt, this.#secret);
    const raw = await expand(prk, 'key', this.#aead.key);
    this.#nonce = await expand(prk, 'nonce', 12);
    this.#key = await crypto.subtle.importKey('raw', raw, 'AES-GCM', false, ['decrypt']);
    return true;
  }

  async #open(aad, sealed) {
    const iv = this.#nonce.slice();
    for (let at = 11, count = this.#counter; count; at -= 1, count >>= 8n) iv[at] ^= Number(count & 255n);
    try {
      const options = { name: 'AES-GCM', iv, additionalData: aad, tagLength: 8 * TAG };
      const plain = new Uint8Array(await crypto.subtle.decrypt(options, this.#key, sealed));
      this.#counter += 1n;
      return plain;
    } catch {
      throw new ChannelBroken('The sealed answer did not open.');
    }
  }

  #takeChunk() {
    const buffer = this.#sealed;
    if (!this.#final && buffer.length) {
      const [length, start] = readVarint(buffer, 0) ?? [];
      if (start === undefined) return null;
      if (length) {
        if (length <= TAG || length > MAX_CHUNK + TAG) throw new ChannelBroken('A chunk is empty or too large.');
        if (buffer.length < start + length) return null;
        this.#sealed = buffer.subarray(start + length);
        return buffer.subarray(start, start + length);
      }
      this.#sealed = buffer.subarray(start);
      this.#final = true;
    }
    if (this.#final && this.#sealed.length > MAX_CHUNK + TAG) throw new ChannelBroken('The final chunk is too large.');
    return null;
  }

  /** The final chunk reaches to the end of the message, so that only its tag tells when it is whole. */
  async #tryFinal() {
    if (this.#sealed.length < TAG) return [];
    let plain;
    try {
      plain = await this.#open(FINAL, this.#sealed);
    } catch {
      return [];
    }
    const parts = this.#decode(plain);
    if (this.#state !== 'padding') throw new TruncatedResponse('The answer ended before its own end. Ask again.');
    this.#sealed = EMPTY;
    this.#complete = true;
    return parts;
  }

  /** Binary HTTP, indeterminate length (what cloister sends): head once, then the content's parts. */
  #decode(data) {
    this.#plain = concat(this.#plain, data);
    const parts = [];
    for (;;) {
      if (this.#state === 'content' && this.#left) {
        if (!this.#plain.length) return parts;
        const part = this.#plain.slice(0, this.#left);
        this.#left -= part.length;
        this.#plain = this.#plain.subarray(part.length);
        parts.push(part);
      } else if (this.#state === 'padding') {
        if (this.#plain.some((byte) => byte)) throw new ChannelBroken('The padding is not all zeros.');
        this.#plain = EMPTY;
        return parts;
      } else if (!this.#step()) return parts;
    }
  }

  /** One item of the message; false when more bytes are needed. */
  #step() {
    const found = readVarint(this.#plain, 0);
    if (!found) return false;
    const [number, start] = found;
    switch (this.#state) {
      case 'framing':
        if (number !== 3) throw new ChannelBroken('The answer is not framed as a cloister sends it.');
        this.#state = 'status';
        break;
      case 'status':
        if (number < 100 || number > 599) throw new ChannelBroken('The answer\'s status is none.');
        this.#status = number;
        this.#state = 'fields';
        break;
      case 'content':
        if (number) this.#left = number;
        else this.#state = 'trailers';
        break;
      default:
        return this.#field(number, start);
    }
    this.#plain = this.#plain.subarray(start);
    return true;
  }

  #field(length, start) {
    this.#count(0, length);
    if (!length) {
      this.#plain = this.#plain.subarray(start);
      this.#endFields();
      return true;
    }
    const value = readVarint(this.#plain, start + length);
    if (!value) return false;
    this.#count(length, value[0]);
    const end = value[1] + value[0];
    if (this.#plain.length < end) return false;
    this.#spent += length + value[0] + 2;
    const name = latin1.decode(this.#plain.subarray(start, start + length));
    if (!/^[!#$%&'*+\-.^_`|~0-9a-z]+$/.test(name)) throw new ChannelBroken('A field\'s name is none.');
    this.#fields.push([name, latin1.decode(this.#plain.subarray(value[1], end))]);
    this.#plain = this.#plain.subarray(end);
    return true;
  }

  #count(...lengths) {
    if (lengths.reduce((sum, one) => sum + one, this.#spent) > MAX_HEAD) throw new ChannelBroken('The answer\'s fields are too long.');
  }

  #endFields() {
    const fields = this.#fields;
    this.#fields = [];
    if (this.#state === 'trailers') this.#state = 'padding';
    else if (this.#status < 200) this.#state = 'status'; // informational: the final one follows
    else {
      this.#head = { status: this.#status, headers: fields };
      this.#state = 'content';
    }
  }
}

/** [number, where it ends], or null when it has not all come. Numbers over 2^53 are refused. */
function readVarint(bytes, at) {
  if (at >= bytes.length) return null;
  const length = 1 << (bytes[at] >> 6);
  if (at + length > bytes.length) return null;
  let number = bytes[at] & 63;
  for (let i = 1; i < length; i += 1) number = number * 256 + bytes[at + i];
  if (!Number.isSafeInteger(number)) throw new ChannelBroken('A number is too large.');
  return [number, at + length];
}
