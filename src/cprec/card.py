"""The model card of a model folder: `README.md`, whose front matter the Hugging Face hub reads.

Training writes it from the records of the run. An evaluation puts its results under the heading `Results` and into
`model-index`; what else stands in the file, by whomever it was written, stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cprec.data.catalogue import read_parts
from cprec.data.dataset import MANIFEST, read_manifest
from cprec.errors import CPRecError, DataError
from cprec.files import write_whole
from cprec.progress import say
from cprec.provenance import file_sha256
from cprec.schema import TITLE
from cprec.text.config import TINY
from cprec.text.prompts import Template, render

CARD, TAG = "README.md", "cprec"

TEMPLATE = """
# {name}
{opening}
## How to use it

`FOLDER` is where this folder is. CPRec ranks the items in `items/`, and nothing else:

```python
from cprec import Recommender

recommender = Recommender.from_pretrained("FOLDER")
for item in recommender.recommend({history}, k=5{domain_given}):
    print(item.item_id, item.title, item.score)
```
{in_transformers}
## How it was made

- base: {base}
- training: {training}; {num_parameters:,} parameters
- data: {data}
- leakage certificate: {certificate}
- settings, seed, versions and the hashes of all that was read: `run.json`

## Results

Not evaluated yet: `cprec evaluate` writes its results here.

## Before you publish it

- The model has read what the users of these data did, and may repeat parts of it. `items/` holds the catalogue and
  `popularity.parquet` counts of events; `run.json` names folders of the machine that trained.
