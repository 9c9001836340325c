// Conversations in this browser, each encrypted by itself: AES-256-GCM, the record's name authenticated with it. What can
// be seen without the key is how many there are, and how long.

const DATABASE = "cloister-chat";
const STORE = "records";
const IV_BYTES = 12;

interface Sealed {
  id: string;
  iv: Uint8Array<ArrayBuffer>;
  data: ArrayBuffer;
}

export interface Vault {
  /** Whether it is still there after the page was closed. */
  readonly keeps: boolean;
  /** Of all records that open; `closed`: how many do not. */
  all(): Promise<{ values: Map<string, unknown>; closed: number }>;
  put(id: string, value: unknown): Promise<void>;
  remove(id: string): Promise<void>;
  wipe(renew: () => Promise<Uint8Array<ArrayBuffer>>): Promise<void>;
}

export async function openVault(raw: Uint8Array<ArrayBuffer>): Promise<Vault> {
  return new BrowserVault(await database(), await imported(raw));
}

/** For a page without a key: it forgets. */
export class Forgetful implements Vault {
  readonly keeps = false;
  async all() {
    return { values: new Map<string, unknown>(), closed: 0 };
  }
  async put() {}
  async remove() {}
  async wipe() {}
}

class BrowserVault implements Vault {
  readonly keeps = true;

  constructor(
    private readonly database: IDBDatabase,
    private key: CryptoKey,
  ) {}

  async all() {
    const values = new Map<string, unknown>();
    let closed = 0;
    for (const record of await this.run<Sealed[]>("readonly", (store) => store.getAll())) {
      try {
        values.set(record.id, await this.open(record));
      } catch {
        closed += 1;
      }
    }
    return { values, closed };
  }

  async put(id: string, value: unknown) {
    const iv = crypto.getRandomValues(new Uint8Array(IV_BYTES));
    const content = new TextEncoder().encode(JSON.stringify(value));
    const data = await crypto.subtle.encrypt(this.algorithm(id, iv), this.key, content);
    await this.run("readwrite", (store) => store.put({ id, iv, data } satisfies Sealed));
  }

  async remove(id: string) {
    await this.run("readwrite", (store) => store.delete(id));
  }

  async wipe(renew: () => Promise<Uint8Array<ArrayBuffer>>) {
    await this.run("readwrite", (store) => store.clear());
    this.key = await imported(await renew());
  }

  private async open({ id, iv, data }: Sealed): Promise<unknown> {
    return JSON.parse(new TextDecoder().decode(await crypto.subtle.decrypt(this.algorithm(id, iv), this.key, data)));
  }

  private algorithm(id: string, iv: Uint8Array<ArrayBuffer>): AesGcmParams {
    return { name: "AES-GCM", iv, additionalData: new TextEncoder().encode(`cloister chat 1 ${id}`) };
  }

  private run<T>(mode: IDBTransactionMode, ask: (store: IDBObjectStore) => IDBRequest): Promise<T> {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(STORE, mode);
      const request = ask(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result as T);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  }
}

function imported(raw: Uint8Array<ArrayBuffer>): Promise<CryptoKey> {
  return crypto.subtle.importKey("raw", raw, "AES-GCM", false, ["encrypt", "decrypt"]);
}

function database(): Promise<IDBDatabase> {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
