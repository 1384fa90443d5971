"""Before the port opens: fixed prompts through the running engine, and what their raw logits look like."""
