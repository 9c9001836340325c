// A receiver by npm's `hpke`, for tests/system/test_js_client.py: its public key first, then what it opened of each line of
// standard input. Bytes are hexadecimal.

import { createInterface } from 'node:readline';
import { AEAD_ChaCha20Poly1305, KEM_MLKEM768_X25519 } from '@panva/hpke-noble';
import {
  AEAD_AES_128_GCM, AEAD_AES_256_GCM, CipherSuite, KDF_HKDF_SHA256, KEM_DHKEM_X25519_HKDF_SHA256,
} from 'hpke';

const KEMS = { [0x0020]: KEM_DHKEM_X25519_HKDF_SHA256, [0x647a]: KEM_MLKEM768_X25519 };
const AEADS = { 1: AEAD_AES_128_GCM, 2: AEAD_AES_256_GCM, 3: AEAD_ChaCha20Poly1305 };
const suite = (aead) => new CipherSuite(KEMS[process.argv[2]], KDF_HKDF_SHA256, AEADS[aead]);
const bytes = (hex) => Uint8Array.from(Buffer.from(hex, 'hex'));
const hex = (data) => Buffer.from(data).toString('hex');
const tell = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);

async function receive({ aead, enc, info, messages, context }) {
  const opened = [];
  try {
    const receiver = await suite(aead).SetupRecipient(pair, bytes(enc), { info: bytes(info) });
    for (const [aad, sealed] of messages) opened.push(hex(await receiver.Open(bytes(sealed), bytes(aad))));
    return { opened, exported: hex(await receiver.Export(bytes(context), 32)), error: null };
  } catch (error) {
    return { opened, exported: null, error: error.name };
  }
}

const pair = await suite(1).GenerateKeyPair();
tell({ public: hex(await suite(1).SerializePublicKey(pair.publicKey)) });
for await (const line of createInterface({ input: process.stdin })) tell(await receive(JSON.parse(line)));
