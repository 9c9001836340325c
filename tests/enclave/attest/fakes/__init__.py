"""Machines to run the drivers on: each enforces the rules of the real one, and can be told to misbehave."""
