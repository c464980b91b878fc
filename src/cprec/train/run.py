"""A training run as a stage asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cprec.models import TINY
from cprec.provenance import CONFIG_FILE, FileHashes, read_resolved
from cprec.search.trie import Trie
from cprec.text.stream import TokenStream
from cprec.train.config import TrainingConfig
from cprec.train.distillation import Distillation
from cprec.train.plan import Plan
from cprec.train.preference import Preference
from cprec.train.probe import queries_of
from cprec.train.reuse import file_inputs, shards_of


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as a stage asks for it."""

    config: TrainingConfig
    make_plan: Callable[[], Plan]
    """Called only where the run is not finished already."""
    trained_on: list[str]
    """Hashes of the shards that the plan reads."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the other shards that the run reads, by name."""
    validation: Mapping[str, TokenStream]
    """Held-out batches by name (a domain and kind)."""
    stage: str
    about: Mapping[str, Any]
    """How the shards were made; it goes into `cprec.json`."""
    start_from: Path | None = None
    """A checkpoint whose weights and optimizer the run begins with."""
    fork_of: Path | None = None
    """The stable checkpoint of another run, with the same plan up to there, that this one goes on from."""
    keeps_stable: bool = False
    """The checkpoint at the end of the stable phase stays, for forks."""
    probe_domains: tuple[str, ...] = ()
    """Domains whose validation queries are ranked."""
    titles_trie: Trie | None = None
    """The titles of the domain's items, where their loss over the catalogue is trained."""
    weight_of_catalogue: float = 0.0
    """The part of that loss."""
    distillation: Distillation | None = None
    """Where the model that the configuration names is a teacher: how another is made of it, and learns."""
    preference: Preference | None = None
    """Where the plan reads a `PreferenceStream`: what the model is to prefer."""

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def data(self) -> Path:
        return Path(self.config.data)

    @property
    def has_items(self) -> bool:
        """Whether there is anything to recommend: not where the data are text."""
        return (self.data / "items").is_dir()

    @property
    def has_teacher(self) -> bool:
        """Whether the model learns from the one that it is made of."""
        return self.distillation is not None and self.distillation.has_teacher

    def loading(self, load: Callable[[str], Any]) -> Callable[[str], Any]:
        """What loads the model to train, given what loads the one that the configuration names."""
        return load if self.distillation is None else self.distillation.student_from(load)

    @property
    def all_trained_on(self) -> list[str]:
        """Hashes of the shards that the finished model will have been trained on, since its base."""
        return [*shards_of(self.start_from or Path(self.config.model_name_or_path)), *self.trained_on]

    def recorded_inputs(self, hashes: FileHashes) -> dict[str, str]:
        """Hashes of all that the run reads."""
        files = file_inputs(
            self.config,
            hashes,
            start_from=self.start_from,
            fork_of=self.fork_of,
            general_text=general_text_of(self.config),
        )
        ranked = {f"queries/{domain}": hashes.of(queries_of(self.data, domain)) for domain in self.probe_domains}
        return {"trained_on": " ".join(self.all_trained_on), **self.inputs, **files, **ranked}


def general_text_of(config: TrainingConfig) -> str | None:
    """The text of the forgetting meter: a file, '' for our own, or None where the model was made here and has read no
    general text to forget."""
    if config.general_text != "auto":
        return None if config.general_text == "none" else config.general_text
    made_here = Path(config.data, CONFIG_FILE).is_file() and read_resolved(config.data)["config"]["tokenizer"] == TINY
    return None if made_here or config.model_name_or_path == TINY else ""
