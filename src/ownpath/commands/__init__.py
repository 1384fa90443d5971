"""One module per subcommand of ``ownpath``."""
