"""Models by reference: find, download with progress, describe, digest. Imports only errors."""
