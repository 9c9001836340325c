"""The models on this machine: named, fetched, described, quantized, weighed against its memory, and traced to where
they come from. Imports only errors."""
