// Options as JSON in argv, what happened as JSON on standard output.

import { readFileSync } from 'node:fs';
import { exchange } from './exchange.mjs';

const { keys, ...options } = JSON.parse(process.argv[2]);
process.stdout.write(JSON.stringify(await exchange(keys ? { ...options, keys: readFileSync(keys) } : options)));
