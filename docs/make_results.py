"""Write the table of trained systems in docs/results.md from docs/results.json.

`python docs/make_results.py FOLDER ...` first takes the rows of evaluations (`cprec run baselines`) into that file, in
place of earlier ones of the same name. A test checks that the page is current.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cprec.errors import ConfigError
from cprec.evaluate.results import DomainResult, read_report
from cprec.fit.answer import compare_saved
from cprec.lineup import LINEUP
from cprec.provenance import read_resolved

PAGE, ROWS = (Path(__file__).with_name(name) for name in ("results.md", "results.json"))
BEGIN, END = "<!-- systems: written by make_results.py -->\n", "<!-- systems: end -->"
CONTROLS: Mapping[str, str] = {
    **dict.fromkeys(("NGCF", "AlphaRec"), "LightGCN"),
    **dict.fromkeys(("HMamba", "SIGMA", "MMM4Rec"), "Mamba4Rec"),
    **dict.fromkeys(("Mamba4Rec", "ICSRec", "SRA-CL", "MQSA-TED", "SLMRec", "H2Rec"), "SASRec (wide)"),
    "Human priors (titles)": "SASRec (wide)",
    **dict.fromkeys(("SASRec (titles)", "SASRec (denoised)"), "SASRec"),
    **dict.fromkeys(("APAO", "MSCGRec", "Mender", "PRISM", "STREAM-Rec"), "TIGER"),
    "REG4Rec": "MDGR",
    **dict.fromkeys(("ReaRec", "ReaRec (progressive)"), "ReaRec (more blocks)"),
    **{name: f"{name} (more blocks)" for name in ("ManCAR", "IGR-SR")},
}
"""The row that a system is compared with: the system that it adds to, or as many operations without its steps."""


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The trained rows of an evaluation, by domain and name. Raises ConfigError for one that asked for anything but all
    test queries, or whose rows have learnt the validation events."""
    config = read_resolved(folder)["config"]
    asked = {name: config[name] for name in ("part", "max_queries", "refit", "exclude_seen")}
    if asked != (expected := {"part": "test", "max_queries": 0, "refit": False, "exclude_seen": True}):
        raise ConfigError(f"{folder} was made with {asked}, and the table is of {expected}: evaluate so first")
    report = read_report(folder / "report.json")
    return {name: dict(_rows(result, folder)) for name, result in report.domains.items()}


def _rows(result: DomainResult, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, arm in result.arms.items():
        if arm.cost.train_seconds is None or name not in LINEUP:
            continue
        main, recall = (arm.metrics[replace(result.main, name=metric)] for metric in ("ndcg", "recall"))
        row: dict[str, Any] = {
            "ndcg@10": [round(number, 5) for number in (main.mean, main.low, main.high)],
            "recall@10": round(recall.mean, 5),
            "parameters": arm.cost.num_parameters,
            "training seconds": round(arm.cost.train_seconds),
            "milliseconds a query": round(arm.cost.milliseconds_per_query, 3),
        }
        control = CONTROLS.get(name, "")
        if control in result.arms:
            test = compare_saved(folder, result, 0, name, control)
            row["less its control"] = [round(number, 5) for number in (test.mean, test.low, test.high)]
        yield name, row


def tables(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each domain, its rows in the order of `LINEUP`."""
    return "".join(f"\n### Systems on {domain}\n\n{_table(of_domain)}" for domain, of_domain in rows.items())


def _table(rows: Mapping[str, Any]) -> str:
    lines = [
        "| | NDCG@10 | Recall@10 | NDCG@10 less its control's | control | parameters | training, s | ms a query |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    best = max(row["ndcg@10"][0] for row in rows.values())
    for name in (name for name in LINEUP if name in rows):
        row = rows[name]
        mean, low, high = row["ndcg@10"]
        shown = f"{mean:.4f} [{low:.4f}, {high:.4f}]"
        less = row.get("less its control")
        cells = [
            name,
            f"**{shown}**" if mean == best else shown,
            f"{row['recall@10']:.4f}",
            "{:+.4f} [{:+.4f}, {:+.4f}]".format(*less) if less else "",
            CONTROLS[name] if less else "",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['training seconds']:,}",
            f"{row['milliseconds a query']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The text of docs/results.md with its table of systems."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest[rest.index(END) :]
    return f"{before}{BEGIN}{tables(json.loads(ROWS.read_text()))}\n{after}"


def main(folders: Sequence[str]) -> None:
    """See the module."""
    rows: dict[str, Any] = json.loads(ROWS.read_text()) if ROWS.is_file() else {}
    for folder in folders:
        for domain, found in rows_of(Path(folder)).items():
            rows[domain] = rows.get(domain, {}) | found
    ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
