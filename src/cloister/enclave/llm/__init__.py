"""The built-in app: a language model behind the OpenAI API and the original's, with queue and tenants."""
