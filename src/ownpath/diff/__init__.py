"""A model here against a server elsewhere: the same token ids, both log-probs, and what the difference looks like."""
