"""The untrusted operator's side: starts enclaves, relays their sealed bytes, sees nothing else."""
