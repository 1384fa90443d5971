"""Compares the model here with a server elsewhere: log-probs of the same token ids, and a diagnosis of the
difference."""
