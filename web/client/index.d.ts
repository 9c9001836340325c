export const AUTHORITY: 'enclave.invalid';

/** Something on the way, or the enclave, is not what was verified. Nothing of the prompt was sent in clear. */
export class NotTrusted extends Error {}
/** Bytes that do not follow the protocol, or whose seal is broken. */
export class ChannelBroken extends Error {}
/** The answer ended before its authenticated end: what came before is genuine, and not all of it. */
export class TruncatedResponse extends Error {}

export interface FromProxy {
  /** The local verifying proxy, e.g. `http://127.0.0.1:8484`: it judges the enclave by its own policy. */
  proxy: string;
  /**
   * The proxy's own key, where it asks for one: on all systems but Linux, and with `--require-key`. It is the line of
   * `~/.local/state/cloister/proxy.key`; the proxy alone is shown it, never the enclave.
   */
  proxyKey?: string;
  /** Which of the proxy's enclaves, where it has several. */
  upstream?: string;
  /** Where the sealed bytes go, in the place of the address that the proxy names: a page reaches its own origin only. */
  enclave?: string;
  /** Take the verdict "simulated" too. */
  allowSimulated?: boolean;
}

export interface Pinned {
  /** The enclave's address. */
  enclave: string;
  /** Its `application/ohttp-keys` as somebody you trust verified them. They live an hour. */
  keys: Uint8Array;
}

export interface Common {
  /** Refuse keys without ML-KEM. */
  requirePq?: boolean;
  /** What carries the sealed bytes. */
  fetch?: typeof globalThis.fetch;
}

/** A `fetch` for `http://enclave.invalid/…`; every other address is refused. */
export function createFetch(options: (FromProxy | Pinned) & Common): typeof globalThis.fetch;
