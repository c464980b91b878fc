"""An online layer over any recommender's user vectors: it learns from rewards as they come, and is judged from logs."""
