"""GGUF files, and what else a model may be named by. The files are written here, by the package that llama.cpp uses."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Callable
from email.message import Message
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch

from cprec.data.config import SyntheticConfig
from cprec.errors import ConfigError
from cprec.gguf import RECORD, model_source, plain_folder
from cprec.models import load_model, unloaded_model
from cprec.provenance import WEIGHTS, FileHashes, file_sha256, model_hashes, read_resolved
from cprec.rank.llm import LLMRecommender
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.tokenizer import encode_pieces, load_tokenizer, train_tokenizer
from cprec.train.config import FinetuneConfig, PretrainConfig
from cprec.train.finetune import finetune
from cprec.train.pretrain import pretrain

gguf = pytest.importorskip("gguf")

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS = {"attn_q": 4, "attn_k": 2}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""What GGUF calls the tensors of a layer."""


def llama(vocabulary_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary_size, tie_word_embeddings=True, **shape, **heads)).eval()


def write_gguf(path: Path, quantisation: Any = None, architecture: str = "llama", without: str = "none") -> Any:
    """Write a small instruct model as llama.cpp does: its chat mark ends and pads. Returns the model."""
    bpe = json.loads(train_tokenizer(["a red book about 12 cats"] * 20, 300).backend_tokenizer.to_str())["model"]
    tokens = [*MARKS, *sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)[2:]]
    model, writer = llama(len(tokens)), gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(MARKS) + [1] * (len(tokens) - len(MARKS)))  # control tokens, then normal ones
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    for name, weights in model.state_dict().items():
        if name == "lm_head.weight" or without in name:
            continue
        stem, values = name.removesuffix(".weight").removeprefix("model."), weights.numpy()
        to = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(stem) or NAMES[stem.removeprefix("layers.0.")]
        if heads := HEADS.get(to):  # llama.cpp turns neighbouring numbers of a head, transformers its two halves
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        to = f"{'' if to in ('token_embd', 'output_norm') else 'blk.0.'}{to}.weight"
        if quantisation is not None and values.ndim == 2:
            writer.add_tensor(to, gguf.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(to, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A file that holds plain numbers, of which a folder was made, and the model in it."""
    file = tmp_path_factory.mktemp("models") / "Tiny-1M.F32.gguf"
    model = write_gguf(file)
    plain_folder(file)
    return file, model


# ---- the folder ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_folder_holds_the_model_of_the_file(written: tuple[Path, Any]) -> None:
    from transformers import AutoModelForCausalLM

    file, model = written
    ids = torch.arange(3, 40)[None]
    for loaded in (load_model(file), AutoModelForCausalLM.from_pretrained(file.parent / "Tiny-1M.F32")):
        assert loaded.dtype == torch.float32
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)
    with torch.device("meta"):
        assert unloaded_model(file).num_parameters() == model.num_parameters()


def test_quantised_weights_are_those_of_their_blocks(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    model = write_gguf(tmp_path / "tiny.Q8_0.gguf", kind)
    found = load_model(tmp_path / "tiny.Q8_0.gguf").state_dict()
    for name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        before = model.state_dict()[name].numpy()
        expected = gguf.dequantize(gguf.quantize(before, kind), kind)
        assert np.array_equal(found[name].numpy(), expected) and not np.array_equal(before, expected)


def test_an_instruct_tokenizer_reads_its_marks_as_text(written: tuple[Path, Any]) -> None:
    tokenizer = load_tokenizer(str(written[0]))
    assert (tokenizer.eos_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("<|im_end|>", 2, 2)
    assert tokenizer("".join(MARKS))["input_ids"] == [0, 1, 2]
    (ids,) = encode_pieces(tokenizer, [text := f" a {' '.join(MARKS)} book"])
    assert min(ids) > 2 and tokenizer.decode(ids) == text


def test_a_file_is_dequantised_once_and_known_by_its_hash(written: tuple[Path, Any]) -> None:
    file, _ = written
    folder, sha256 = plain_folder(file), file_sha256(file)
    made = (folder / "model.safetensors").stat()
    assert plain_folder(file) == folder == file.parent / "Tiny-1M.F32"
    assert (folder / "model.safetensors").stat() == made
    assert json.loads((folder / RECORD).read_text()) == {"file": file.name, "sha256": sha256}
    assert model_hashes(file, WEIGHTS, FileHashes(folder)) == {file.name: sha256}
    assert sorted(path.name for path in file.parent.iterdir()) == [folder.name, file.name]


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_folder_that_was_not_made_of_the_file_is_left_alone(tmp_path: Path) -> None:
    file, folder = tmp_path / "tiny.gguf", tmp_path / "tiny"
    file.write_bytes(b"GGUF")
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"tiny\.gguf, but holds something else: rename one of the two"):
        plain_folder(file)
    (folder / RECORD).write_text('{"file": "tiny.gguf", "sha256": "0"}')
    with pytest.raises(ConfigError, match=r"was made of another tiny\.gguf: delete the folder"):
        plain_folder(file)


@pytest.mark.parametrize("kept", [0.0001, 0.05, 0.99])
def test_a_file_that_was_cut_off_is_refused(written: tuple[Path, Any], tmp_path: Path, kept: float) -> None:
    content = written[0].read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ConfigError, match=r"cut\.gguf cannot be dequantised .* It has [\d,]+ bytes: fetch it again"):
        load_model(file)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "clip"}, "architecture clip is not supported yet"),
        ({"without": "down_proj"}, r"1 weights are not in the file, as model\.layers\.0\.mlp\.down_proj\.weight"),
    ],
)
def test_a_model_that_cannot_be_dequantised_is_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    write_gguf(tmp_path / "other.gguf", **changes)
    with pytest.raises(ConfigError, match=rf"cannot be dequantised \(ValueError: .*{message}"):
        load_tokenizer(str(tmp_path / "other.gguf"))


def test_where_the_folder_cannot_be_written_a_link_is_advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"cannot be written: copy or link tiny\.gguf to a folder that can be"):
        plain_folder(tmp_path / "tiny.gguf")


def test_names_of_the_hub_and_folders_go_to_transformers_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("gpt2", "Qwen/Qwen3-0.6B-Base", "TheBloke/Llama-2-7B-GGUF", str(tmp_path)):
        assert model_source(name) == name


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (URLError(OSError("Name or service not known")), True),
        (TimeoutError("timed out"), True),
        (URLError(ssl.SSLError("unknown certificate")), False),
        (HTTPError("https://hub.test", 404, "not found", Message(), None), False),
        (RemoteDisconnected("closed without an answer"), False),
    ],
)
@pytest.mark.parametrize("load", [load_model, unloaded_model, load_tokenizer])
def test_a_hub_that_cannot_be_reached_is_said_at_once(
    load: Callable[[str], Any],
    error: Exception,
    is_told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last three are left to transformers, which finds nothing here and ends in an error of its own."""
    asked: list[str] = []

    def answer(request: Any, timeout: float) -> Any:
        asked.append(request.full_url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.test")
    monkeypatch.setattr("cprec.gguf.urlopen", answer)
    with pytest.raises(ConfigError, match="https://hub.test cannot be reached" if is_told else "transformers can load"):
        load("someone/model")
    assert asked == ["https://hub.test"]
    copy = tmp_path / "models--someone--model"
    (copy / "snapshots/1").mkdir(parents=True)
    (copy / "snapshots/1/config.json").write_text("{}")
    (copy / "refs").mkdir()
    (copy / "refs/main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert model_source("someone/model") == "someone/model" and len(asked) == 1, "a copy is used without the hub"


@pytest.mark.parametrize("load", [load_model, unloaded_model, load_tokenizer])
def test_a_path_where_nothing_is_says_so(load: Callable[[str], Any], tmp_path: Path) -> None:
    for name in ("/no/such/model", "./model", "runs/base/model", "~/model"):
        with pytest.raises(
            ConfigError, match=rf"there is no folder '{name}', and it is no name on the Hugging Face hub"
        ):
            load(name)
    with pytest.raises(ConfigError, match=r"model\.gguf does not exist"):
        load("no/model.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model\.safetensors is a file: give the folder of the model, or a GGUF"):
        load(str(tmp_path / "model.safetensors"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    llama(40).save_pretrained(tmp_path)  # transformers would make an empty tokenizer
    with pytest.raises(ConfigError, match=r"holds no tokenizer \(tokenizer\.json, say\)"):
        load_tokenizer(str(tmp_path))


# ---- the whole road --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_is_prepared_trained_and_ranked_with(written: tuple[Path, Any], tmp_path: Path) -> None:
    file = str(written[0])
    world = SyntheticConfig(num_market_users=60, num_library_users=30, items_per_domain=20)
    rules = {"target_domains": ("books",), "max_title_tokens": 16, "max_document_tokens": 128, "min_history": 1}
    data = prepare(
        PrepareConfig(output_dir=str(tmp_path / "data"), tokenizer=file, synthetic=world, workers=1, **rules)
    )
    settings = {"data": str(data), "model_name_or_path": file, "max_length": 128, "bf16": "false"}
    base = pretrain(PretrainConfig(output_dir=str(tmp_path / "base"), num_train_epochs=0.2, **settings))
    adapted = FinetuneConfig(
        output_dir=str(tmp_path / "tuned"), domain="books", lora_rank=2, num_train_epochs=0.2, **settings
    )
    sha256 = file_sha256(file)
    assert read_resolved(data)["inputs"][f"tokenizer://{written[0].name}"] == sha256
    assert read_resolved(base)["inputs"][f"base/{written[0].name}"] == sha256
    for folder in (base, finetune(adapted)):
        recommender = LLMRecommender.from_pretrained(folder, domain="books")
        item_id = recommender.catalogue.item_id[recommender.catalogue.rows_of("books")[0]]
        (ranking,) = recommender.rank([RankingQuery("q", "books", (Item("books", item_id),))], 5)
        assert len(ranking.item_ids) == 5


# ---- a real one ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_instruct_model_goes_on_as_it_should(tmp_path: Path) -> None:
    """CPREC_GGUF names the file of SmolLM2-135M-Instruct, or of a larger model."""
    if not (named := os.environ.get("CPREC_GGUF")):
        pytest.skip("needs a real GGUF file: set CPREC_GGUF to it")
    file = tmp_path / "real.gguf"
    file.symlink_to(Path(named).resolve())
    model, tokenizer = load_model(file), load_tokenizer(str(file))
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0])
