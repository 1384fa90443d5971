"""The layers stage: every layer of the engine on the reference's streams, and the whole model on its own."""
