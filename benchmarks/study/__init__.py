"""The study of CPRec's claims: `python -m benchmarks.study --help`."""
