"""Before the port opens: runs fixed prompts through the engine and checks their raw logits."""
