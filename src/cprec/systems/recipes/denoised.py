"""SASRec on training sequences without the events that do not fit: the operator of LLM4DSR (Wang et al. 2025) before a
recipe trains. Events are scored by the transitions of the training part; see `denoise` for what deviates."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.systems.denoise import GraphScorer, denoised
from cprec.systems.fit import fit_best
from cprec.systems.recipes.sasrec import SASRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import TrainedRecommender


@dataclass(frozen=True, kw_only=True)
class DenoisedSASRec(SASRec):
    """Settings of SASRec, trained once on all events and once for each threshold; the one with the best NDCG@10 on
    validation queries is kept. No value was tuned on any data."""

    thresholds: tuple[float, ...] = (-2.0, -1.0, -0.5)
    """How well an event must fit to be trained on; 0: as well as anywhere else."""
    most_noise: float = 0.2
    """Share of a sequence's events that goes at most, rounded up."""
    replaces: bool = False
    """The most probable other item takes the place of what does not fit; without, the event is left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.thresholds:
            raise ConfigError("thresholds=() tries nothing: give one at least, or take SASRec")
        if self.num_networks > 1:
            raise ConfigError(f"num_networks={self.num_networks}: it is one network, the best of several")
        if not 0 < self.most_noise <= 1:
            raise ConfigError(
                f"most_noise={self.most_noise} must lie above 0 and at most at 1: it is a share of events"
            )

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> TrainedRecommender:
        """See `SystemSettings.make`. Raises Unsuitable where validation events, which choose, are learnt."""
        data = TrainingSequences.of(split, domain)
        scorer = GraphScorer(data.sequences, data.num_items)
        choices = {"all events": data} | {
            f"those of threshold {threshold:g}": denoised(
                data, scorer, threshold, most=self.most_noise, replaces=self.replaces
            )
            for threshold in self.thresholds
        }
        plain = SASRec(**{field.name: getattr(self, field.name) for field in fields(SASRec)})
        with TemporaryDirectory() if folder is None else nullcontext(folder) as place:
            return fit_best(plain, split, domain, seed, Path(place), choices)
