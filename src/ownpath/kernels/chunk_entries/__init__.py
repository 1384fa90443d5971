"""A step with chunks before it attends: near keys, and the entries whose windows end."""
