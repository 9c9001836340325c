"""A local verifying proxy: an OpenAI-compatible endpoint on 127.0.0.1 in front of a verified enclave."""
