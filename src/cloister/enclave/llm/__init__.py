"""The built-in app: a language model behind OpenAI's API, Anthropic's and the original's, with queue and tenants."""
