"""Where transformers finds a model: a Hugging Face name, a folder, or a GGUF file, of which a folder is made once."""

from __future__ import annotations

import copy
import json
import os
import re
import ssl
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock

from cprec.errors import ConfigError
from cprec.files import whole_folder
from cprec.progress import hide_progress_bars, say
from cprec.provenance import FileHashes, is_gguf

RECORD = "gguf.json"
"""In the folder of a GGUF file: the name and the SHA-256 of the file that it was made of."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""NAME or OWNER/NAME. It may also be a folder that is not there; only the hub can tell."""
_EVERY_MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""Files of which a copied model or tokenizer has one."""
_SECONDS = 10
"""How long to wait for the hub's answer."""


def model_source(name_or_path: str | Path) -> str:
    """What transformers opens for a model that a setting names: a name or folder itself, the folder of a GGUF file.

    Raises ConfigError for a path where there is no folder, for a name without a copy where the hub cannot be reached,
    and as `plain_folder` does.
    """
    path = Path(name_or_path)
    if is_gguf(path):
        return str(plain_folder(path))
    if path.is_file():
        raise ConfigError(f"{path} is a file: give the folder of the model, or a GGUF file (*.gguf)")
    if not (path.is_dir() or _HUB_NAME.fullmatch(str(name_or_path))):
        raise ConfigError(
            f"there is no folder {str(name_or_path)!r}, and it is no name on the Hugging Face hub (OWNER/NAME): give a "
            "name, the folder of a model, or a GGUF file"
        )
    if not path.is_dir():
        _check_hub(str(name_or_path))
    return str(name_or_path)


def _check_hub(name: str) -> None:
    """Raises ConfigError where there is no copy of a model and the hub does not answer. transformers would find out
    file by file, in minutes."""
    from huggingface_hub import constants, try_to_load_from_cache

    is_copied = any(isinstance(try_to_load_from_cache(name, file), str) for file in _EVERY_MODEL)
    if is_copied or constants.HF_HUB_OFFLINE:
        return
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_SECONDS).close()
    except (HTTPError, HTTPException, ConnectionError):
        return  # something answers, if not to this
    except (URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # transformers may know other certificates
        raise ConfigError(
            f"there is no folder {name!r}, this machine has no copy of a model of that name, and {constants.ENDPOINT} "
            f"cannot be reached ({reason}): go online, or give the folder of a model or a GGUF file"
        ) from error


def plain_folder(file: Path) -> Path:
    """The folder beside a GGUF file, named as the file without its ending: the dequantised model in fp32, and the
    tokenizer, as transformers saves them. The first call writes it, which other processes wait for.

    Raises ConfigError for a file that is not there, cannot be dequantised, or is not the one that the folder was made
    of, and where the folder cannot be written.
    """
    if not file.is_file():
        raise ConfigError(f"{file} does not exist: give a GGUF file, the folder of a model or a Hugging Face name")
    folder = file.with_suffix("")
    if not folder.exists():
        if not os.access(file.parent, os.W_OK):
            raise ConfigError(
                f"{folder} is to hold the dequantised model, but {file.parent} cannot be written: copy or link "
                f"{file.name} to a folder that can be, and name it there"
            )
        lock = file.with_name(f".{folder.name}.lock")
        with FileLock(lock):
            try:
                if not folder.exists():  # no other process was quicker
                    _write(file, folder)
            finally:
                lock.unlink(missing_ok=True)
    _check_made_of(file, folder)
    return folder


def _check_made_of(file: Path, folder: Path) -> None:
    """Raise ConfigError unless a folder was made of this very file."""
    if not (folder / RECORD).is_file():
        raise ConfigError(
            f"{folder} is to hold the dequantised model of {file.name}, but holds something else: rename one of the two"
        )
    hashes, made_of = FileHashes(folder), json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if hashes.of(file) != made_of["sha256"]:
        raise ConfigError(f"{folder} was made of another {file.name}: delete the folder to have it made anew")
    hashes.save()


def _write(file: Path, folder: Path) -> None:
    """Dequantise a file into a folder."""
    say(f"{file}: dequantising into {folder}, once")
    sha256 = FileHashes(folder).of(file)
    try:
        model, tokenizer = _read(file)
    except ImportError as error:
        raise ConfigError(f"GGUF files need more packages ({error}): pip install 'cprec[gguf]'") from None
    except MemoryError:
        raise
    except Exception as error:  # in a damaged file anything may be anywhere
        raise ConfigError(
            f"{file} cannot be dequantised ({type(error).__name__}: {error}). It has {file.stat().st_size:,} bytes: "
            "fetch it again if its publisher says more. If transformers does not know its architecture or its "
            "quantisation, take another file of the model, or its Hugging Face name"
        ) from error
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / RECORD).write_text(json.dumps({"file": file.name, "sha256": sha256}) + "\n", encoding="utf-8")


def _read(file: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of a GGUF file; the model can be saved, which transformers refuses as it loads it."""
    import gguf  # noqa: F401  # what transformers reads the file with
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hide_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    loaded, about = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(about["missing_keys"]):  # transformers would leave random weights there
        raise ValueError(f"{len(missing)} weights are not in the file, as {', '.join(missing[:3])}")
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    with torch.device("meta"):  # no second set of weights
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    return plain, tokenizer
