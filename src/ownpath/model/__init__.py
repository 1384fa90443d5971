"""DeepSeek-V4's forward, one module a file. Imports no kernel."""
