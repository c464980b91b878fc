"""All baselines by the names they have in tables. Reading this loads none of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec.errors import ConfigError

if TYPE_CHECKING:
    from cprec.choices import Settings
    from cprec.data.splits import Split

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Where a baseline's settings are, and what it needs."""

    settings: str
    """`module:NAME` within cprec.baselines: settings, or a class whose defaults are meant."""
    about: str
    """What it is, in a few words."""
    trained: bool = False
    """It is trained by gradient steps, so that its seed matters."""
    needs_times: bool = False
    """It tells old events from new ones."""

    def unfit(self, split: Split, domain: str) -> str:
        """Why it cannot be made of a domain's data; '' if it can."""
        if self.needs_times and not split.domains[domain].has_times:
            return "the domain's times are only an order"
        return ""


BASELINES: Mapping[str, Baseline] = {
    "random": Baseline(settings="random:Random", about="the floor"),
    "popularity": Baseline(settings="popularity:Popularity", about="training events of each item"),
    "recent popularity": Baseline(
        settings="popularity:RecentPopularity", about="the same, of the latest events", needs_times=True
    ),
    "titles": Baseline(settings="text:TitleSimilarity", about="titles like the last ones; learns nothing"),
    "transition graph (last item)": Baseline(
        settings="transition_graph:LAST_ITEM", about="what followed the last item in training"
    ),
    "transition graph": Baseline(settings="transition_graph:TransitionGraph", about="the last 20 items, decayed"),
    "transition graph (two hops)": Baseline(settings="transition_graph:TWO_HOPS", about="and what follows those"),
    "transition graph (titles)": Baseline(settings="transition_graph:WITH_TITLES", about="with likeness of titles"),
    "ItemKNN": Baseline(settings="item_knn:ItemKNN", about="items that users had as well"),
    "ItemKNN (published)": Baseline(settings="item_knn:PUBLISHED", about="Deshpande and Karypis 2004"),
    "EASE": Baseline(settings="ease:EASE", about="a linear autoencoder"),
    "EASE (published)": Baseline(settings="ease:PUBLISHED", about="Steck 2019"),
    "iALS": Baseline(settings="ials:IALS", about="matrix factorisation by least squares"),
    "iALS (published)": Baseline(settings="ials:PUBLISHED", about="Rendle et al. 2022, for MovieLens"),
    "LightGCN": Baseline(settings="lightgcn:LightGCN", about="vectors smoothed over the graph", trained=True),
    "LightGCN (published)": Baseline(settings="lightgcn:PUBLISHED", about="He et al. 2020", trained=True),
    "GRU4Rec": Baseline(settings="gru4rec:GRU4Rec", about="a recurrent network", trained=True),
    "GRU4Rec (published)": Baseline(
        settings="gru4rec:PUBLISHED", about="Hidasi and Karatzoglou 2018, BPR-max", trained=True
    ),
    "BERT4Rec": Baseline(settings="bert4rec:BERT4Rec", about="fills in masked items", trained=True),
    "BERT4Rec (published)": Baseline(settings="bert4rec:PUBLISHED", about="Sun et al. 2019", trained=True),
    "SASRec": Baseline(settings="sasrec:SASRec", about="causal self-attention, softmax over all items", trained=True),
    "SASRec (sampled softmax)": Baseline(
        settings="sasrec:SAMPLED", about="against many shared negatives", trained=True
    ),
    "SASRec (published)": Baseline(
        settings="sasrec:PUBLISHED", about="Kang and McAuley 2018, one negative", trained=True
    ),
}
"""Name -> where it is; tables have them in this order."""


def names_of(asked: Sequence[str]) -> list[str]:
    """The baselines asked for, in the order of tables; `all` is all. Raises ConfigError for names that are none."""
    unknown = [name for name in asked if name not in BASELINES and name != ALL]
    if unknown:
        raise ConfigError(f"baselines: there is no {unknown[0]!r}; there are {', '.join(BASELINES)}, or {ALL}")
    return [name for name in BASELINES if name in asked or ALL in asked]


def settings_of(name: str, changed: Mapping[str, Any] | None = None) -> Settings:
    """The settings of a baseline, some of them changed. Raises ConfigError for fields that it does not have."""
    module, _, attribute = BASELINES[name].settings.partition(":")
    found = getattr(import_module(f"cprec.baselines.{module}"), attribute)
    settings: Any = found() if isinstance(found, type) else found
    known = {field.name for field in fields(settings)}
    if unknown := sorted(set(changed or {}) - known):
        raise ConfigError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    result: Settings = replace(settings, **(changed or {}))
    return result


def identity_of(name: str) -> str:
    """Changes when a baseline's code does: a hash of its module and of those it is made on."""
    baseline = BASELINES[name]
    modules = ["ranking", "domain", "text", "../data/titles", baseline.settings.partition(":")[0]]
    if baseline.trained:
        modules += ["sequential", "objectives", "sasrec"]  # whose blocks BERT4Rec has
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{module}.py").read_bytes() for module in modules)).hexdigest()[:16]


def is_trained(name: str) -> bool:
    """Whether a baseline is trained by gradient steps."""
    return BASELINES[name].trained
