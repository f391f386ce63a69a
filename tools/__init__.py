"""For contributors: what draws, measures and mutates this repository. Not shipped."""
