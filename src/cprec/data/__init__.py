"""Raw logs to behaviour sequences: catalogue, interactions, splits. No torch."""
