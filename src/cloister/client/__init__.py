"""What a user imports: verify first, then transports that seal every request to the verified enclave."""
