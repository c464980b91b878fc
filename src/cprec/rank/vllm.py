"""Prompts and titles read by vLLM, behind the interface that the model in this process has.

A node of the tree is just its tokens here. One call of the engine asks what comes after some nodes, with a request for
each, which makes one token. The request's logits processor (`vllm_processor`) lets the node's children through, so
their log-probabilities come back. vLLM's prefix cache keeps what requests share, so little of a prompt is read twice.
The search, its budgets and its proofs are those of `cprec.search`.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cprec.errors import ConfigError
from cprec.search.finite import require_finite

PROCESSOR = "cprec.rank.vllm_processor:ChildrenOnly"
"""Where the engine's process finds the processor."""


class VLLMReader:
    """A vLLM engine as a `Reader`. It keeps its own cache of prompts."""

    cache = None

    def __init__(self, engine: Any, context: int) -> None:
        """`engine` is a `vllm.LLM` made with the options that `open` gives."""
        self.engine, self.context = engine, context

    @classmethod
    def open(cls, folder: str | Path, **options: Any) -> VLLMReader:
        """The engine of a model folder; `options` are those of `vllm.LLM` (`gpu_memory_utilization=0.5`, say).

        Raises ConfigError where vLLM is not installed or too old, and for folders of adapters.
        """
        folder = Path(folder)
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"{folder} holds a LoRA adapter: merge it for vLLM (fine-tune with lora_merge=true, which writes whole "
                "weights)"
            )
        try:
            from vllm import LLM

            from cprec.rank import vllm_processor  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"{error}: engine='vllm' needs vLLM 0.32 or later; pip install 'cprec[vllm]' on a machine with a GPU, "
                "or choose engine='transformers'"
            ) from None
        settings: dict[str, Any] = {
            "model": str(folder),
            "logits_processors": [PROCESSOR],
            "logprobs_mode": "processed_logits",  # the processor makes log-probabilities of logits
            "max_logprobs": -1,  # a node may have any number of children
            "enable_prefix_caching": True,
            "max_model_len": -1,  # as much of the model's context as there is memory for
        }
        # The engine is a process of its own. Ctrl-C must reach this process only, which stops the engine in order.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            engine = LLM(**settings | options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return cls(engine, int(engine.model_config.max_model_len))

    def read(self, prompts: Sequence[np.ndarray]) -> VLLMTree:
        """See `Reader.read`; the engine reads prompts when it is first asked what comes after them."""
        return VLLMTree(self.engine, prompts)


class VLLMTree:
    """See `Tree`. The state of user u's prompt is u - U, that of a node its number: int64[M, 1]."""

    def __init__(self, engine: Any, prompts: Sequence[np.ndarray]) -> None:
        self._engine = engine
        self._prompts = [prompt.tolist() for prompt in prompts]
        self._nodes: list[tuple[int, int, int]] = []
        """User, parent (-1 right after the prompt) and token of each."""
        self.prompt_hidden_UD = torch.arange(-len(prompts), 0)[:, None]

    @property
    def num_users(self) -> int:
        return len(self._prompts)

    @property
    def num_nodes(self) -> int:
        return len(self._nodes)

    def extend(self, tokens_M: torch.Tensor, users_M: torch.Tensor, parents_M: torch.Tensor) -> torch.Tensor:
        """See `Tree.extend`; nothing is read yet."""
        first = self.num_nodes
        self._nodes += zip(users_M.tolist(), parents_M.tolist(), tokens_M.tolist(), strict=True)
        return torch.arange(first, self.num_nodes)[:, None]

    def forget(self) -> None:
        """See `Tree.forget`."""
        self._nodes.clear()

    def log_probs(self, hidden_MD: torch.Tensor, row_N: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
        """See `Tree.log_probs`."""
        from cprec.rank.vllm_processor import CHILDREN

        rows, counts = torch.unique_consecutive(row_N, return_counts=True)
        asked = [tokens.tolist() for tokens in token_N.split(counts.tolist())]
        options = [{"logprobs": len(tokens), "extra_args": {CHILDREN: tokens}} for tokens in asked]
        found = self._ask(hidden_MD[rows], options)
        values = [
            each.logprobs[0][token].logprob for each, tokens in zip(found, asked, strict=True) for token in tokens
        ]
        made = torch.tensor(values, dtype=torch.float64)
        require_finite(made[made != -torch.inf])  # the processor marks distributions that are not finite with NaN
        return made

    def token_logits(self, hidden_MD: torch.Tensor, row_N: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
        """See `Tree.token_logits`; the engine has made them all anyway."""
        return self.log_probs(hidden_MD, row_N, token_N)

    def likeliest(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """See `Tree.likeliest`."""
        found = self._ask(hidden_MD, [{"logprobs": 0}] * len(hidden_MD))
        tokens = [each.token_ids[0] for each in found]
        logits = [each.logprobs[0][token].logprob for each, token in zip(found, tokens, strict=True)]
        require_finite(torch.tensor(logits, dtype=torch.float64))
        return torch.tensor(tokens, dtype=torch.long)

    def _ask(self, hidden_MD: torch.Tensor, options: Sequence[dict[str, Any]]) -> list[Any]:
        """The engine's output for one token after each state."""
        from vllm import SamplingParams

        if not options:
            return []
        outputs = self._engine.generate(
            [{"prompt_token_ids": self._text(state)} for state in hidden_MD[:, 0].tolist()],
            [SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **each) for each in options],
            use_tqdm=False,
        )
        return [output.outputs[0] for output in outputs]

    def _text(self, state: int) -> list[int]:
        """A prompt and the tokens that lead to a node."""
        path: list[int] = []
        user = state + self.num_users
        while state >= 0:
            user, state, token = self._nodes[state]
            path.append(token)
        return self._prompts[user] + path[::-1]
