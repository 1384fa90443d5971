"""The vLLM plugin: V4's products inside vLLM, by our runners (docs/vllm.md).

``register`` is the entry point, which ``versions`` may refuse (``refusal``). ``config`` claims a checkpoint and hands
each layer its method, ``model`` takes weights off vLLM's iterator, ``intake`` plans and fills them, ``methods`` and
``ops`` are the calls, ``seam`` and ``hyper`` the hyper-connections, ``breaks`` where graphs break. ``mapped`` are
the kernels of experts with a map. ``names``, ``intake``, ``mapped``, ``ops``, ``hyper``, ``versions`` and ``report``
import no vLLM.
"""
