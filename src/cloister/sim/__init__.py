"""A software TEE with its own throw-away root, for laptops and tests; trusted only by callers who name that root."""
