"""Lists read by vLLM are those read by the model in this process.

vLLM needs a GPU or a build of its own, so a stand-in takes its place: it has the classes that CPRec uses, and calls a
logits processor as both model runners of vLLM 0.32 do. Where vLLM itself is installed, it is asked as well.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cprec.data.catalogue import Catalogue
from cprec.errors import ConfigError, ModelError
from cprec.models import tiny_model
from cprec.rank.llm import LLMRecommender
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item
from cprec.text.tokenizer import train_tokenizer

TITLES = tuple(f"{a} {b} {c}" for a, b, c in itertools.product(("red", "blue", "tiny"), ("cup", "lamp"), "xyz")) + (
    "red",  # the beginning of others
    "blue cup x",  # two items with one title
)


# ---- the stand-in ----------------------------------------------------------------------------------------------------


@dataclass
class SamplingParams:
    """Those that CPRec gives; others are refused, as vLLM does."""

    max_tokens: int
    temperature: float
    detokenize: bool
    logprobs: int | None = None
    extra_args: dict[str, Any] | None = None


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


class LogitsProcessor:
    """Of the first runner."""


class LogitsProcessorV2:
    """Of the second."""


@dataclass
class LLM:
    """Reads with a model of transformers, whose folder is `model`; requests come and go as a scheduler lets them."""

    model: str
    logits_processors: list[str]
    logprobs_mode: str
    max_logprobs: int
    enable_prefix_caching: bool
    max_model_len: int
    dtype: str
    second_runner: bool = False
    num_requests: int = 0
    processor: Any = field(init=False)

    def __post_init__(self) -> None:
        from cprec.models import load_model

        assert self.logprobs_mode == "processed_logits" and self.max_logprobs == -1 and self.dtype == "float32"
        self._model = load_model(Path(self.model)).eval()
        fits = self._model.config.max_position_embeddings if self.max_model_len == -1 else self.max_model_len
        self.model_config = SimpleNamespace(max_model_len=fits)
        module, _, name = self.logits_processors[0].partition(":")
        kind = getattr(import_module(module), name)
        assert issubclass(kind, LogitsProcessorV2 if self.second_runner else LogitsProcessor)
        self.processor = kind(None, None) if self.second_runner else kind(None, torch.device("cpu"), False)
        self._batch: list[int] = []

    def generate(self, prompts: list[dict[str, list[int]]], params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        assert len(prompts) == len(params) and not use_tqdm
        for each in params:
            type(self.processor).validate_params(each)
        self.num_requests += len(prompts)
        scheduled = np.random.default_rng(0).permutation(len(prompts)).tolist()
        done: dict[int, Any] = {}
        for start in range(0, len(scheduled), 5):
            requests = scheduled[start : start + 5]
            logits = torch.stack([self._logits(prompts[request]["prompt_token_ids"]) for request in requests])
            processed = (self._by_slots if self.second_runner else self._by_rows)(
                logits, [params[request] for request in requests]
            )
            for request, row in zip(requests, processed, strict=True):
                done[request] = self._output(row, params[request])
        return [done[request] for request in range(len(prompts))]

    @torch.inference_mode()
    def _logits(self, tokens: list[int]) -> torch.Tensor:
        assert len(tokens) < self.model_config.max_model_len
        return self._model(input_ids=torch.tensor([tokens])).logits[0, -1].float()

    def _by_rows(self, logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
        """Requests join at rows one place off, and are moved to theirs."""
        size = len(params)
        joined = [(row + 1) % size for row in range(size)]
        swaps = [(row, row + 1, MoveDirectionality.SWAP) for row in range(size - 1)]  # rotates them back by one
        update = SimpleNamespace(
            batch_size=size,
            removed=list(range(size, len(self._batch))),
            added=[(at, each, None, []) for at, each in zip(joined, params, strict=True)],
            moved=swaps,
        )
        self._batch = list(range(size))
        assert self.processor.is_argmax_invariant() is False
        self.processor.update_state(update)
        self.processor.update_state(None)
        return self.processor.apply(logits)

    def _by_slots(self, logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
        """Slots that others had before, and rows in another order than slots."""
        slots = [7 - number for number in range(len(params))]
        for slot, each in zip(slots, params, strict=True):
            self.processor.add_request(slot, each)
        return self.processor.apply(logits, SimpleNamespace(expanded_idx_mapping=torch.tensor(slots)))

    def _output(self, row: torch.Tensor, params: SamplingParams) -> Any:
        token = int(row.argmax())
        number = params.logprobs
        kept = {int(at): float(row[at]) for at in (token, *row.topk(number or 0).indices)}
        logprobs = None if number is None else [{at: SimpleNamespace(logprob=value) for at, value in kept.items()}]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token], logprobs=logprobs)])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = ["vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor"]
    names += ["vllm.v1.worker", "vllm.v1.worker.gpu", "vllm.v1.worker.gpu.sample"]
    names += ["vllm.v1.worker.gpu.sample.logits_processor"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm"].__dict__.update(LLM=LLM, SamplingParams=SamplingParams)
    first = {"LogitsProcessor": LogitsProcessor, "MoveDirectionality": MoveDirectionality}
    sys.modules["vllm.v1.sample.logits_processor"].__dict__.update(first)
    sys.modules["vllm.v1.worker.gpu.sample.logits_processor"].__dict__.update(LogitsProcessor=LogitsProcessorV2)
    monkeypatch.delitem(sys.modules, "cprec.rank.vllm_processor", raising=False)
    yield
    sys.modules.pop("cprec.rank.vllm_processor", None)


# ---- what is asked ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights."""
    tokenizer = train_tokenizer([" " + title for title in TITLES], 300)
    table = pa.table({"item_id": [f"i{row:02}" for row in range(len(TITLES))], "title": TITLES})
    catalogue = Catalogue.from_tables({"shop": table})
    torch.manual_seed(0)
    model = tiny_model(len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    about = {"domain": "shop", "max_title_tokens": 8, "max_history": 5}
    return write_model(tmp_path_factory.mktemp("model"), model, tokenizer, catalogue, **about)


def queries() -> list[RankingQuery]:
    def query(*history: str, **changes: Any) -> RankingQuery:
        items = tuple(Item("shop", name) for name in history)
        return RankingQuery(**{"query_id": str(history), "domain": "shop", "history": items} | changes)

    return [
        query(),
        query("i00", "i07", "i03"),
        query("i11", exclude=frozenset({"i11", "i02", "i18"})),
        query("i04", "i05", allow=frozenset({"i01", "i06", "i12", "i13"})),
        query("i00", uncounted=frozenset({"i00"})),
        query("i08", candidates=("i01", "i19", "i18", "i04")),
    ]


def assert_same(found: list[Ranking], expected: list[Ranking]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.item_ids == theirs.item_ids
        np.testing.assert_allclose(mine.scores, theirs.scores, rtol=1e-5)
        assert (mine.proof is None) == (theirs.proof is None)
        if mine.proof is not None and theirs.proof is not None:
            assert mine.proof.gap == pytest.approx(theirs.proof.gap, abs=1e-4)
            assert mine.proof.expanded == theirs.proof.expanded


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("second_runner", [False, True], ids=["rows", "slots"])
def test_lists_read_by_vllm_are_those_of_the_model(folder: Path, second_runner: bool) -> None:
    expected = LLMRecommender.from_pretrained(folder, beam_width=3)
    recommender = LLMRecommender.from_pretrained(
        folder, beam_width=3, engine="vllm", engine_options={"second_runner": second_runner}
    )
    for mode in ("exact", "beam", "auto"):
        assert_same(recommender.rank(queries(), 4, mode), expected.rank(queries(), 4, mode))
    given = queries()[-1:]
    assert_same(recommender.rank(given, 4, "generate"), expected.rank(given, 4, "generate"))
    withdrawn = {"shop": frozenset({"i05", "i14"})}
    assert_same(
        recommender.with_items(recommender.catalogue, withdrawn).rank(queries(), 4),
        expected.with_items(expected.catalogue, withdrawn).rank(queries(), 4),
    )
    assert [each.item_id for each in recommender.recommend(["red cup x"], 3)] == [
        each.item_id for each in expected.recommend(["red cup x"], 3)
    ]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("damage", [np.nan, np.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_a_model_whose_scores_are_no_numbers_is_named(folder: Path, engine: Any, damage: float, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = damage  # finite weights may overflow as well
    weights["model.embed_tokens.weight"][5] = damage
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    options = {"second_runner": True} if engine == "vllm" else {}
    recommender = LLMRecommender.from_pretrained(broken, engine=engine, engine_options=options)
    *full, candidates = queries()
    for asked, mode in (
        (full, "exact"),
        (full, "beam"),
        (full, "auto"),
        ([candidates], None),
        ([candidates], "generate"),
    ):
        with pytest.raises(ModelError, match=rf"{broken}: the model's scores are not finite.*train the model again"):
            recommender.rank(asked, 4, mode)


@pytest.mark.usefixtures("stand_in")
def test_histories_fit_the_context_that_the_engine_has_room_for(folder: Path) -> None:
    options = {"max_model_len": 40}
    recommender = LLMRecommender.from_pretrained(folder, engine="vllm", engine_options=options)
    long = RankingQuery(query_id="", domain="shop", history=tuple(Item("shop", f"i{row:02}") for row in range(5)))
    assert 0 < len(recommender.shown(long)) < len(LLMRecommender.from_pretrained(folder).shown(long)) == 5
    assert len(recommender.rank([long], 3)[0].item_ids) == 3


@pytest.mark.usefixtures("stand_in")
def test_only_children_have_a_probability_and_others_requests_are_left_alone() -> None:
    from cprec.rank.vllm_processor import CHILDREN, ChildrenOnly

    processor = ChildrenOnly(None)
    ours = SamplingParams(1, 0.0, False, extra_args={CHILDREN: [4, 1]})
    theirs = SamplingParams(9, 1.0, True)
    processor.update_state(SimpleNamespace(removed=[], added=[(0, ours, None, []), (1, theirs, None, [])], moved=[]))
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    processed = processor.apply(logits)
    torch.testing.assert_close(processed[0, [1, 4]], before[0].log_softmax(0)[[1, 4]])
    assert processed[0, [0, 2, 3, 5]].tolist() == [-np.inf] * 4
    torch.testing.assert_close(processed[1], before[1])
    other = replace(ours, extra_args={CHILDREN: [2]})
    processor.update_state(SimpleNamespace(removed=[], added=[(2, other, None, [])], moved=[]))
    moved = (2, 0, MoveDirectionality.UNIDIRECTIONAL)  # the last takes the place of one that is done
    processor.update_state(SimpleNamespace(removed=[0], added=[], moved=[moved]))
    processed = processor.apply(before.repeat(2, 1)[:3].clone())
    assert (processed[0] > -np.inf).nonzero().tolist() == [[2]]
    torch.testing.assert_close(processed[1:], before.repeat(2, 1)[1:3])
    processor.update_state(SimpleNamespace(removed=[0], added=[], moved=[]))
    torch.testing.assert_close(processor.apply(before.clone()), before)
    for wrong in ([], "ab", [-1], [1.5]):
        with pytest.raises(ValueError, match="expected a list of one or more tokens"):
            ChildrenOnly.validate_params(replace(ours, extra_args={CHILDREN: wrong}))


def test_without_vllm_the_error_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"engine='vllm' needs vLLM .* or choose engine='transformers'"):
        LLMRecommender.from_pretrained(folder, engine="vllm")


def test_adapters_are_refused(tmp_path: Path) -> None:
    from cprec.rank.vllm import VLLMReader

    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a LoRA adapter: merge it"):
        VLLMReader.open(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_itself(folder: Path) -> None:
    expected = LLMRecommender.from_pretrained(folder, beam_width=3)
    options = {"enforce_eager": True, "dtype": "float32", "gpu_memory_utilization": 0.3}
    recommender = LLMRecommender.from_pretrained(folder, beam_width=3, engine="vllm", engine_options=options)
    for mode in ("exact", "beam"):
        assert_same(recommender.rank(queries(), 4, mode), expected.rank(queries(), 4, mode))
