"""The command line: parse, find the configuration, call the stage.

Only the standard library is imported here; a stage and what it needs load when the stage runs.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cprec import __version__
from cprec.errors import ConfigError, CPRecError, LeakageError

if TYPE_CHECKING:
    from cprec.field_help import FieldHelp

EXIT_ERROR, EXIT_CONFIG, EXIT_INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Verb:
    """A command: what it says of itself, and the function that does it."""

    name: str
    summary: str
    """One line, for `cprec --help`."""
    text: str
    """What it reads, does and writes, for `cprec VERB --help`."""
    function: str
    """`module:function`, called with the configuration (for audit, export and report, with the folder)."""
    example: str
    stage: str = ""
    """The stage whose configuration it takes, where that is not its own name."""


VERBS = (
    Verb(
        "demo",
        "make and judge a recommender from a synthetic world, in minutes",
        "Runs every stage on a generated world whose true next-item distribution is known: with and without "
        "CPRec-style pre-training, on a domain that pre-training saw and on one that it did not, beside simple "
        "baselines and the best result that is possible. Prints one table and writes report.json and report.html. "
        "Run again, it reuses what is complete.",
        "cprec.run:run",
        "cprec demo",
    ),
    Verb(
        "run",
        "every stage of a recipe, from raw logs to a report",
        "Runs prepare, pretrain, finetune and evaluate of one recipe. What an earlier run of the same settings has "
        "completed is reused; what was interrupted is resumed.",
        "cprec.run:run",
        "cprec run my_recipe.yaml pretrain.seed=1",
    ),
    Verb(
        "prepare",
        "raw logs to canonical tables, token shards, examples and queries",
        "Reads logs and catalogues, cleans and validates them (rows that cannot be used are kept, with reasons), "
        "splits the events, turns the training part into behaviour sequences and those into token shards, writes "
        "fine-tuning examples and evaluation queries, and certifies from the written files that nothing "
        "held out is in them.",
        "cprec.text.prepare:prepare",
        "cprec prepare my_recipe.yaml",
    ),
    Verb(
        "pretrain",
        "token shards to a continually pre-trained language model",
        "Continues the pre-training of a causal language model on token shards, under a warmup-stable-annealing "
        "learning rate. Writes a Hugging Face model folder. Interrupted, the same command resumes from the "
        "last checkpoint.",
        "cprec.train.pretrain:pretrain",
        "cprec pretrain my_recipe.yaml learning_rate=3e-4",
    ),
    Verb(
        "schedule",
        "the plan of a pre-training run: phases, mixture, learning rate, as a plot",
        "Shows what `cprec pretrain` with the same settings would do: steps and tokens of each phase, what is read in "
        "it and how often, and the learning rate over the run. Needs the prepared data; trains nothing.",
        "cprec.train.pretrain:show_schedule",
        "cprec schedule my_recipe.yaml anneal_steps=0.2",
        stage="pretrain",
    ),
    Verb(
        "anneal",
        "branches from the end of a run's stable phase, compared",
        "Grows annealing branches of several lengths, shapes and data from the checkpoint at the end of the stable "
        "phase of a pre-training run, without training that phase again; compares them by held-out perplexity and by "
        "the same short fine-tuning. Writes RUN/forks/forks.html. Run again with more lengths, it reuses the branches.",
        "cprec.anneal:anneal",
        "cprec anneal runs/demo/pretrain domain=books lengths=5%,10%,20% data=same,mixed_late",
    ),
    Verb(
        "finetune",
        "a language model to a recommender of one domain",
        "Fine-tunes a model on next-item examples of a domain, with the loss on the target item's title only. Writes a "
        "model folder that `cprec recommend` and `Recommender.from_pretrained` open.",
        "cprec.train.finetune:finetune",
        "cprec finetune my_recipe.yaml seed=1",
    ),
    Verb(
        "report",
        "a page of how training went: loss, learning rate, held-out perplexity, mixture",
        "Draws what the runs of `cprec pretrain` and `cprec finetune` in a folder have logged, those under way too: "
        "loss, learning rate, speed, held-out perplexity of each domain, what was forgotten of general text, the "
        "mixture that was read. Prints the last numbers and writes FOLDER/training.html.",
        "cprec.report:training_report",
        "cprec report runs/demo",
    ),
    Verb(
        "evaluate",
        "rank held-out queries; metrics with intervals, beside baselines",
        "Ranks the held-out queries with the models and with simple baselines, saves the rankings, and makes per-user "
        "metrics, means and intervals from them. Refuses a model whose leakage certificate is missing or does not "
        "cover the test events.",
        "cprec.run:evaluate_models",
        "cprec evaluate my_recipe.yaml",
    ),
    Verb(
        "tune",
        "settings of the baselines by validation queries, the same budget for each",
        "Tries settings of every baseline in every domain of a data folder (Optuna's TPE sampler), as many trials and "
        "as much time for each, and writes those with the best NDCG@10 on validation queries to a file that "
        "evaluate.tuned=FILE reads. Interrupted, the same command goes on with the next baseline. Needs the extra "
        "cprec[tune].",
        "cprec.tune:tune",
        "cprec tune runs/demo/data output=runs/demo/tuned.json domains=books trials=10",
    ),
    Verb(
        "compare",
        "evaluation folders side by side: one table and one plot",
        "Puts the arms of folders that `cprec evaluate` or `cprec run` wrote into one table a domain, with intervals, "
        "tests on the same queries corrected for their number, and the smallest difference that so many queries could "
        "show; and draws them on one page. Refuses runs that were asked differently (split, queries, candidates, seen "
        "items, catalogue, K, certificate) and names what differs. Arms named `NAME (seed N)` are one arm, with the "
        "errors of users and seeds apart. Needs no model.",
        "cprec.evaluate.compare:compare",
        "cprec compare runs/demo runs/demo2 --domain books",
    ),
    Verb(
        "recommend",
        "histories in (command line or file), titles with scores out",
        "Recommends next items for one history on the command line, or for every history of a file.",
        "cprec.serve.recommend:recommend",
        'cprec recommend runs/demo/finetune/books/cprec-style --history "a title" "the next" --k 5',
    ),
    Verb(
        "serve",
        "a model folder to an HTTP service, with a page to try it",
        "Answers requests for recommendations, scores and explanations over HTTP, in batches and within deadlines: "
        "what cannot be ranked exactly in time comes from a beam or a baseline, and says so. Items can be added and "
        "withdrawn while it runs. Listens on this machine alone unless told otherwise; / is a page to try it, /docs "
        "describes the interface. Several model folders of one catalogue can be asked by name.",
        "cprec.serve.serve:serve",
        "cprec serve runs/demo/finetune/books/cprec-style port=8080",
    ),
    Verb(
        "audit",
        "check a prepared data folder again for leaked held-out events",
        "Reads the token shards and examples of a folder that `cprec prepare` wrote, checks every file against its "
        "hash, looks for held-out events in them, and writes the leakage certificate anew. Exits with 1 where "
        "something is violated.",
        "cprec.text.certificate:audit",
        "cprec audit runs/demo/data",
    ),
    Verb(
        "export",
        "a prepared data folder in the form of another library",
        "Writes a folder that `cprec prepare` wrote as atomic files of RecBole, data frames of RecTools or RePlay, or "
        "JSON lines for LLaMA-Factory and TRL. The split is kept; messages and text hold no test event, and validation "
        "only in files of that name. export.json says what was written and from what.",
        "cprec.text.export:export",
        "cprec export runs/demo/data recbole runs/demo/recbole",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (it failed), 2 (a setting is wrong) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _write_any_character()
    debug = "--debug" in arguments
    try:
        options = _parsed(arguments)
        if options.verb is None:
            _parser().print_help()
            return EXIT_CONFIG
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _brief_warnings(warnings.showwarning)
            options.call(options)
        sys.stdout.flush()
        return 0
    except ConfigError as error:
        if debug:
            raise
        return _fail(str(error), EXIT_CONFIG)
    except CPRecError as error:
        if debug:
            raise
        return _fail(str(error), EXIT_ERROR)
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be written, a disk that is full
        if debug:
            raise
        return _fail(f"{error} (--debug shows where)", EXIT_ERROR)
    except KeyboardInterrupt:
        if debug:
            raise
        print(file=sys.stderr)
        again = shlex.join(["cprec", *arguments])
        return _fail(f"interrupted. What is complete is kept; to go on from there: {again}", EXIT_INTERRUPTED)


def _write_any_character() -> None:
    """Where a console or pipe has another encoding than UTF-8, write what it does not have as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> int:
    prefix = "" if code == EXIT_INTERRUPTED else "error: "
    print(f"cprec: {prefix}{message}", file=sys.stderr)
    return code


