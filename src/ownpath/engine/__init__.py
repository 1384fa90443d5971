"""Runs many requests through one model: schedules steps, samples tokens, reports to each request."""
