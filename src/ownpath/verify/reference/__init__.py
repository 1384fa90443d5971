"""The oracle: V4's forward a second time, written for reading, which shares no code with what it judges."""