def _brief_warnings(show: Callable[..., None]) -> Callable[..., None]:
    """What we warn of, as a line for people; the warnings of other packages as `show` has them."""

    def showwarning(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if category is UserWarning and filename.startswith(os.path.dirname(__file__) + os.sep):
            print(f"cprec: warning: {message}", file=sys.stderr)
        else:
            show(message, category, filename, *rest)

    return showwarning


# ---- the verbs -------------------------------------------------------------------------------------------------------


def _stage_of(verb: Verb) -> str | None:
    return None if verb.name in ("run", "demo") else verb.stage or verb.name


def _call_recipe(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.config import find_config
    from cprec.settings import load_object

    config = find_config(options.source, options.settings, stage=_stage_of(verb))
    load_object(verb.function)(config)


def _call_recommend(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.config import STAGE_CONFIGS
    from cprec.settings import from_mapping, load_object, parse_overrides

    settings = parse_overrides(options.settings)
    for name in ("model", "history", "domain", "k", "input", "output"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    config = from_mapping(load_object(STAGE_CONFIGS["recommend"]), settings)

    from cprec import Recommender  # loads torch: only now that the settings are known to be right

    recommender = Recommender.from_pretrained(options.model)
    load_object(verb.function)(config, recommender, _popularity(options.model, recommender.catalogue))


def _call_serve(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.settings import Settings, parse_overrides

    models = [word for word in options.models if "=" not in word]
    settings = parse_overrides(word for word in options.models if "=" in word)
    _serve(verb, Settings({**settings, "models": models}))


def _call_demo(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.config import find_config
    from cprec.run import CPREC, FINETUNED
    from cprec.settings import Settings

    _call_recipe(verb, options)
    if options.serve:
        recipe = find_config(options.source, options.settings)
        folder = f"{recipe.finetune.output_dir}/{recipe.prepare.target_domains[0]}"
        models = [f"{folder}/{arm.lower().replace(' ', '-')}" for arm in (CPREC, FINETUNED)]
        state = f"{recipe.evaluate.output_dir}/serve"
        settings = {"models": models, "data": recipe.prepare.output_dir, "state": state}
        _serve(next(verb for verb in VERBS if verb.name == "serve"), Settings(settings))


def _serve(verb: Verb, settings: Any) -> None:
    """Open the models and what stands in for them, and hand them to the service."""
    from cprec.config import STAGE_CONFIGS
    from cprec.settings import from_mapping, load_object

    config = from_mapping(load_object(STAGE_CONFIGS["serve"]), settings)
    config.check()

    from cprec import Recommender  # loads torch: only now that the settings are known to be right

    names = [folder.rstrip("/").rpartition("/")[2] for folder in config.models]
    if len(set(names)) < len(names):
        names = list(config.models)
    engines = [
        Recommender.from_pretrained(
            folder,
            name=name,
            engine=config.engine,
            engine_options={"gpu_memory_utilization": 0.9 / len(config.models)} if config.engine == "vllm" else {},
            beam_width=config.beam_width,
            max_nodes=config.max_nodes,
            batch_size=config.max_batch,
            cache_bytes=int(config.cache_mb * (1 << 20)),
        )
        for folder, name in zip(config.models, names, strict=True)
    ]
    digest = engines[0].catalogue.digest()
    for folder, engine in zip(config.models, engines, strict=True):
        if engine.catalogue.digest() != digest:
            raise ConfigError(f"{folder} has another catalogue than {config.models[0]}: serve them by themselves")
    load_object(verb.function)(config, engines, _stand_ins(config, engines[0].catalogue))


def _popularity(model: str, catalogue: Any) -> Any:
    """The popular items by what the model folder holds or, for one made before it did, the data folder that it names;
    None where neither says."""
    from pathlib import Path

    from cprec.baselines.popularity import PopularityRecommender
    from cprec.provenance import CONFIG_FILE, read_resolved

    found = PopularityRecommender.read(model, catalogue)
    if found is None and Path(model, CONFIG_FILE).is_file():
        data = read_resolved(model)["config"].get("data")
        found = PopularityRecommender.read(data, catalogue) if data else None
    return found


def _stand_ins(config: Any, catalogue: Any) -> list[Any]:
    """The baselines that answer where the model has no time; none where the data of the model is not here."""
    from pathlib import Path

    from cprec.baselines.popularity import PopularityRecommender
    from cprec.baselines.transition_graph import TransitionGraphRecommender
    from cprec.data.dataset import read_split
    from cprec.progress import say
    from cprec.provenance import read_resolved

    def popular_alone(why: str) -> list[Any]:
        popular = _popularity(config.models[0], catalogue)
        stands = "popular items alone stand in" if popular else "no list stands in"
        say(f"{why}: {stands} for a model that is late; give data=FOLDER, the folder that it was made from")
        return [popular] if popular else []

    data = config.data
    if data is None:
        data = read_resolved(config.models[0])["config"].get("data")
        if data is None or not Path(data).is_dir():
            return popular_alone(f"{data} is not here")
    split = read_split(data)
    if split.catalogue.digest() != catalogue.digest():
        if config.data is not None:
            raise ConfigError(
                f"data={data!r} has another catalogue than {config.models[0]}: give the folder that it was made from"
            )
        return popular_alone(f"{data} has another catalogue than {config.models[0]}")
    return [TransitionGraphRecommender(split), PopularityRecommender(split)]


def _call_anneal(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.config import STAGE_CONFIGS
    from cprec.settings import from_mapping, load_object, parse_overrides

    settings = parse_overrides(options.settings) | {"run": options.run}
    load_object(verb.function)(from_mapping(load_object(STAGE_CONFIGS["anneal"]), settings))


def _call_tune(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.config import STAGE_CONFIGS
    from cprec.settings import from_mapping, load_object, parse_overrides

    settings = parse_overrides(options.settings) | {"data": options.data}
    load_object(verb.function)(from_mapping(load_object(STAGE_CONFIGS["tune"]), settings))


def _call_audit(verb: Verb, options: argparse.Namespace) -> None:
    from pathlib import Path

    from cprec.settings import load_object

    folder = Path(options.folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give one that `cprec prepare` wrote")
    chosen = {"domains": options.domain, "models": options.model, "max_queries": options.max_queries}
    given = {name: value for name, value in chosen.items() if value is not None}
    if options.shortcuts:
        load_object("cprec.shortcuts:audit_shortcuts")(folder, **given)
        return
    if given:
        raise ConfigError("--domain, --model and --max-queries go with --shortcuts")
    certificate = load_object(verb.function)(folder)
    if not certificate["clean"]:
        from cprec.text.certificate import CERTIFICATE, violated

        lines = violated(certificate)
        total = len(certificate["properties"])
        head = f"{folder}: {CERTIFICATE} is not clean: {len(lines)} of {total} properties are violated"
        raise LeakageError("\n  ".join([head, *lines]))


def _call_compare(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.settings import load_object

    chosen = {name: getattr(options, name) for name in ("metric", "protocol", "output")}
    given = {name: value for name, value in chosen.items() if value is not None}
    load_object(verb.function)(options.folders, domains=tuple(options.domain or ()), force=options.force, **given)


def _call_report(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.settings import load_object

    load_object(verb.function)(options.folder)


def _call_export(verb: Verb, options: argparse.Namespace) -> None:
    from cprec.settings import load_object

    if options.output and options.output_option:
        raise ConfigError(f"two folders to write: {options.output} and {options.output_option}; give one")
    output = options.output or options.output_option
    load_object(verb.function)(options.folder, options.format, output, tuple(options.domain or ()))


# ---- parsing and help ------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose wrong arguments are ConfigErrors, and whose help may be made when it is asked for."""

    make_help: Callable[[], str] | None = None

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def format_help(self) -> str:
        return self.make_help() if self.make_help is not None else super().format_help()


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments; settings may stand before, between and after options."""
    options, rest = _parser().parse_known_args(arguments)
    for word in rest:
        if word.startswith("-"):
            name = word.strip("-").partition("=")[0].replace("-", "_")
            raise ConfigError(f"there is no option {word}; settings have no dashes, as in {name}=VALUE")
    if rest:
        if not hasattr(options, "settings"):
            raise ConfigError(
                f"{' '.join(rest)}: more than cprec {options.verb} takes; see cprec {options.verb} --help"
            )
        options.settings = [*options.settings, *rest]
    return options


def _parser() -> _Parser:
    parser = _Parser(prog="cprec", allow_abbrev=False)
    parser.make_help = _main_help
    parser.add_argument("--version", action="version", version=f"cprec {__version__}")
    parser.add_argument("--debug", action="store_true", default=False)
    commands = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for verb in VERBS:
        command = commands.add_parser(verb.name, allow_abbrev=False)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
        command.make_help = _help_maker(verb)
        if verb.name == "recommend":
            command.add_argument("model")
            command.add_argument("settings", nargs="*", default=[], metavar="key=value")
            command.add_argument("--history", nargs="+", action="extend")
            command.add_argument("--domain")
            command.add_argument("--k")
            command.add_argument("--input")
            command.add_argument("--output")
            command.set_defaults(call=_bound(_call_recommend, verb))
        elif verb.name == "anneal":
            command.add_argument("run")
            command.add_argument("settings", nargs="*", default=[], metavar="key=value")
            command.set_defaults(call=_bound(_call_anneal, verb))
        elif verb.name == "tune":
            command.add_argument("data")
            command.add_argument("settings", nargs="*", default=[], metavar="key=value")
            command.set_defaults(call=_bound(_call_tune, verb))
        elif verb.name == "audit":
            command.add_argument("folder")
            command.add_argument("--shortcuts", action="store_true")
            command.add_argument("--domain", nargs="+", action="extend")
            command.add_argument("--model", nargs="+", action="extend")
            command.add_argument("--max-queries", type=int)
            command.set_defaults(call=_bound(_call_audit, verb))
        elif verb.name == "compare":
            command.add_argument("folders", nargs="+")
            command.add_argument("--domain", nargs="+", action="extend")
            command.add_argument("--metric")
            command.add_argument("--protocol")
            command.add_argument("--output")
            command.add_argument("--force", action="store_true")
            command.set_defaults(call=_bound(_call_compare, verb))
        elif verb.name == "report":
            command.add_argument("folder")
            command.set_defaults(call=_bound(_call_report, verb))
        elif verb.name == "export":
            command.add_argument("folder")
            command.add_argument("format")
            command.add_argument("output", nargs="?")
            command.add_argument("--output", dest="output_option")
            command.add_argument("--domain", nargs="+", action="extend")
            command.set_defaults(call=_bound(_call_export, verb))
        elif verb.name == "serve":
            command.add_argument("models", nargs="+", metavar="MODEL")
            command.set_defaults(call=_bound(_call_serve, verb))
        elif verb.name == "demo":
            command.add_argument("settings", nargs="*", default=[], metavar="key=value")
            command.add_argument("--serve", action="store_true")
            command.set_defaults(call=_bound(_call_demo, verb), source="demo")
        else:
            command.add_argument("source", metavar="RECIPE_OR_YAML")
            command.add_argument("settings", nargs="*", default=[], metavar="key=value")
            command.set_defaults(call=_bound(_call_recipe, verb))
    return parser


def _bound(call: Callable[[Verb, argparse.Namespace], None], verb: Verb) -> Callable[[argparse.Namespace], None]:
    return lambda options: call(verb, options)


def _help_maker(verb: Verb) -> Callable[[], str]:
    return lambda: _verb_help(verb)


def _main_help() -> str:
    rows = "\n".join(f"  {verb.name:<10} {verb.summary}" for verb in VERBS)
    return f"""\
usage: cprec VERB RECIPE_OR_YAML [key=value ...]

CPRec: all-domain continual pre-training of language models for recommendation.

verbs:
{rows}

options:
  --help     this text; cprec VERB --help lists every setting of a verb
  --version  print the version
  --debug    show the traceback of an error

RECIPE_OR_YAML is the name of a recipe (cprec run --help lists them), a YAML file with `recipe: NAME` and what to
change, a YAML file with every setting, or the run.json of an earlier run.
"""


_USAGE = {
    "demo": "cprec demo [--serve] [key=value ...]",
    "serve": "cprec serve MODEL ... [key=value ...]",
    "recommend": (
        'cprec recommend MODEL --history "TITLE OR ID" ... [--domain DOMAIN] [--k K]\n'
        "       cprec recommend MODEL --input FILE --output FILE [--domain DOMAIN] [--k K]"
    ),
    "anneal": "cprec anneal RUN [key=value ...]",
    "tune": "cprec tune DATA output=FILE [key=value ...]",
    "report": "cprec report FOLDER",
    "compare": (
        "cprec compare FOLDER ... [--domain DOMAIN ...] [--metric METRIC] [--protocol PROTOCOL]\n"
        "                     [--output FILE] [--force]"
    ),
    "audit": (
        "cprec audit FOLDER\n"
        "       cprec audit FOLDER --shortcuts [--domain DOMAIN ...] [--model MODEL ...] [--max-queries N]"
    ),
    "export": "cprec export FOLDER FORMAT [[--output] DIR] [--domain DOMAIN ...]",
}


def _verb_help(verb: Verb) -> str:
    usage = _USAGE.get(verb.name, f"cprec {verb.name} RECIPE_OR_YAML [key=value ...]")
    parts = [f"usage: {usage}", _wrapped(verb.text)]
    if verb.name == "audit":
        parts.append(
            "  FOLDER         a data folder that `cprec prepare` wrote, or the folder of a run\n"
            "  --shortcuts    measure instead what the data can and cannot show: how many targets a rule finds\n"
            "                 that learns nothing, what history and order are worth, what ties and repeats\n"
            "                 decide; writes shortcuts.html and shortcuts.json into the data folder\n"
            "  --domain       the domains to measure; all with test events where none is named\n"
            "  --model        what to ask beside the transition graph: folders of models, baselines by name\n"
            "  --max-queries  queries of a domain that similarity and models are measured on, 2000 if not given"
        )
    elif verb.name == "compare":
        parts.append(
            "  FOLDER      output_dir of an evaluation or of a recipe's run\n"
            "  --domain    the domains to compare; all that every folder has where none is named\n"
            "  --metric    what to compare by, as recall@5; NDCG at the runs' K if not given\n"
            "  --protocol  full, full_with_seen, candidates_uniform, candidates_popularity or new_items; that of\n"
            "              the runs' main table if not given\n"
            "  --output    the page to write, or the tables alone (.md, .tex); compare.html if not given\n"
            "  --force     show runs that were asked differently, in separate tables"
        )
    elif verb.name == "report":
        parts.append("  FOLDER  the output_dir of a run, or a folder above several, such as that of a recipe")
    elif verb.name == "export":
        parts.append(
            "  FOLDER    a data folder that `cprec prepare` wrote\n"
            "  FORMAT    recbole             atomic files; our split by benchmark_filename, for general models\n"
            "            recbole-sequential  the same for sequential models: each event with its history\n"
            "            rectools, replay    Parquet frames with the columns of these libraries\n"
            "            messages            chats of a prompt and its answer (LLaMA-Factory, TRL)\n"
            "            text                documents to pre-train on; prompts and completions (both)\n"
            "  DIR       the folder to write, which must not be there; FOLDER-FORMAT where none is given\n"
            "  --domain  the domains to write; all where none is named"
        )
    elif verb.name == "anneal":
        parts += ["  RUN  the folder of a pre-training run", _settings_help("anneal", positional="run")]
    elif verb.name == "tune":
        parts += ["  DATA  a data folder that `cprec prepare` wrote", _settings_help("tune", positional="data")]
    elif verb.name == "serve":
        parts += [
            "  MODEL  a model folder; several must have one catalogue",
            _settings_help("serve", positional="models"),
        ]
    elif verb.name in ("run", "demo"):
        own = _recipes_help() if verb.name == "run" else "  --serve  when all is done, serve the models just made"
        parts.append(own)
        parts.append(_stages_help())
    elif verb.name == "schedule":
        parts.append(_wrapped("Settings are those of cprec pretrain; cprec pretrain --help lists them."))
    else:
        parts.append(_settings_help(verb.name))
    parts.append(f"example: {verb.example}")
    return "\n\n".join(parts) + "\n"


def _recipes_help() -> str:
    from cprec.config import describe_recipe, recipes
    from cprec.recipes.arms import ARMS

    lines = ["recipes:"]
    for name, recipe in sorted(recipes().items()):
        lines.append(f"  {describe_recipe(name, recipe)}")
        lines.append(_wrapped((recipe.__doc__ or "").strip().partition("\n")[0], "      "))
    lines += ["", "arms, as arm=NAME: a recipe with one thing changed, in a folder of its own:"]
    lines += [f"  {name:<13}{text}" for name, (text, _) in ARMS.items()]
    return "\n".join(lines)


def _stages_help() -> str:
    return _wrapped(
        "Settings of a stage carry its name: prepare.KEY=VALUE, pretrain.KEY=VALUE, finetune.KEY=VALUE, "
        "evaluate.KEY=VALUE; cprec STAGE --help lists the keys."
    )


def _settings_help(stage: str, positional: str = "") -> str:
    from cprec.config import STAGE_CONFIGS
    from cprec.field_help import describe_fields
    from cprec.settings import load_object

    rows = [row for row in describe_fields(load_object(STAGE_CONFIGS[stage])) if row.key != positional]
    needed = [row for row in rows if row.default is None and "." not in row.key]
    others = [row for row in rows if row not in needed]
    sections = (("needed, from the recipe or from you, as key=value:", needed), ("settings, as key=value:", others))
    return "\n\n".join("\n".join([title, *map(_field, section)]) for title, section in sections if section)


def _field(row: FieldHelp) -> str:
    default = "" if row.default in (None, "(below)") else f" = {row.default}" if row.default else " = (empty)"
    first = f"  {row.key}: {row.type}{default}"
    return f"{first}\n{_wrapped(row.text, '      ')}" if row.text else first


def _wrapped(text: str, indent: str = "") -> str:
    import shutil
    import textwrap

    width = min(100, max(50, shutil.get_terminal_size((100, 24)).columns))
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
