"""The subcommands of ``ownpath``, one module each."""
