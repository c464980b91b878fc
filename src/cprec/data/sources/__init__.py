"""Where logs come from: each kind of source has a function `load(engine, source)` that gives its `SourceTables`."""
