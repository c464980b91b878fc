"""The questions of the study: which arms answer each, and what would have to hold where nothing is shown."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.study.arms import CPREC, RANDOM, REFERENCE, SASREC, WALK
from cprec.entrants import WITHOUT_MODEL
from cprec.evaluate.results import BLENDED


@dataclass(frozen=True)
class Claim:
    """That one arm is better than another."""

    thing: str
    """What the first has and the second has not."""
    a: str
    b: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of the study."""

    number: int
    title: str
    claims: tuple[Claim, ...] = ()
    sliced: bool = False
    """Whether the difference is also told by groups of queries."""
    losses: bool = False
    """Whether the held-out loss of pre-trainings is told."""
    needed: str
    """What would have to be true for claims that are not shown to hold; where there are none, what is missing."""


QUESTIONS = (
    Question(
        number=1,
        title="Does pre-training on all domains help on unseen ones?",
        claims=(
            Claim("pre-training", CPREC, RANDOM),
            Claim("pre-training (models blended)", CPREC + BLENDED, RANDOM + BLENDED),
            Claim("the pre-trained model in a blend", CPREC + BLENDED, WITHOUT_MODEL),
        ),
        needed="the unseen domain would have to share words and habits with the pool that its own events do not teach "
        "sooner: a base model that knows language, many more tokens, or fewer events of the domain itself",
    ),
    Question(
        number=2,
        title="Do mixed sequences add anything, and is it the time order?",
        claims=(
            Claim("reading mixed sequences", REFERENCE, "no mixed"),
            Claim("time order within documents", REFERENCE, "shuffled"),
            Claim("time order between domains", REFERENCE, "interleaved"),
            Claim("reading domain-specific sequences", REFERENCE, "no specific"),
            Claim("mixing evenly rather than late", REFERENCE, "mixed late"),
        ),
        needed="many users would have to be active in several domains at known times: here mixed sequences are of few "
        "domains of one platform, whose times are days",
    ),
    Question(
        number=3,
        title="Does annealing help, before and after fine-tuning?",
        claims=(
            Claim("annealing", REFERENCE, "no annealing"),
            Claim("a stable phase with annealing rather than a cosine", REFERENCE, "cosine"),
        ),
        needed="fine-tuning, which anneals itself, would have to be too short to do what annealing did before it",
    ),
    Question(
        number=4,
        title="What do more tokens give?",
        claims=(
            Claim("reading all tokens rather than 30 %", CPREC, REFERENCE),
            Claim("reading 30 % of the tokens rather than 10 %", REFERENCE, "10 % of the tokens"),
        ),
        losses=True,
        needed="what is read would have to hold more than the model has learnt of it already: a larger pool, or a "
        "larger model",
    ),
    Question(
        number=5,
        title="Where does the language model beat the walk and SASRec, and where not?",
        claims=(
            Claim("CPRec-style in place of the walk", CPREC, WALK),
            Claim("CPRec-style in place of SASRec", CPREC, SASREC),
        ),
        sliced=True,
        needed="words would have to say what events do not: new items, short histories, a base model that has read "
        "about the things that are sold",
    ),
    Question(
        number=6,
        title="What do exact lists change against beams?",
        claims=(Claim("exact search rather than a beam of 20", CPREC, "beam of 20"),),
        needed="the best titles would have to begin with tokens that are not among the likeliest",
    ),
    Question(
        number=7,
        title="What did pre-training forget, and does replay pay?",
        needed="It needs a base model that knows something which can be forgotten (SmolLM2): the tiny one starts from "
        "random weights",
    ),
    Question(
        number=8,
        title="Does knowing English matter?",
        needed="It needs a base model that knows English (SmolLM2) beside the same shape from random weights",
    ),
    Question(
        number=9,
        title="What else was varied",
        claims=(
            Claim("a loss on the template as well", REFERENCE, "items only"),
            Claim("reading seven domains rather than five", "no mixed", "5 domains"),
            Claim("reading seven domains rather than three", "no mixed", "3 domains"),
            Claim("reading seven domains rather than one", "no mixed", "1 domain"),
        ),
        needed="the model would have to be large enough to hold several domains beside each other",
    ),
)
