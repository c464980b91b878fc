"""The verbs of the command line: what each takes, what its help says, and the stage that it calls.

Only the standard library is imported at the top: a configuration loads when a verb runs or shows its settings, and
a stage with all that it needs loads when its settings are known to be right.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cprec.errors import ConfigError, LeakageError

RECIPE_ARGUMENT: Mapping[str, Mapping[str, Any]] = {"source": {"metavar": "RECIPE_OR_YAML"}}
FLAG = {"action": "store_true"}
SEVERAL = {"nargs": "+", "action": "extend"}
DATA_FOLDER = {"data": "the folder that `cprec prepare` wrote"}
MODEL_FOLDER = {"model": "the output_dir of `cprec pretrain` or `cprec finetune`"}


def load(path: str) -> Any:
    """Import the module of `module:name` and return the object of that name."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# ---- help on settings ------------------------------------------------------------------------------------------------


def stages_help() -> str:
    """How settings of stages are given to a verb that takes a whole recipe."""
    from cprec.field_help import wrapped

    return wrapped(
        "Settings of a stage carry its name: prepare.KEY=VALUE, pretrain.KEY=VALUE, finetune.KEY=VALUE, "
        "evaluate.KEY=VALUE; cprec STAGE --help lists the keys."
    )


def recipes_help() -> str:
    """The recipes and their arms, and how settings of stages are given."""
    from cprec.config import ARMS, RECIPES, describe_recipe
    from cprec.field_help import wrapped

    lines = ["recipes:"]
    for name, recipe in sorted(RECIPES.items()):
        lines.append(f"  {describe_recipe(name, recipe)}")
        lines.append(wrapped((recipe.__doc__ or "").strip().partition("\n")[0], "      "))
    lines += ["", "arms, as arm=NAME: a recipe with one thing changed, in a folder of its own:"]
    lines += [f"  {name:<13}{text}" for name, (text, _) in ARMS.items()]
    return "\n".join([*lines, "", stages_help()])


# ---- from arguments to a stage ---------------------------------------------------------------------------------------


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options of these names that were given, as keyword arguments."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def with_recipe(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.config import find_config

    config = find_config(options.source, options.settings, stage=verb.stage)
    verb.require_folders(config)
    load(verb.function)(config)


def with_settings(verb: Verb, options: argparse.Namespace) -> None:
    """The arguments of the verb are settings of the stage, as those after them are."""
    from cprec.config import stage_config

    assert verb.stage is not None
    chosen = given(options, *(name.lstrip("-").replace("-", "_") for name in verb.arguments))
    config = stage_config(verb.stage, options.settings, **chosen)
    verb.require_folders(config)
    load(verb.function)(config)


