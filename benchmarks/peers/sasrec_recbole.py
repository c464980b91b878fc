"""SASRec by RecBole: its loader, model, loss, optimizer and evaluator; `benchmarks/sequential.py` runs this in an
environment of its own.

A step is one batch of prefixes of histories, each with one target, by the lines of RecBole's own epoch, so that it can
stop when a budget is spent; data loading counts, preparation before it does not. Evaluation is the trainer's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from functools import partial

import torch

warnings.filterwarnings("ignore")
torch.load = partial(torch.load, weights_only=False)  # recbole 1.2.1 was written for torch before 2.6
torch.set_num_threads(1)

from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.utils import get_model, get_trainer, init_seed  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    args = parser.parse_args()
    asked = args.settings
    config = Config(
        model="SASRec",
        dataset=args.data,
        config_dict={
            "data_path": args.folder,
            "checkpoint_dir": tempfile.gettempdir(),
            "USER_ID_FIELD": "user_id",
            "ITEM_ID_FIELD": "item_id",
            "TIME_FIELD": "timestamp",
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "n_layers": asked["num_blocks"],
            "n_heads": asked["num_heads"],
            "hidden_size": asked["width"],
            "inner_size": asked["width"],
            "hidden_dropout_prob": asked["dropout"],
            "attn_dropout_prob": 0.0,
            "hidden_act": "gelu",
            "loss_type": "CE",
            "train_neg_sample_args": None,
            "MAX_ITEM_LIST_LENGTH": asked["max_length"],
            "train_batch_size": asked["batch_size"],
            "eval_batch_size": 4096,
            "learning_rate": asked["learning_rate"],
            "device": "cpu",
            "use_gpu": False,
            "eval_args": {
                "split": {"LS": "valid_and_test"},
                "order": "TO",
                "group_by": "user",
                "mode": "full",
            },
            "metrics": ["NDCG"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "show_progress": False,
            "log_wandb": False,
            "state": "ERROR",
        },
    )
    init_seed(asked["seed"], True)
    train, _, test = data_preparation(config, create_dataset(config))
    model = get_model("SASRec")(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
    model.train()
    seconds, steps, targets, num_warm = 0.0, 0, 0, asked["num_warm"]
    while seconds < asked["seconds"]:
        last = time.process_time()
        for batch in train:
            trainer.optimizer.zero_grad()
            model.calculate_loss(batch).backward()
            trainer.optimizer.step()
            now = time.process_time()
            spent, last = now - last, now
            if num_warm:
                num_warm -= 1
                continue
            seconds, steps, targets = seconds + spent, steps + 1, targets + len(batch)
            if seconds >= asked["seconds"]:
                break
    start = time.process_time()
    ndcg = trainer.evaluate(test, load_best_model=False, show_progress=False)["ndcg@10"]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "steps": steps,
                "targets": targets,
                "evaluation_seconds": time.process_time() - start,
                "users": len(test.dataset),
                "ndcg": float(ndcg),
                "ndcg_unseen": None,
            }
        )
    )


if __name__ == "__main__":
    main()
