"""Messages <-> token ids. No torch here, and nothing from the other rooms."""
