"""How it is deployed: manifests, and what a machine will measure when it boots an image, computed before it does."""
