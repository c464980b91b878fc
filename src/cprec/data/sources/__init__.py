"""One raw format each, read into canonical tables.

A source has a `domain`, a `platform` and a method `load(engine)` that gives the `SourceTables` of
`cprec.data.sources.tables`. Users of one platform are the same people in all its domains.
"""
