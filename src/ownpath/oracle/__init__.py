"""DeepSeek-V4 a second time: what bytes mean, each formula once, and the forward made of them.

It shares no arithmetic with what it judges: neither ``numerics`` nor ``weights``, no kernel and no kernel's twin. From
the rest of the package it takes names: which tensors store a module, what slots are called, the fields of config.json.
"""
