"""The ends of a step with drafts: which guesses are right, and where its requests go on."""
