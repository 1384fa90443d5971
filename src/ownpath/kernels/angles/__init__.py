"""The angles of a decode step's positions, once for all layers."""
