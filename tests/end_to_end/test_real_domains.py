"""Ten real domains in one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cprec import cli
from cprec.data.dataset import read_manifest
from cprec.text.config import Mixture
from cprec.train.config import PretrainConfig
from cprec.train.pretrain import behaviour_and_more, pretrain_plan

DOMAINS = {
    # folder: platform, timestamps
    "amazon14_beauty": ("amazon", "seconds"),
    "amazon14_sports": ("amazon", "seconds"),
    "amazon14_toys": ("amazon", "seconds"),
    "amazon18_games": ("amazon", "order"),
    "amazon18_scientific": ("amazon", "order"),
    "amazon18_giftcards": ("amazon", "seconds"),
    "movielens_100k": ("movielens", "seconds"),
    "lastfm_hetrec": ("lastfm", "order"),
    "online_retail_uk": ("retail", "seconds"),
    "steam_llara": ("steam", "order"),
}


@pytest.mark.slow
def test_ten_domains_are_prepared_and_certified(real_data: Path, tmp_path: Path) -> None:
    published = json.loads((real_data / "domains.json").read_text())["domains"]
    config = {
        "output_dir": str(tmp_path / "data"),
        "tables": [
            {
                "domain": domain,
                "platform": platform,
                "interactions": str(real_data / domain / "interactions.parquet"),
                "items": str(real_data / domain / "items.parquet"),
                "columns": {"order": "position"},
                "timestamps": timestamps,
            }
            for domain, (platform, timestamps) in DOMAINS.items()
        ],
        "target_domains": ["amazon14_beauty", "amazon18_scientific", "movielens_100k"],
        "pretrain_domains": [domain for domain in DOMAINS if domain != "amazon18_scientific"],
        "k_core": 0,
        "deduplicate": False,
        "drop_consecutive_repeats": False,
        "min_events": 3,
        "min_history": 1,
        "mixed_order": "interleave",
    }
    (tmp_path / "ten.yaml").write_text(yaml.safe_dump({"prepare": config}))
    assert cli.main(["prepare", str(tmp_path / "ten.yaml")]) == 0
    certificate = json.loads((tmp_path / "data" / "certificate.json").read_text())
    assert certificate["clean"]
    manifest = read_manifest(tmp_path / "data")
    for domain in DOMAINS:
        found = manifest["domains"][domain]
        lost = sum(step.get("removed", 0) for step in found["counts"])
        assert found["counts"][0]["events"] == found["num_events"] + lost
        assert found["counts"][0]["events"] == published[domain]["interactions"]

    plan = PretrainConfig(
        data=config["output_dir"],
        output_dir=str(tmp_path / "run"),
        num_train_epochs=2.0,
        max_length=2048,
        mixture=Mixture(mixed_share=0.4, domain_temperature=0.5),
        anneal_mixture=Mixture(mixed_share=0.8),
    )
    stream = pretrain_plan(plan, behaviour_and_more(plan)).stream
    assert stream.mixture_until(stream.num_steps) == pytest.approx(stream.mixture_asked(), abs=0.01)
    assert stream.fill > 0.98
