"""Two people with keys of their own."""

from cloister.enclave.llm.tenants import new_key

ALICE, ALICE_HASH = new_key()
BOB, BOB_HASH = new_key()
