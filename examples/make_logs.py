"""Write the logs of a toy shop, to try CPRec without logs of one's own: customers, books and films, made up by a seed.

    python examples/make_logs.py [FOLDER]

Four CSV files appear in FOLDER (logs if none is named): the events and the items of the domains books and films.
"""

from __future__ import annotations

import csv
import sys
from datetime import UTC, datetime
from pathlib import Path

from cprec.data.config import SyntheticConfig
from cprec.data.sources.synthetic import SyntheticWorld

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "logs")
folder.mkdir(parents=True, exist_ok=True)
world = SyntheticWorld(SyntheticConfig(num_library_users=300, num_market_users=1, items_per_domain=80, max_events=14))

for domain in ("books", "films"):
    items, events = world.tables()[domain]
    with open(folder / f"{domain}_items.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["sku", "name"])
        table.writerows([item["item_id"], item["title"]] for item in items.to_pylist())
    with open(folder / f"{domain}_events.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["customer", "sku", "time"])
        for event in events.to_pylist():
            moment = datetime.fromtimestamp(event["timestamp"], UTC)
            table.writerow([event["user_id"], event["item_id"], moment.strftime("%Y-%m-%dT%H:%M:%S")])
print(f"wrote the logs of books and films into {folder}")
