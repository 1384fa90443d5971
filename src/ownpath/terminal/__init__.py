"""Everything that people read: escaped text, tables that fit the terminal, progress, and the lines of the log."""
