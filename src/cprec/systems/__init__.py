"""Published recommenders as recipes over shared parts."""
