"""`cprec audit --shortcuts` on a data folder that `cprec prepare` wrote."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from cprec.data.build import build_dataset
from cprec.data.config import Rules, SplitSpec, TableSource
from cprec.data.dataset import finish_part
from cprec.data.splits import make_split
from cprec.errors import ConfigError
from cprec.shortcuts import PAGE, RECORD, audit_shortcuts
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare

NUM_ITEMS, NUM_USERS = 12, 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data has `ring`, where item n + 1 always follows item n, and `single`, with one event a user."""
    folder = tmp_path_factory.mktemp("run")
    items = "".join(f"{n},number {n}\n" for n in range(NUM_ITEMS))
    ring = [(user, (user + step) % NUM_ITEMS, step) for user in range(NUM_USERS) for step in range(6)]
    single = [(user, user % NUM_ITEMS, 1) for user in range(NUM_USERS)]
    for name, rows in (("ring", ring), ("single", single)):
        (folder / f"{name}_items.csv").write_text("item_id,title\n" + items)
        lines = "".join(f"u{user},{item},{time}\n" for user, item, time in rows)
        (folder / f"{name}.csv").write_text("user_id,item_id,timestamp\n" + lines)
    tables = [
        TableSource(
            domain=name,
            interactions=str(folder / f"{name}.csv"),
            items=str(folder / f"{name}_items.csv"),
            timestamps="order",
        )
        for name in ("ring", "single")
    ]
    data = build_dataset(tables, folder / "data", Rules(k_core=0))
    finish_part(data, 0, lambda *log: make_split(*log, SplitSpec()))
    manifest = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(manifest | {"split": asdict(SplitSpec())}))
    return folder


def test_every_domain_with_test_events_is_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (audit,) = audit_shortcuts(run)
    assert audit.domain == "ring" and audit.num_queries == NUM_USERS
    assert audit.reach["one step"].targets == 1 and audit.reach["one step"].catalogue == pytest.approx(1 / NUM_ITEMS)
    assert audit.out_degree.quartiles == (1, 1, 1) and audit.out_degree.effective == pytest.approx(1)
    (model,) = audit.dependence
    assert model.model == "transition graph" and model.ndcg.mean == pytest.approx(1)
    last, backwards = model.shares["last 1"], model.shares["reversed"]
    assert last is not None and last.mean == pytest.approx(1)
    assert backwards is not None and backwards.mean < 1
    record = json.loads((run / "data" / RECORD).read_text())
    assert record["domains"].keys() == {"ring"} and record["protocol"]["ties in time"] == "source order"
    assert f"shortcuts in {run.name}" in (run / "data" / PAGE).read_text()
    out, err = capsys.readouterr()
    assert "ring" in out and f"wrote {run / 'data' / PAGE}" in err


def test_baselines_are_asked_beside_the_graph_where_they_can_be_made(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (audit,) = audit_shortcuts(run / "data", ["ring"], ["transition graph", "popularity", "recent popularity"])
    assert [each.model for each in audit.dependence] == ["transition graph", "popularity"]
    kept = audit.dependence[1].shares
    assert all(share is not None and share.mean == 1 for share in kept.values())  # the history changes nothing
    assert re.search("ring: without recent popularity: .* only order the events", capsys.readouterr().err)


def test_what_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a data folder: give one that `cprec prepare` wrote"):
        audit_shortcuts(tmp_path)
    with pytest.raises(ConfigError, match="domain 'rings' is not in .*: it has ring, single"):
        audit_shortcuts(run / "data", domains=["rings"])
    with pytest.raises(ConfigError, match="domain 'single' has no test event with a history before it"):
        audit_shortcuts(run / "data", domains=["single"])
    with pytest.raises(
        ConfigError, match="is neither a folder with a finished model of CPRec nor a baseline; these are random"
    ):
        audit_shortcuts(run / "data", models=[str(tmp_path)])


@pytest.mark.slow
def test_published_figures(real_data: Path, tmp_path: Path) -> None:
    """Figures of docs/shortcuts.md, from data without any rule applied."""
    times = {"amazon18_scientific": "order", "amazon18_giftcards": "seconds"}
    config = PrepareConfig(
        output_dir=str(tmp_path / "data"),
        tables=tuple(
            TableSource(
                domain=domain,
                platform="amazon",
                interactions=str(real_data / domain / "interactions.parquet"),
                items=str(real_data / domain / "items.parquet"),
                columns={"order": "position"},
                timestamps=timestamps,  # type: ignore[arg-type]
            )
            for domain, timestamps in times.items()
        ),
        target_domains=tuple(times),
        k_core=0,
        deduplicate=False,
        drop_consecutive_repeats=False,
        min_events=3,
        min_history=1,
        workers=1,
    )
    prepare(config)
    cards, scientific = audit_shortcuts(tmp_path / "data")
    assert (cards.num_queries, scientific.num_queries) == (458, 8442)
    assert cards.targets.tied == pytest.approx(0.635, abs=5e-4) and scientific.targets.tied is None
    assert cards.reach["one step"].targets == pytest.approx(0.312, abs=5e-4)
    reach = scientific.reach
    assert reach["one step"].targets == pytest.approx(0.088, abs=5e-4)
    assert reach["one step backward"].targets == pytest.approx(0.088, abs=5e-4)
    assert reach["two steps"].targets == pytest.approx(0.248, abs=5e-4)
    assert scientific.dependence[0].ndcg.mean == pytest.approx(0.0818, abs=5e-5)