- {licence}
- It knows the items in `items/`, in the wording of `cprec.json`; what is recommended most was often chosen most.
"""

TRAINED = """
A language model that recommends: it ranks the items of {where} by the probability of their titles, after the titles
that a user chose before. CPRec made it by {stage}.
"""
UNTRAINED = """
A language model as it came, with what lets CPRec recommend the items of {where} by it: an item head over what it makes
of titles, or a blend with simple recommenders. The language model itself has learnt nothing here.
"""
"""The opening of a card."""

IN_TRANSFORMERS = """
In transformers it is a causal language model, which writes a next title freely, also of items that do not exist:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
prompt = {prompt}
ids = torch.tensor([[{begin}*tokenizer.encode(prompt, add_special_tokens=False)]])
written = model.generate(ids, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
```
"""
"""How to use a model that has learnt the prompt."""


class Score(NamedTuple):
    """A number of the results as `model-index` has it."""

    domain: str
    part: str
    metric: str
    """Its identifier, as ndcg_at_10."""
    name: str
    """What people read."""
    value: float


# ---- by training -----------------------------------------------------------------------------------------------------


def write_card(folder: Path, record: Mapping[str, Any], data: Path) -> None:
    """Write the card of a model folder that training has just filled; `record` is what `run.json` holds.

    Where a record of the data or the base model cannot be read, that is said and no card is written: training is done,
    and its model does not depend on a card.
    """
    try:
        text = card_of(folder, record, data)
    except (CPRecError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"note: {record['config']['output_dir']} gets no model card ({CARD}): {error!r}")
    else:
        (folder / CARD).write_text(text, encoding="utf-8")


def card_of(folder: Path, record: Mapping[str, Any], data: Path) -> str:
    """The card of a model folder, from `cprec.json` and `items/` in it, the record of its run and the data folder."""
    done = json.loads((folder / "cprec.json").read_text())
    domain, config = done.get("domain"), record["config"]
    is_adapter = (folder / "adapter_config.json").is_file()
    metadata, base = _base(record, is_adapter)
    head = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        **metadata,
        "tags": ["recommendation", TAG],
    }
    example = domain or min(path.name.partition("=")[2] for path in (folder / "items").iterdir())
    titles = read_parts(folder / "items" / f"domain={example}", [TITLE])[TITLE].unique().to_pylist()[:2]
    prompt = render(Template(**done["template"]), done["history"], example, [(example, title) for title in titles])
    where = f"`{domain}`" if domain else "the domains in `items/`"
    stage = f"fine-tuning on `{domain}`" if domain else "pre-training on behaviour sequences of all domains"
    if layers := done.get("layers_of_teacher"):
        is_taught = any(config[name] for name in ("token_weight", "direction_weight", "distance_weight"))
        stage = (
            f"distilling on `{domain}`: {len(layers)} layers of the base learn what the whole base says"
            if is_taught
            else f"fine-tuning {len(layers)} layers of the base on `{domain}`"
        )
    begin = "".join(f"{token}, " for token in done.get("begin", []))
    is_trained = done["tokens"] > 0
    body = TEMPLATE.format(
        name=Path(config["output_dir"]).absolute().name,
        opening=(TRAINED if is_trained else UNTRAINED).format(where=where, stage=stage),
        history=_quoted(titles),
        domain_given="" if domain else f", domain={_quoted(example)}",
        in_transformers=IN_TRANSFORMERS.format(prompt=_quoted(prompt), begin=begin) if is_trained else "",
        training=f"{stage}{_teachers_in_words(config)}; {done['tokens']:,} tokens in {done['seconds']:,.0f} seconds"
        if is_trained
        else "none",
        num_parameters=done["num_parameters"],
        base=base,
        data=_data_in_words(data),
        certificate=_certificate_in_words(data, done["trained_on"]),
        licence=f"The base has the licence `{metadata['license']}`."
        if "license" in metadata
        else "No licence is named above: that of the base model, where it has one, was not found beside its weights.",
    )
    return f"---\n{_yaml(head)}---\n{body}"


def _base(record: Mapping[str, Any], is_adapter: bool) -> tuple[dict[str, str], str]:
    """What the hub is told of the base model (its name there, its licence), and the base in words.

    Only names of the hub count: it refuses a card with the path of a folder. Adapters on a folder get none.
    """
    start = record["config"]["model_name_or_path"]
    after = record["config"].get("continue_from")
    more = f", going on from the checkpoint `{Path(after).name}`" if after else ""
    if start == TINY:
        return {}, f"a small decoder with random weights (`{TINY}`){more}"
    commit = record["inputs"].get("base/commit")
    path = _in_hub_cache(start) if commit else Path(start, CARD)
    found = read_front_matter(path) if path and path.is_file() else {}
    known = {key: found[key] for key in ("license", "license_name", "license_link") if isinstance(found.get(key), str)}
    if commit:
        return known | {"base_model": start}, f"[{start}](https://huggingface.co/{start}), commit `{commit}`{more}"
    ours = TAG in (found.get("tags") or []) and not is_adapter
    name = {"base_model": found["base_model"]} if ours and "base_model" in found else {}
    origin = f", which was made from {name['base_model']}" if name else ""
    kind = "file" if Path(start).is_file() else "folder"
    return known | name, f"the model {kind} `{Path(start).absolute().name}`{origin}{more}"


def _teachers_in_words(config: Mapping[str, Any]) -> str:
    """What else than the next item was learnt, and from whom; nothing without teachers."""
    teachers = config.get("teachers") or []
    return f", towards what came next and what {' and '.join(teachers)} ranked high" if teachers else ""


def _in_hub_cache(name: str) -> Path | None:
    """The card of a hub's model, if there is a copy on this machine."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CARD)
    return Path(found) if isinstance(found, str) else None


def _data_in_words(data: Path) -> str:
    if not (data / MANIFEST).is_file():
        return f"no `{MANIFEST}` lay beside the tokens"
    domains = read_manifest(data)["domains"]
    counted = (
        f"`{name}` ({about['num_items']:,} items, {about['num_users']:,} users, {about['num_events']:,} events)"
        for name, about in domains.items()
    )
    return f"{', '.join(counted)}; SHA-256 of `{MANIFEST}` `{file_sha256(data / MANIFEST)}`"


def _certificate_in_words(data: Path, trained_on: Sequence[str]) -> str:
    path = data / "certificate.json"
    if not path.is_file():
        return "none"
    found = json.loads(path.read_text())
    checked, violations = (sum(each[name] for each in found["properties"]) for name in ("checked", "violations"))
    covers = "covers" if trained_on and set(trained_on) <= set(found["artifacts"].values()) else "does not cover"
    state = "clean" if found["clean"] else "NOT CLEAN"
    return (
        f"{state}, {violations:,} violations in {checked:,} checks; it {covers} all behaviour that the model was "
        f"trained on since its base; SHA-256 of `{path.name}` `{file_sha256(path)}`"
    )


def _quoted(value: Any) -> str:
    """Text, or a list of texts, as Python and people read it."""
    return json.dumps(value, ensure_ascii=False)


# ---- by an evaluation ------------------------------------------------------------------------------------------------

RESULTS = re.compile(r"^## Results\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
FRONT_MATTER = re.compile(r"---\n(.*?)^---[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)
INDEX = re.compile(r"^model-index:.*\n(?:(?:[ #-].*)?\n)*", re.MULTILINE)


def fill_in(folder: str | Path, results: str, scores: Sequence[Score]) -> bool:
    """Put results (Markdown) and scores, if any, into the card of a model folder, in place of earlier ones; whether
    there was a card with a section for them. The rest stays to the letter, whatever it says."""
    path = Path(folder, CARD)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not RESULTS.search(text):
        return False
    found = FRONT_MATTER.match(text)
    head, body = (INDEX.sub("", found[1]), text[found.end() :]) if found else ("", text)
    named = {"name": path.absolute().parent.name, "results": _index(scores)}
    index = _yaml({"model-index": [named]}) if scores else ""
    section = f"## Results\n\n{results.strip()}\n\n"
    write_whole(path, f"---\n{head}{index}---\n{RESULTS.sub(lambda _: section, body, count=1)}")
    return True


def _index(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The results of `model-index`: one entry for each domain, with its metrics."""
    return [
        {
            "task": {"type": "text-generation", "name": "Recommendation"},
            "dataset": {"type": domain, "name": domain, "split": part},
            "metrics": [
                {"type": score.metric, "name": score.name, "value": score.value}
                for score in scores
                if (score.domain, score.part) == (domain, part)
            ],
        }
        for domain, part in dict.fromkeys((score.domain, score.part) for score in scores)
    ]


# ---- front matter ----------------------------------------------------------------------------------------------------


def read_front_matter(path: Path) -> dict[str, Any]:
    """The metadata of a card; empty where it has none. Raises DataError where they cannot be read."""
    found = FRONT_MATTER.match(path.read_text(encoding="utf-8"))
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: what stands between its first two lines of --- is not YAML ({error})") from None
    if not isinstance(head or {}, dict):
        raise DataError(f"{path}: between its first two lines of --- must be names with values, not {head!r}")
    return dict(head or {})


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
