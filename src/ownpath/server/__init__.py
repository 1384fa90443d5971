"""Serves the engine over HTTP in OpenAI's shape. Every field of a request is honoured or refused, never ignored."""
