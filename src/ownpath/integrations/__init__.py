"""Our runners inside other engines. Nothing else of the package needs this room, or the engines."""
