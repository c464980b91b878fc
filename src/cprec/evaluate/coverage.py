"""Whether the leakage certificate of a data folder covers what an evaluation shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cprec.data.dataset import event_files
from cprec.errors import DataError, LeakageError
from cprec.evaluate.results import CertificateSummary
from cprec.provenance import FileHashes, differences, shortened

CERTIFICATE = "certificate.json"


def check_certificate(
    data: str | Path,
    domain: str,
    part: str,
    trained_on: Mapping[str, Sequence[str]],
    hashes: FileHashes,
    *,
    uncertified: bool = False,
) -> bool:
    """Whether the certificate of a data folder is clean and covers its events, the domain's queries and the models.

    `trained_on` has the hashes of the shards that each model was trained on. Baselines learn from the events.

    Raises LeakageError where it does not, unless `uncertified` is set, and DataError where the file is no certificate.
    """
    problem = gap_of_certificate(Path(data), domain, part, trained_on, hashes)
    if problem and not uncertified:
        raise LeakageError(f"{problem} (uncertified=true ranks all the same, and says so in every table)")
    return problem is None


def gap_of_certificate(
    data: Path, domain: str, part: str, trained_on: Mapping[str, Sequence[str]], hashes: FileHashes
) -> str | None:
    """Why the certificate does not cover an evaluation, and what to do; None where it does."""
    path, audit = data / CERTIFICATE, f"`cprec audit {data}`"
    if not path.is_file():
        return f"{path} is missing: make it with {audit}"
    try:
        certificate: dict[str, Any] = json.loads(path.read_text())
        known = set(certificate["artifacts"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is no certificate: make it anew with {audit}") from None
    if not certificate["clean"]:
        wrong = [p["name"] for p in certificate["properties"] if p["violations"]]
        return f"{path} found leaks: {'; '.join(wrong)}"
    if unknown := [name for name, shards in trained_on.items() if not shards]:
        return f"{', '.join(unknown)} does not say what data it was trained on, so {path} cannot cover it"
    if strangers := [name for name, shards in trained_on.items() if not set(shards) <= known]:
        return (
            f"{path} does not cover the data that {', '.join(strangers)} was trained on: train it on {data}, or "
            "give the data folder that it was trained on"
        )
    queries = data / "queries" / domain / f"{part}.parquet"
    if certificate["queries"].get(f"{domain}/{part}") != hashes.of(queries):
        return f"{queries} is not the file that {path} covers: run {audit} and look at what it finds"
    # Of the files that it covers, those that a split is read from.
    covered = {
        name: sha256
        for name, sha256 in certificate.get("files", {}).items()
        if name == "dataset.json" or (name.startswith(("items/", "interactions/")) and name.endswith(".parquet"))
    }
    if not covered:
        return f"{path} does not say which events it covers: make it anew with {audit}"
    if changed := differences(covered, {name: hashes.of(data / name) for name in event_files(data)}):
        return (
            f"{shortened(changed)}: the events in {data}, from which baselines learn, are not those that {path} "
            f"covers: run {audit} and look at what it finds"
        )
    return None


def certificate_summary(data: str | Path, *, uncertified: bool) -> CertificateSummary:
    """What the certificate of a data folder found; `uncertified` where it does not cover everything that is shown."""
    path = Path(data, CERTIFICATE)
    properties = json.loads(path.read_text())["properties"] if path.is_file() else []
    return CertificateSummary(
        clean=bool(properties) and all(p["violations"] == 0 for p in properties),
        checked=sum(p["checked"] for p in properties),
        violations=sum(p["violations"] for p in properties),
        uncertified=uncertified,
    )
