"""Words only the verified enclave can read: HPKE, Binary HTTP, chunked Oblivious HTTP, padding. Sans-I/O."""
