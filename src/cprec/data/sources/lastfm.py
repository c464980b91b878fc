"""LastFM of HetRec 2011: which artists a user tagged, and when. Its counts of listening have no time and are not read.

Several tags that a user gives an artist at once are one event (`deduplicate`).
"""

from __future__ import annotations

from typing import Any

from cprec.data.sources.readers import delimited

FORMATS: dict[str, dict[str, Any]] = {
    "lastfm-hetrec": {
        "platform": "lastfm",
        "interactions": ("user_taggedartists-timestamps.dat",),
        "items": ("artists.dat",),
        "read_interactions": delimited(
            "userID", "artistID", "tagID", "timestamp", separator="\t", quote="", header=True
        ),
        "read_items": delimited("artistID", "name", "url", "pictureURL", separator="\t", quote="", header=True),
        "timestamps": "milliseconds",
        "columns": {"user_id": "userID", "item_id": "artistID", "title": "name"},
        "licence": "LastFM, HetRec 2011 (GroupLens, from Last.fm): for non-commercial research",
        "urls": ("https://files.grouplens.org/datasets/hetrec2011/hetrec2011-lastfm-2k.zip",),
        "page": "https://grouplens.org/datasets/hetrec-2011/",
    },
}
