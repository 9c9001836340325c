"""Everything that runs inside the enclave, and nothing else; with its import closure, it is what is measured."""
