"""All baselines and systems by the names they have in tables. Reading this loads none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

from cprec.choices import Choice
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.provenance import code_sha256
from cprec.recommender import Recommender

ALL = "all"


class Settings(Protocol):
    """The settings of a baseline or a system: a frozen dataclass that makes its recommender."""

    SEARCH: ClassVar[Mapping[str, Choice]]
    """What tuning may choose, by the name of the field; empty where there is nothing to tune. A field whose value lies
    outside its range is part of what the recommender is, and stays as it is."""

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> Recommender:
        """A recommender for a domain, which has learnt from the training part of the split only.

        `seed` decides what is random in learning; `folder` is where one that is trained keeps its log and weights.
        Raises Unsuitable where it cannot be made of this data.
        """
        ...


@dataclass(frozen=True)
class Listed:
    """Where to find the settings of one row of the tables."""

    settings: str
    """`module:NAME` within cprec: settings, or a class whose defaults are meant."""
    about: str
    """A few words about it."""
    writes: bool = False
    """It also writes titles freely, by a method `generate` like `Recommender.rank`."""

    @property
    def module(self) -> str:
        """The module of the settings."""
        return "cprec." + self.settings.partition(":")[0]


LINEUP: Mapping[str, Listed] = {
    "random": Listed("baselines.random:Random", "the floor"),
    "popularity": Listed("baselines.popularity:Popularity", "training events of each item"),
    "recent popularity": Listed("baselines.popularity:RecentPopularity", "the same, of the latest events"),
    "freshness": Listed("baselines.item_values:Freshness", "the newest items"),
    "titles": Listed("baselines.text:TitleSimilarity", "titles like the last ones; learns nothing"),
    "transition graph (last item)": Listed(
        "baselines.transition_graph:LAST_ITEM", "what followed the last item in training"
    ),
    "transition graph": Listed("baselines.transition_graph:TransitionGraph", "the last 20 items, decayed"),
    "transition graph (two hops)": Listed("baselines.transition_graph:TWO_HOPS", "and what follows those"),
    "transition graph (titles)": Listed("baselines.transition_graph:WITH_TITLES", "with likeness of titles"),
    "ItemKNN": Listed("baselines.item_knn:ItemKNN", "items that users had as well"),
    "ItemKNN (published)": Listed("baselines.item_knn:PUBLISHED", "Deshpande and Karypis 2004"),
    "EASE": Listed("baselines.ease:EASE", "a linear autoencoder"),
    "EASE (published)": Listed("baselines.ease:PUBLISHED", "Steck 2019"),
    "iALS": Listed("baselines.ials:IALS", "matrix factorisation by least squares"),
    "iALS (published)": Listed("baselines.ials:PUBLISHED", "Rendle et al. 2022, for MovieLens"),
    "LightGCN": Listed("systems.recipes.lightgcn:LightGCN", "vectors smoothed over the graph"),
    "LightGCN (published)": Listed("systems.recipes.lightgcn:PUBLISHED", "He et al. 2020"),
    "NGCF": Listed("systems.recipes.lightgcn:NGCF", "and with matrices and products in each step"),
    "NGCF (published)": Listed("systems.recipes.lightgcn:PUBLISHED_NGCF", "Wang et al. 2019"),
    "AlphaRec": Listed("systems.recipes.alpharec:AlphaRec", "frozen title vectors on the same graph"),
    "AlphaRec (published)": Listed("systems.recipes.alpharec:PUBLISHED", "Sheng et al. 2025"),
    "PinSage": Listed("systems.recipes.pinsage:PinSage", "titles and neighbours on walks; new items, too"),
    "dual embeddings": Listed("systems.recipes.dual_embeddings:DualEmbeddings", "what goes with the last basket"),
    "GRU4Rec": Listed("systems.recipes.gru4rec:GRU4Rec", "a recurrent network"),
    "GRU4Rec (published)": Listed("systems.recipes.gru4rec:PUBLISHED", "Hidasi and Karatzoglou 2018, BPR-max"),
    "Mamba4Rec": Listed("systems.recipes.mamba4rec:Mamba4Rec", "state-space layers"),
    "Mamba4Rec (published)": Listed("systems.recipes.mamba4rec:PUBLISHED", "Liu et al. 2024"),
    "HMamba": Listed("systems.recipes.hmamba:HMamba", "and scores by hyperbolic distance"),
    "HMamba (published)": Listed("systems.recipes.hmamba:PUBLISHED", "Zhang et al. 2025"),
    "SIGMA": Listed("systems.recipes.sigma:SIGMA", "and reads partly backwards, with gates and a GRU"),
    "SIGMA (published)": Listed("systems.recipes.sigma:PUBLISHED", "Liu et al. 2025"),
    "BERT4Rec": Listed("systems.recipes.bert4rec:BERT4Rec", "fills in masked items"),
    "BERT4Rec (published)": Listed("systems.recipes.bert4rec:PUBLISHED", "Sun et al. 2019"),
    "SASRec": Listed("systems.recipes.sasrec:SASRec", "causal self-attention, softmax over all items"),
    "SASRec (sampled softmax)": Listed("systems.recipes.sasrec:SAMPLED", "against many shared negatives"),
    "SASRec (wide)": Listed("systems.recipes.sasrec:WIDE", "with blocks and batches as its relatives have them"),
    "SASRec (published)": Listed("systems.recipes.sasrec:PUBLISHED", "Kang and McAuley 2018, one negative"),
    "SASRec (titles)": Listed("systems.recipes.title_sasrec:TitleSASRec", "over vectors of titles"),
    "SASRec (titles x3)": Listed("systems.recipes.title_sasrec:AVERAGED", "three of these, as an item head"),
    "SynerGen": Listed("systems.recipes.synergen:SynerGen", "and real time in attention, a head that ranks"),
    "ContRec": Listed("systems.recipes.contrec:ContRec", "and a head that denoises the next item's vector"),
    "HLLM": Listed("systems.recipes.hllm:HLLM", "a language model reads titles, trained with the rest"),
    "Lite-LLM4Rec": Listed("systems.recipes.hllm:LITE", "and histories; softmax over rows of all items"),
    "CoVE": Listed("systems.recipes.cove:CoVE", "a language model to which each item is one more token"),
    "Molar": Listed("systems.recipes.molar:Molar", "HLLM over texts and images, aligned late with a SASRec"),
    "LLM2Rec": Listed("systems.recipes.llm2rec:LLM2Rec", "over vectors of a language model that learnt the log"),
    "SASRec (denoised)": Listed(
        "systems.recipes.denoised:DenoisedSASRec", "on histories without events that do not fit"
    ),
    "MMM4Rec": Listed("systems.recipes.mmm4rec:MMM4Rec", "a state-space layer over text, images and gaps"),
    "MMM4Rec (published)": Listed("systems.recipes.mmm4rec:PUBLISHED", "Fan et al. 2025, texts alone"),
    "ICSRec": Listed("systems.recipes.icsrec:ICSRec", "and contrast of like intentions"),
    "ICSRec (published)": Listed("systems.recipes.icsrec:PUBLISHED", "Qin et al. 2024"),
    "SRA-CL": Listed("systems.recipes.sra_cl:SRACL", "and contrast of histories with like titles"),
    "SRA-CL (published)": Listed("systems.recipes.sra_cl:PUBLISHED", "Cui et al. 2025"),
    "MQSA-TED": Listed("systems.recipes.mqsa_ted:MQSATED", "and long queries, transitions distilled into items"),
    "MQSA-TED (published)": Listed("systems.recipes.mqsa_ted:PUBLISHED", "Zhu et al. 2024"),
    "H2Rec": Listed("systems.recipes.h2rec:H2Rec", "and rows that items of like titles share, drawn to their own"),
    "Semantic IDs": Listed("systems.recipes.h2rec:SemanticIDs", "such rows alone, of pieces of codes"),
    "Semantic IDs (codes)": Listed("systems.recipes.h2rec:CODES", "the same, of single codes"),
    "SLMRec": Listed("systems.recipes.slmrec:SLMRec", "learns from a deeper one, in the middle too"),
    "Human priors": Listed("systems.recipes.human_priors:HumanPriors", "and a head for each category of items"),
    "Human priors (titles)": Listed("systems.recipes.human_priors:TITLES", "for each cluster of titles"),
    "Human priors (popularity)": Listed("systems.recipes.human_priors:POPULARITY", "for popular and for rare items"),
    "Human priors (horizon)": Listed("systems.recipes.human_priors:HORIZON", "for the near and the far future"),
    "ReaRec": Listed("systems.recipes.rearec:ReaRec", "and latent steps of reasoning"),
    "ReaRec (published)": Listed("systems.recipes.rearec:PUBLISHED", "Tang et al. 2025, ensemble"),
    "ReaRec (progressive)": Listed("systems.recipes.rearec:PROGRESSIVE", "steps from flat to sharp predictions"),
    "ReaRec (more blocks)": Listed("systems.recipes.rearec:CONTROL", "as many operations, in more blocks"),
    "ManCAR": Listed("systems.recipes.mancar:ManCAR", "steps from a graph's neighbourhood to the target"),
    "ManCAR (published)": Listed("systems.recipes.mancar:PUBLISHED", "Yang et al. 2026, for CDs"),
    "ManCAR (more blocks)": Listed("systems.recipes.mancar:CONTROL", "as many operations, in more blocks"),
    "IGR-SR": Listed("systems.recipes.igrsr:IGRSR", "steps anchored in intents; all settings ours"),
    "IGR-SR (more blocks)": Listed("systems.recipes.igrsr:CONTROL", "as many operations, in more blocks"),
    "Recformer": Listed("systems.recipes.recformer:Recformer", "reads histories as the attributes of their items"),
    "RecGPT": Listed("systems.recipes.recgpt:RecGPT", "predicts a code for each slice of a text at once"),
    "TIGER": Listed("systems.recipes.tiger:TIGER", "writes the codes of the next item one by one"),
    "P5 (sequential)": Listed("systems.recipes.p5:P5", "several tasks; numbers in the order of training events"),
    "P5 (random)": Listed("systems.recipes.p5:RANDOM", "random numbers, the control of the others"),
    "P5 (collaborative)": Listed("systems.recipes.p5:COLLABORATIVE", "numbers by clusters of the training graph"),
    "P5 (semantic)": Listed("systems.recipes.p5:SEMANTIC", "numbers by categories"),
    "P5 (hybrid)": Listed("systems.recipes.p5:HYBRID", "clusters, and a token of each item's own"),
    "APAO": Listed("systems.recipes.apao:APAO", "and sets prefixes against those of other items"),
    "APAO (pointwise)": Listed("systems.recipes.apao:POINTWISE", "and learns prefixes once more"),
    "MSCGRec": Listed("systems.recipes.mscgrec:MSCGRec", "over codes of texts and of users, among what goes on"),
    "PRISM": Listed("systems.recipes.prism:PRISM", "over codes of both, cooler where many go on"),
    "COBRA": Listed("systems.recipes.cobra:COBRA", "writes coarse codes of the next item, then its vector"),
    "COBRA (codes alone)": Listed("systems.recipes.cobra:CODES", "the same without vectors"),
    "COBRA (vectors alone)": Listed("systems.recipes.cobra:VECTORS", "the same with one code for all items"),
    "MDGR": Listed("systems.recipes.mdgr:MDGR", "fills in the codes of the next item, in any order"),
    "REG4Rec": Listed("systems.recipes.reg4rec:REG4Rec", "the surest code first; prunes items whose codes disagree"),
    "STREAM-Rec": Listed("systems.recipes.stream_rec:STREAMRec", "TIGER that first writes a trace to the next item"),
    "Mender": Listed("systems.recipes.mender:Mender", "TIGER that reads a preference in words first"),
    "Text2Tracks": Listed("systems.recipes.text2tracks:Text2Tracks", "writes the item that words ask for"),
    "LLaRA": Listed(
        "systems.recipes.llara:LLaRA", "a language model that reads titles and a SASRec's vectors", writes=True
    ),
    "ULMRec": Listed("systems.recipes.ulmrec:ULMRec", "a language model re-ranks SASRec's lists by letters"),
    "ULMRec (letters)": Listed("systems.recipes.ulmrec:LETTERS", "without codes of users: LlamaRec's ranker"),
}
"""Name -> where its settings are, in the order of tables."""


def names_of(asked: Sequence[str]) -> list[str]:
    """The names asked for, in the order of tables; `all` is all. Raises ConfigError for unknown names."""
    unknown = [name for name in asked if name not in LINEUP and name != ALL]
    if unknown:
        raise ConfigError(f"baselines: there is no {unknown[0]!r}; there are {', '.join(LINEUP)}, or {ALL}")
    return [name for name in LINEUP if name in asked or ALL in asked]


def settings_of(name: str, changed: Mapping[str, Any] | None = None) -> Settings:
    """The settings of a row, some of them changed. Raises ConfigError for fields that it does not have."""
    found = getattr(import_module(LINEUP[name].module), LINEUP[name].settings.partition(":")[2])
    settings: Any = found() if isinstance(found, type) else found
    known = {field.name for field in fields(settings)}
    if unknown := sorted(set(changed or {}) - known):
        raise ConfigError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    result: Settings = replace(settings, **(changed or {}))
    return result


def identity_of(name: str) -> str:
    """A hash of all code that a row runs, which its saved rankings are tied to."""
    return code_sha256(LINEUP[name].module)[:16]


def is_trained(name: str) -> bool:
    """Whether it is trained by gradient steps, so that its seed matters."""
    return LINEUP[name].settings.startswith("systems.")
