"""OpenAI-shaped HTTP over the engine. Every field of a request is honoured or refused, never ignored."""
