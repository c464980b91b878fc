from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.models import tiny_model
from cprec.text.corpus import Corpus
from cprec.text.encoding import PromptEncoder
from cprec.text.prompts import Template
from cprec.text.shards import Shards, open_shards, write_shards
from cprec.text.stream import TokenStream, one_phase
from cprec.text.tokenizer import train_tokenizer
from cprec.train.checkpoint import TrainState
from cprec.train.loop import Cadence, Optimisation, train
from cprec.train.loss import PackedLoss
from cprec.train.schedule import make_schedule

DOMAINS = ("books", "games")
ROW_TOKENS = 96


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: what is to be equal bit for bit must not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    text = "Domain: books\nHistory:\n- Domain: games\n- Next: [books] [games] red blue green book game 0 1 2 3 4 5"
    return train_tokenizer([text] * 20, 330)


@pytest.fixture(scope="session")
def data(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as training reads it: users walk through the catalogue in steps of one or two."""
    folder = tmp_path_factory.mktemp("data")
    titles = {name: [f"{c} {name[:-1]} {n}" for n in range(6) for c in ("red", "blue", "green")] for name in DOMAINS}
    catalogue = Catalogue.from_tables(
        {
            name: pa.table({"item_id": [f"{row:02}" for row in range(18)], "title": mine})
            for name, mine in titles.items()
        }
    )
    catalogue.write(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = PromptEncoder(tokenizer, catalogue)
    about = {
        "vocabulary_size": len(tokenizer),
        "about": {"template": asdict(Template()), "max_title_tokens": 32, "history": "specific", "max_history": 10},
    }
    random = np.random.default_rng(0)

    def write(
        where: Path, kinds: tuple[str, ...], domains: tuple[str, ...], num_users: int, first_user: int = 0
    ) -> None:
        parts, columns = [], []
        for kind in kinds:
            domain = random.integers(0, 2, num_users) if len(domains) == 2 else np.full(num_users, 0)
            steps = random.integers(1, 3, (num_users, 6)).cumsum(1) % 18
            shift = np.where(kind == "mixed", random.integers(0, 2, (num_users, 6)), domain[:, None]) * 18
            events = Ragged((steps + shift).ravel(), np.arange(0, 6 * num_users + 1, 6))
            tokens, target_start = encoder.documents(kind, domain, events)
            parts.append(tokens)
            names = np.array(DOMAINS, dtype=object)[domain] if kind == "specific" else [""] * num_users
            columns.append(
                {
                    "domain": np.array(names, dtype=object),
                    "kind": np.full(num_users, kind, dtype=object),
                    "num_events": np.full(num_users, 6),
                    "target_start": target_start,
                    "platform": np.full(num_users, "shop", dtype=object),
                    "user_id": np.array([f"u{first_user + n}" for n in range(num_users)], dtype=object),
                }
            )
        merged = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
        write_shards(where, Ragged.concatenate(parts), merged, about)

    write(folder / "shards" / "train", ("specific", "mixed"), DOMAINS, 60)
    write(folder / "shards" / "heldout", ("specific", "mixed"), DOMAINS, 6)
    # Users 60 to 69 are in the examples and not in the shards.
    write(folder / "examples" / "books" / "train", ("specific",), DOMAINS[:1], 40, first_user=30)
    write(folder / "examples" / "books" / "validation", ("specific",), DOMAINS[:1], 5)
    return folder


@pytest.fixture(scope="session")
def shards(data: Path) -> Shards:
    return open_shards(data / "shards" / "train")


@pytest.fixture(scope="session")
def make_stream(shards: Shards) -> Callable[..., TokenStream]:
    def make(**changes: Any) -> TokenStream:
        settings: dict[str, Any] = {"rows_per_step": 4, "row_tokens": ROW_TOKENS, "seed": 0}
        corpus = Corpus.of(shards, targets_only=changes.pop("targets_only", False))
        plan = one_phase(changes.pop("num_tokens", shards.manifest["num_tokens"]))
        return TokenStream(corpus, plan, **settings | changes)

    return make


@pytest.fixture(scope="session")
def make_model(tokenizer: Any) -> Callable[..., Any]:
    def make(seed: int = 0) -> Any:
        return tiny_model(len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, seed=seed)

    return make


@pytest.fixture(scope="session")
def run(
    make_stream: Callable[..., TokenStream], make_model: Callable[..., Any]
) -> Callable[..., tuple[TrainState, Any]]:
    """Trains a tiny model and returns the final state and the model; anything may be changed by keyword."""

    def run(output_dir: Path, **changes: Any) -> tuple[TrainState, Any]:
        model = changes.pop("model", None) or make_model()
        trainable = changes.pop("trainable", None) or PackedLoss(model, bf16=changes.pop("bf16", False))
        stream = changes.pop("stream", None) or make_stream()

        num_steps = stream.num_steps
        schedule = make_schedule(
            "wsa",
            range(1, num_steps + 1),
            1e-2,
            warmup_steps=max(1, round(0.1 * num_steps)),
            anneal_steps=round(0.3 * num_steps),
            floor_ratio=0.1,
            shape="1-sqrt",
        )

        def record(kind: Any, **settings: Any) -> Any:
            named = {field.name for field in fields(kind)} & changes.keys()
            return kind(**settings | {name: changes.pop(name) for name in named})

        settings: dict[str, Any] = {
            "schedule": schedule,
            "output_dir": output_dir,
            "optimisation": record(Optimisation, weight_decay=0.1, max_grad_norm=1.0),
            "cadence": record(Cadence, save_steps=5, save_total_limit=100, logging_steps=1, eval_steps=1000),
            "validate": dict,
            "description": "test",
        }
        return train(trainable, stream, **settings | changes), model

    return run


class Processes:
    """Processes of one training, as torchrun would start them; what is left of them is killed at the end."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def start(self, num: int, script: str, *arguments: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        source = str(Path(__file__).parents[3] / "src")
        shared = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        mine = [
            subprocess.Popen(
                [sys.executable, "-c", script, *arguments],
                env={**os.environ, **shared, "RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(num)},
                text=True,
                **pipes,
            )
            for n in range(num)
        ]
        self._started += mine
        return mine

    def run(self, num: int, script: str, *arguments: str) -> list[str]:
        """What each process printed; all must end well."""
        mine = self.start(num, script, *arguments)
        printed = [process.communicate(timeout=600) for process in mine]
        for process, (_, errors) in zip(mine, printed, strict=True):
            assert process.returncode == 0, errors
        return [output for output, _ in printed]

    def kill(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


@pytest.fixture
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.kill()
