"""The processes, or threads, that run one model together: what they give each other, and how they fail."""
