"""Proof of a running vLLM: taps on its modules, and our reference of each module on what that module got."""
