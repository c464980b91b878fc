"""LastFM of HetRec 2011: which artists a user tagged, and when. Its counts of listening have no time and are not read.

Several tags that a user gives an artist at once are one event (`deduplicate`).
"""

from __future__ import annotations

from cprec.data.sources.readers import Format, delimited

FORMATS = {
    "lastfm-hetrec": Format(
        interactions=delimited("userID", "artistID", "tagID", "timestamp", separator="\t", quote="", header=True),
        items=delimited("artistID", "name", "url", "pictureURL", separator="\t", quote="", header=True),
        timestamps="milliseconds",
        columns={"user_id": "userID", "item_id": "artistID", "title": "name"},
    )
}
