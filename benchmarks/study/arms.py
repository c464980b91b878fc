"""The arms of the study: how each model came to be, and the questions that it serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ZERO, ALL = "zero-shot", "all"
"""Regimes of fine-tuning beside the few-shot ones: none, and every training event of the domain."""

Way = Literal["random", "run", "longer", "branch", "rivals"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make a model, evaluated after one or more regimes of fine-tuning."""

    name: str
    """As tables have it."""
    what: str
    """What it is, or what it changes, in a few words."""
    questions: tuple[int, ...]
    """Numbers of the questions that it serves (`questions.py`)."""
    way: Way = "run"
    """random: no pre-training. run: a pre-training of its own. longer: it goes on from the stable phase of the
    `REFERENCE`, to all tokens. branch: another annealing from there. rivals: recommenders without a language model."""
    share: float = 0.3
    """Of the world's tokens, how many pre-training reads in all."""
    recipe_arm: str = ""
    """The arm of `cprec.recipes.arms` that it is."""
    domains: int = 0
    """Pre-training reads this many domains of the pool, and no mixed sequences; 0: all."""
    models_of: str = ""
    """The arm whose models it takes; empty: it has models of its own."""
    beam: bool = False
    """Lists come from a beam search."""
    blend: bool = False
    """Models are also blended with recommenders that need no training; their rows are called `NAME blend`."""
    regimes: tuple[str, ...] = (ZERO, ALL)
    """Fine-tuning: zero-shot, a number of examples, or all."""
    everywhere: bool = False
    """In all target domains, those of the pool that are left out in turn too; otherwise in the main ones alone."""
    first: bool = True
    """Whether it belongs to the questions that get all their seeds before the others get one."""
    baselines: tuple[str, ...] = ()
    """Of rivals: their names in `cprec.lineup`."""


RANDOM, CPREC, REFERENCE = "no pre-training", "CPRec-style", "30 % of the tokens"
WALK, SASREC = "transition graph (titles)", "SASRec"
FEW = ("64", "256", "1024")

ARMS = (
    Arm(
        name="rivals",
        what="recommenders that need no training, and EASE",
        questions=(5,),
        way="rivals",
        regimes=("",),
        everywhere=True,
        baselines=("random", "popularity", "titles", "transition graph", WALK, "EASE"),
    ),
    Arm(
        name=RANDOM,
        what="random weights; with fine-tuning: fine-tuning only",
        questions=(1,),
        way="random",
        share=0,
        regimes=(ZERO, ALL, *FEW),
        everywhere=True,
    ),
    Arm(name=REFERENCE, what="a shorter pre-training, which the arms below change", questions=(2, 3, 4, 9)),
    Arm(
        name=CPREC,
        what="pre-trained on all domains of the pool, specific and mixed",
        questions=(1, 4, 5, 6),
        way="longer",
        share=1,
        regimes=(ZERO, ALL, *FEW),
        everywhere=True,
    ),
    Arm(name="no mixed", what="domain-specific sequences only", questions=(2, 9), recipe_arm="no_mixed"),
    Arm(
        name="no annealing",
        what="the learning rate stays at its peak to the end",
        questions=(3,),
        way="branch",
    ),
    Arm(name="shuffled", what="events of a document in any order", questions=(2,), recipe_arm="shuffled"),
    Arm(
        name=SASREC,
        what="a trained sequential recommender",
        questions=(5,),
        way="rivals",
        regimes=("",),
        baselines=(SASREC,),
    ),
    Arm(name="no specific", what="mixed sequences only", questions=(2,), recipe_arm="no_specific", first=False),
    Arm(
        name="interleaved",
        what="mixed sequences interleaved, not by time",
        questions=(2,),
        recipe_arm="interleaved",
        first=False,
    ),
    Arm(
        name="mixed late",
        what="a fifth of mixed sequences before annealing, four fifths in it",
        questions=(2,),
        recipe_arm="mixed_late",
        first=False,
    ),
    Arm(name="cosine", what="a cosine in place of the stable phase", questions=(3,), recipe_arm="cosine", first=False),
    Arm(name="10 % of the tokens", what="a tenth of the tokens", questions=(4,), share=0.1, first=False),
    Arm(
        name="beam of 20",
        what="beam search in place of exact lists",
        questions=(6,),
        models_of=CPREC,
        beam=True,
        way="longer",
        share=1,
        first=False,
    ),
    Arm(
        name=f"blend of {CPREC}",
        what="blended with recommenders that need no training",
        questions=(1,),
        models_of=CPREC,
        blend=True,
        way="longer",
        share=1,
        regimes=(ALL,),
        first=False,
    ),
    Arm(
        name=f"blend of {RANDOM}",
        what="the same without pre-training",
        questions=(1,),
        models_of=RANDOM,
        blend=True,
        way="random",
        share=0,
        regimes=(ALL,),
        first=False,
    ),
    Arm(
        name="items only",
        what="loss on titles, without the template",
        questions=(9,),
        recipe_arm="items_only",
        first=False,
    ),
    Arm(name="1 domain", what="one domain, no mixed sequences", questions=(9,), domains=1, first=False),
    Arm(name="3 domains", what="three domains, no mixed sequences", questions=(9,), domains=3, first=False),
    Arm(name="5 domains", what="five domains, no mixed sequences", questions=(9,), domains=5, first=False),
)
"""In the order in which they are run."""