def demo(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.config import find_config

    recipe = find_config("demo", options.settings)
    load(verb.function)(recipe)
    if options.serve:
        load("cprec.serving:serve_demo")(recipe)


def blend(verb: Verb, options: argparse.Namespace) -> None:
    """`with` is a word of Python, so that no setting can have this name."""
    options.settings = ["parts" + word[4:] if word.startswith("with=") else word for word in options.settings]
    with_settings(verb, options)


def report(verb: Verb, options: argparse.Namespace) -> None:
    load(verb.function)(options.folder)


def compare(verb: Verb, options: argparse.Namespace) -> None:
    chosen = given(options, "metric", "protocol", "output") | {"domains": tuple(options.domain)}
    if options.route is None:
        load(verb.function)(options.folders, force=options.force, **chosen)
        return
    if options.force:
        raise ConfigError(
            "--force shows runs in separate tables, and --route needs one table of two runs: leave it out"
        )
    load("cprec.evaluate.routing:route")(options.folders, options.route, **chosen)


def serve(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.config import stage_config

    models = [word for word in options.words if "=" not in word]
    config = stage_config("serve", [word for word in options.words if "=" in word], models=models)
    verb.require_folders(config)
    config.check()
    load(verb.function)(config)


def fit(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.config import fit_config

    words = [word for word in options.words if "=" not in word]
    load(verb.function)(fit_config(words, [word for word in options.words if "=" in word]))


def audit(verb: Verb, options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give one that `cprec prepare` wrote")
    chosen = given(options, "domains", "models", "max_queries")
    if options.shortcuts:
        load("cprec.shortcuts:audit_shortcuts")(folder, **chosen)
        return
    if chosen:
        raise ConfigError("--domain, --model and --max-queries go with --shortcuts")
    certificate = load(verb.function)(folder)
    if not certificate["clean"]:
        lines = load("cprec.text.certificate:violated")(certificate)
        total = len(certificate["properties"])
        head = f"{folder}: certificate.json is not clean: {len(lines)} of {total} properties are violated"
        raise LeakageError("\n  ".join([head, *lines]))


def export(verb: Verb, options: argparse.Namespace) -> None:
    if options.output and options.output_option:
        raise ConfigError(f"two folders to write: {options.output} and {options.output_option}; give one")
    output = options.output or options.output_option
    load(verb.function)(options.folder, options.format, output, tuple(options.domain))


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command: its arguments, its help, and the stage that does it. By default it takes a recipe."""

    name: str
    summary: str
    """One line, for `cprec --help`."""
    text: str
    """What it reads, does and writes, for `cprec VERB --help`."""
    example: str
    function: str
    """The stage, as `module:function`."""
    stage: str | None = None
    """The stage whose settings it takes; None takes the whole recipe, or no settings."""
    usage: str = "RECIPE_OR_YAML [key=value ...]"
    """What follows `cprec VERB`; further lines are indented under the first."""
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: RECIPE_ARGUMENT)
    """Arguments and options, each with the keyword arguments of `add_argument`."""
    takes_settings: bool = True
    """Whether any number of `key=value` words may stand between and after the arguments."""
    about: str = ""
    """The help on the arguments."""
    leave_out: str = ""
    """The settings of the stage that are given as arguments, with spaces between them."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """Settings that name folders which must be there, and what each is."""
    settings_help: Callable[[], str] | None = None
    """The help on the settings, where a list of those of the stage is not right."""
    run: Callable[[Verb, argparse.Namespace], None] = with_recipe
    """Makes the configuration and calls the stage."""

    def add_arguments(self, command: argparse.ArgumentParser) -> None:
        """Declare its arguments and options."""
        for name, options in self.arguments.items():
            command.add_argument(name, **options)
        if self.takes_settings:
            command.add_argument("settings", nargs="*", default=[], metavar="key=value")

    def require_folders(self, config: Any) -> None:
        """Raise ConfigError for a folder that is not there, before all that the stage imports, which takes seconds."""
        for name, what in self.folders.items():
            value = getattr(config, name)
            for folder in (value,) if isinstance(value, str) else value:
                if not Path(folder).exists():
                    raise ConfigError(f"{name}={folder} does not exist: give {what}")

    def call(self, options: argparse.Namespace) -> None:
        """Make the configuration and call the stage."""
        self.run(self, options)

    def help(self) -> str:
        """The text of `cprec VERB --help`."""
        from cprec.config import STAGE_CONFIGS
        from cprec.field_help import describe_settings, wrapped

        about, settings = textwrap.indent(inspect.cleandoc(self.about), "  "), ""
        if self.settings_help is not None:
            settings = self.settings_help()
        elif self.stage is not None:
            settings = describe_settings(STAGE_CONFIGS[self.stage], leave_out=self.leave_out)
        head = f"usage: cprec {self.name} {self.usage}"
        parts = [head, wrapped(" ".join(self.text.split())), about, settings, f"example: {self.example}"]
        return "\n\n".join(filter(None, parts)) + "\n"


# ---- the verbs -------------------------------------------------------------------------------------------------------

VERBS: tuple[Verb, ...] = (
    Verb(
        name="demo",
        summary="make and judge a recommender from a synthetic world, in minutes",
        text="""Runs every stage on a generated world whose true next-item distribution is known: with and without
            CPRec-style pre-training, on a domain that pre-training saw and on one that it did not, beside simple
            baselines and the best result that is possible. Prints one table and writes report.json and report.html.
            Run again, it reuses what is complete.""",
        example="cprec demo",
        function="cprec.run:run",
        usage="[--serve] [key=value ...]",
        arguments={"--serve": FLAG},
        about="--serve  when all is done, serve the models just made",
        settings_help=stages_help,
        run=demo,
    ),
    Verb(
        name="fit",
        summary="a recommender from a log and a table of items, and whether it is worth having",
        text="""Finds the columns of a log and of its items, chooses the size of the model, its passes and the length of
            titles so that all fits the time, prepares and certifies the data, trains, and tries the model on held-out
            events beside simple recommenders. It ends with one sentence: which recommender to use, and how much better
            it is. OUT/recipe.yaml has everything that was chosen; cprec run OUT/recipe.yaml runs it again, as it is or
            edited. Interrupted, the same command goes on.""",
        example="cprec fit events.csv items.csv runs/shop minutes=20",
        function="cprec.fit.fit:fit",
        stage="fit",
        usage="EVENTS [ITEMS] [OUT] [key=value ...]",
        arguments={"words": {"nargs": "+", "metavar": "EVENTS"}},
        takes_settings=False,
        about="""
            EVENTS  the log: one row per event (who, what, when)
            ITEMS   the items and their titles; none where the log has a title in every row
            OUT     the folder to write, runs/fit if not given
            Files end in .csv, .tsv, .jsonl (also with .gz) or .parquet. Where a column is not found
            by itself, say which it is, as columns.user_id=customer.
        """,
        run=fit,
    ),
    Verb(
        name="run",
        summary="every stage of a recipe, from raw logs to a report",
        text="""Runs prepare, pretrain, finetune and evaluate of one recipe. What an earlier run of the same settings
            has completed is reused; what was interrupted is resumed.""",
        example="cprec run my_recipe.yaml pretrain.seed=1",
        function="cprec.run:run",
        settings_help=recipes_help,
    ),
    Verb(
        name="prepare",
        summary="raw logs to canonical tables, token shards, examples and queries",
        text="""Reads logs and catalogues, cleans and validates them (rows that cannot be used are kept, with reasons),
            splits the events, turns the training part into behaviour sequences and those into token shards, writes
            fine-tuning examples and evaluation queries, and certifies from the written files that nothing held out
            is in them.""",
        example="cprec prepare my_recipe.yaml",
        function="cprec.text.prepare:prepare",
        stage="prepare",
    ),
    Verb(
        name="shrink",
        summary="a base model without the tokens that the data never use, or without some layers",
        text="""Cuts the vocabulary of a base model with a byte-level BPE tokenizer to the tokens of the data's texts
            and what their merges need: these texts keep their tokens, any other text can still be written, and of the
            tokens that stay the logits are what they were. With layers=N it also leaves out the neighbouring layers
            that turn hidden states least; such a model must be trained before it is of use. Writes a Hugging Face
            model folder with its tokenizer; prepare the data again with tokenizer=OUT.""",
        example="cprec shrink HuggingFaceTB/SmolLM2-135M runs/smol-small data=runs/shop/data",
        function="cprec.shrink:shrink",
        stage="shrink",
        usage="MODEL OUT data=FOLDER [key=value ...]",
        arguments={"model": {}, "output_dir": {}},
        about="""
            MODEL  a Hugging Face name, a model folder or a GGUF file
            OUT    the model folder to write
        """,
        leave_out="model output_dir",
        run=with_settings,
    ),
    Verb(
        name="pretrain",
        summary="token shards to a continually pre-trained language model",
        text="""Continues the pre-training of a causal language model on token shards, under a warmup-stable-annealing
            learning rate. Writes a Hugging Face model folder. Interrupted, the same command resumes from the last
            checkpoint.""",
        example="cprec pretrain my_recipe.yaml learning_rate=3e-4",
        function="cprec.pretrain:pretrain",
        stage="pretrain",
        folders=DATA_FOLDER,
    ),
    Verb(
        name="schedule",
        summary="the plan of a pre-training run: phases, mixture, learning rate, as a plot",
        text="""Shows what `cprec pretrain` with the same settings would do: steps and tokens of each phase, what is
            read in it and how often, and the learning rate over the run. Needs the prepared data; trains nothing.""",
        example="cprec schedule my_recipe.yaml anneal_steps=0.2",
        function="cprec.train.pretrain:show_schedule",
        stage="pretrain",
        folders=DATA_FOLDER,
        settings_help=lambda: "Settings are those of cprec pretrain; cprec pretrain --help lists them.",
    ),
    Verb(
        name="anneal",
        summary="branches from the end of a run's stable phase, compared",
        text="""Grows annealing branches of several lengths, shapes and data from the checkpoint at the end of the
            stable phase of a pre-training run, without training that phase again; compares them by held-out
            perplexity and by the same short fine-tuning. Writes RUN/forks/forks.html. Run again with more lengths,
            it reuses the branches.""",
        example="cprec anneal runs/demo/pretrain domain=books lengths=5%,10%,20% data=same,mixed_late",
        function="cprec.anneal:anneal",
        stage="anneal",
        folders={"run": "the output_dir of `cprec pretrain`"},
        usage="RUN [key=value ...]",
        arguments={"run": {}},
        about="RUN  the folder of a pre-training run",
        leave_out="run",
        run=with_settings,
    ),
    Verb(
        name="finetune",
        summary="a language model to a recommender of one domain",
        text="""Fine-tunes a model on next-item examples of a domain, with the loss on the target item's title only.
            Writes a model folder that `cprec recommend` and `Recommender.from_pretrained` open.""",
        example="cprec finetune my_recipe.yaml seed=1",
        function="cprec.finetune:finetune",
        stage="finetune",
        folders=DATA_FOLDER,
    ),
    Verb(
        name="distil",
        summary="a fine-tuned model to a shallower one, which learns from it",
        text="""Makes a student of some layers of a teacher, and trains it on next-item examples of a domain: by the
            usual loss, and by drawing its next tokens and its states, group of layers by group, to the teacher's.
            Writes a model folder like that of `cprec finetune`, whose settings it takes. Interrupted, the same command
            resumes from the last checkpoint. Refuses a teacher of another tokenizer, and one trained on what the
            leakage certificate of the data does not cover.""",
        example="cprec distil runs/shop/model runs/shop/small data=runs/shop/data layers=8",
        function="cprec.distil:distil",
        stage="distil",
        folders=DATA_FOLDER,
        usage="MODEL OUT data=FOLDER layers=N [key=value ...]",
        arguments={"model_name_or_path": {"metavar": "MODEL"}, "output_dir": {"metavar": "OUT"}},
        about="""
            MODEL  the teacher: a model folder, or a base model by its Hugging Face name, folder or GGUF file
            OUT    the model folder to write
        """,
        leave_out=(
            "model_name_or_path output_dir tiny.* tiny.hidden_size tiny.num_hidden_layers tiny.num_attention_heads "
            "lora_rank lora_alpha lora_merge fsdp torch_compile"
        ),
        run=with_settings,
    ),
    Verb(
        name="blend",
        summary="a fine-tuned model and simple recommenders, weighted by validation queries",
        text="""Chooses the weights of a model and of recommenders that need no training beside it, by NDCG@10 on
            validation queries; each may be 0. Writes blend.json and what the recommenders have learnt into the model's
            folder: recommend, serve and evaluate use them from then on, and an evaluation says what the model adds to
            the best blend without it.""",
        example='cprec blend runs/demo/finetune/books/cprec-style with="transition graph (titles), EASE"',
        function="cprec.blend:blend",
        stage="blend",
        folders=MODEL_FOLDER,
        usage='MODEL [with="NAME, NAME"] [key=value ...]',
        arguments={"model": {}},
        about="""
            MODEL  a model folder
            with   recommenders, by their names in tables: the setting `parts`
        """,
        leave_out="model",
        run=blend,
    ),
    Verb(
        name="refit",
        summary="the latest events, learnt by the item head and the blend of a finished model",
        text="""Writes a copy of a model whose item head, and the recommenders in its blend, have learnt the held-out
            events as well. Nothing is chosen again, and the language model stays as it is. Serve this one. To know how
            good it is, look at the model that it was made from; or refit with events=validation, and evaluate that
            with refit=true.""",
        example="cprec refit runs/shop/model runs/shop/recommender",
        function="cprec.refit:refit",
        stage="refit",
        folders=MODEL_FOLDER,
        usage="MODEL OUT [key=value ...]",
        arguments={"model": {}, "output_dir": {}},
        about="""
            MODEL  a model folder with an item head or a blend
            OUT    where the refitted model goes
        """,
        leave_out="model output_dir",
        run=with_settings,
    ),
    Verb(
        name="report",
        summary="a page of how training went: loss, learning rate, held-out perplexity, mixture",
        text="""Draws what the runs of `cprec pretrain` and `cprec finetune` in a folder have logged, those under way
            too: loss, learning rate, speed, held-out perplexity of each domain, what was forgotten of general text,
            the mixture that was read. Prints the last numbers and writes FOLDER/training.html.""",
        example="cprec report runs/demo",
        function="cprec.report:training_report",
        usage="FOLDER",
        arguments={"folder": {}},
        takes_settings=False,
        about="FOLDER  the output_dir of a run, or a folder above several, such as that of a recipe",
        run=report,
    ),
    Verb(
        name="evaluate",
        summary="rank held-out queries; metrics with intervals, beside baselines",
        text="""Ranks the held-out queries with the models and with simple baselines, saves the rankings, and makes
            per-user metrics, means and intervals from them. Refuses a model whose leakage certificate is missing or
            does not cover the test events.""",
        example="cprec evaluate my_recipe.yaml",
        function="cprec.run:evaluate_models",
        stage="evaluate",
        folders=DATA_FOLDER,
    ),
    Verb(
        name="tune",
        summary="settings of the baselines by validation queries, the same budget for each",
        text="""Tries settings of every baseline in every domain of a data folder (Optuna's TPE sampler), as many trials
            and as much time for each, and writes those with the best NDCG@10 on validation queries to a file that
            evaluate.tuned=FILE reads. Interrupted, the same command goes on with the next baseline. Needs the extra
            cprec[tune].""",
        example="cprec tune runs/demo/data output=runs/demo/tuned.json domains=books trials=10",
        function="cprec.tune:tune",
        stage="tune",
        folders=DATA_FOLDER,
        usage="DATA output=FILE [key=value ...]",
        arguments={"data": {}},
        about="DATA  a data folder that `cprec prepare` wrote",
        leave_out="data",
        run=with_settings,
    ),
    Verb(
        name="compare",
        summary="evaluation folders side by side: one table and one plot",
        text="""Puts the arms of folders that `cprec evaluate` or `cprec run` wrote into one table a domain, with
            intervals, tests on the same queries corrected for their number, and the smallest difference that so
            many queries could show; and draws them on one page. Refuses runs that were asked differently (split,
            queries, candidates, seen items, catalogue, K, certificate) and names what differs. Arms named `NAME
            (seed N)` are one arm, with the errors of users and seeds apart. Needs no model.""",
        example="cprec compare runs/demo runs/demo2 --domain books",
        function="cprec.evaluate.compare:compare",
        usage=(
            "FOLDER ... [--domain DOMAIN ...] [--metric METRIC] [--protocol PROTOCOL]\n"
            "                     [--output FILE] [--force]\n"
            '       cprec compare VALIDATION TEST --route "ARM, OTHER ARM" [--domain DOMAIN ...] ...'
        ),
        arguments={
            "folders": {"nargs": "+"},
            "--domain": SEVERAL | {"default": []},
            "--metric": {},
            "--protocol": {},
            "--output": {},
            "--force": FLAG,
            "--route": {},
        },
        takes_settings=False,
        about="""
            FOLDER      output_dir of an evaluation or of a recipe's run
            --domain    the domains to compare; all that every folder has where none is named
            --metric    what to compare by, as recall@5; NDCG at the runs' K if not given
            --protocol  full, full_with_seen, candidates_uniform, candidates_popularity or new_items; that of
                        the runs' main table if not given
            --output    the page to write, or the tables alone (.md, .tex); compare.html if not given
            --force     show runs that were asked differently, in separate tables
            --route     send the users whom ARM serves badly to OTHER ARM: who is weak is chosen in a folder
                        evaluated with part=validation, and judged in one with part=test; route.html if no
                        output is given
        """,
        run=compare,
    ),
    Verb(
        name="recommend",
        summary="histories in (command line or file), titles with scores out",
        text="""Recommends next items for one history on the command line, for words that say what is asked for, or
            for both; or for every history of a file.""",
        example='cprec recommend runs/demo/finetune/books/cprec-style --history "a title" "the next" --k 5',
        function="cprec.serving:open_and_recommend",
        stage="recommend",
        folders=MODEL_FOLDER,
        usage=(
            'MODEL [--history "TITLE OR ID" ...] [--query WORDS] [--domain DOMAIN] [--k K]\n'
            "       cprec recommend MODEL --input FILE --output FILE [--domain DOMAIN] [--k K]\n"
            "                       [--num-processes N|auto] [--partition I/N]"
        ),
        arguments={
            "model": {},
            "--history": SEVERAL,
            "--query": {},
            "--domain": {},
            "--k": {},
            "--input": {},
            "--output": {},
            "--num-processes": {},
            "--partition": {},
        },
        run=with_settings,
    ),
    Verb(
        name="serve",
        summary="a model folder to an HTTP service, with a page to try it",
        text="""Answers requests for recommendations, scores and explanations over HTTP, in batches and within
            deadlines: what cannot be ranked exactly in time comes from a beam or a baseline, and says so. Items can
            be added and withdrawn while it runs. Listens on this machine alone unless told otherwise; / is a page
            to try it, /docs describes the interface. Several model folders of one catalogue can be asked by name.""",
        example="cprec serve runs/demo/finetune/books/cprec-style port=8080",
        function="cprec.serving:open_and_serve",
        stage="serve",
        folders={"models": MODEL_FOLDER["model"]},
        usage="MODEL ... [key=value ...]",
        arguments={"words": {"nargs": "+", "metavar": "MODEL"}},
        takes_settings=False,
        about="MODEL  a model folder; several must have one catalogue",
        leave_out="models",
        run=serve,
    ),
    Verb(
        name="audit",
        summary="check a prepared data folder again for leaked held-out events",
        text="""Reads the token shards and examples of a folder that `cprec prepare` wrote, checks every file against
            its hash, looks for held-out events in them, and writes the leakage certificate anew. Exits with 1 where
            something is violated.""",
        example="cprec audit runs/demo/data",
        function="cprec.text.certificate:audit",
        usage=(
            "FOLDER\n       cprec audit FOLDER --shortcuts [--domain DOMAIN ...] [--model MODEL ...] [--max-queries N]"
        ),
        arguments={
            "folder": {},
            "--shortcuts": FLAG,
            "--domain": SEVERAL | {"dest": "domains"},
            "--model": SEVERAL | {"dest": "models"},
            "--max-queries": {"type": int},
        },
        takes_settings=False,
        about="""
            FOLDER         a data folder that `cprec prepare` wrote, or the folder of a run
            --shortcuts    measure instead what the data can and cannot show: how many targets a rule finds
                           that learns nothing, what history and order are worth, what ties and repeats
                           decide; writes shortcuts.html and shortcuts.json into the data folder
            --domain       the domains to measure; all with test events where none is named
            --model        what to ask beside the transition graph: folders of models, baselines by name
            --max-queries  queries of a domain that similarity and models are measured on, 2000 if not given
        """,
        run=audit,
    ),
    Verb(
        name="export",
        summary="a prepared data folder in the form of another library",
        text="""Writes a folder that `cprec prepare` wrote as atomic files of RecBole, data frames of RecTools or
            RePlay, or JSON lines for LLaMA-Factory and TRL. The split is kept; messages and text hold no test
            event, and validation only in files of that name. export.json says what was written and from what.""",
        example="cprec export runs/demo/data recbole runs/demo/recbole",
        function="cprec.text.export:export",
        usage="FOLDER FORMAT [[--output] DIR] [--domain DOMAIN ...]",
        arguments={
            "folder": {},
            "format": {},
            "output": {"nargs": "?"},
            "--output": {"dest": "output_option"},
            "--domain": SEVERAL | {"default": []},
        },
        takes_settings=False,
        about="""
            FOLDER    a data folder that `cprec prepare` wrote
            FORMAT    recbole             atomic files; our split by benchmark_filename, for general models
                      recbole-sequential  the same for sequential models: each event with its history
                      rectools, replay    Parquet frames with the columns of these libraries
                      messages            chats of a prompt and its answer (LLaMA-Factory, TRL)
                      text                documents to pre-train on; prompts and completions (both)
            DIR       the folder to write, which must not be there; FOLDER-FORMAT where none is given
            --domain  the domains to write; all where none is named
        """,
        run=export,
    ),
)
"""Every command, in the order of `cprec --help`."""
