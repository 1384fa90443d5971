"""The vLLM plugin: V4's products inside vLLM, by our runners (docs/vllm.md).

``register`` is the entry point, ``config`` claims a checkpoint and hands each layer its method, ``model`` takes weights
off vLLM's iterator, ``intake`` plans and fills them, ``methods`` and ``ops`` are the calls. Only ``register``,
``config``, ``methods`` and ``model`` import vLLM.
"""
