"""Recommend to the customers of a log: read their events, ask a model folder, print three titles for each.

    python examples/recommend_from_csv.py MODEL LOG [NUM_CUSTOMERS]

LOG is a CSV file with the columns customer, sku and time, as examples/make_logs.py writes it.
"""

from __future__ import annotations

import csv
import sys

from cprec import Recommender

model, log = sys.argv[1:3]
num_customers = int(sys.argv[3]) if len(sys.argv) > 3 else 3

histories: dict[str, list[str]] = {}
with open(log, newline="", encoding="utf-8") as file:
    for row in sorted(csv.DictReader(file), key=lambda row: row["time"]):
        histories.setdefault(row["customer"], []).append(row["sku"])

recommender = Recommender.from_pretrained(model)
for customer, history in sorted(histories.items())[:num_customers]:
    print(f"{customer}, {len(history)} events")
    for item in recommender.recommend(history, k=3):
        print(f"  {item.title} ({item.item_id}, log-probability {item.score:.2f})")
